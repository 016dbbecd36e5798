"""Training: TRL's SFTTrainer, loss on the answer alone, resumable, watched on validation rows."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from data_prep import Example, UserError
from data_prep.store import write_json
from finetune import cards, chat, energy, evaluation, hardware, memory, metrics, models, paths, records
from finetune.data import PreparedData
from finetune.files import folder_bytes, folder_digest, replacing_folder
from finetune.settings import Settings

# Written last into a checkpoint: one without it was cut short.
WHOLE = "whole.json"
SUPERVISION_ROWS = 8


@dataclass(frozen=True)
class Supervision:
    """What the loss sees of the first rows, read from the collated batch that the model gets."""

    rows: int
    tokens: int
    labelled_tokens: int
    decoded: list[str]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"tokens that carry loss, decoded": self.decoded})


@dataclass
class Session:
    """A training that is ready to run: model, tokenizer, trainer, and what was checked before the start."""

    settings: Settings
    data: PreparedData
    model: Any
    tokenizer: Any
    trainer: SFTTrainer
    attention: models.Attention
    supervision: Supervision
    choices: dict[str, str]
    clock: Clock
    encoded_tokens: int

    def trainable(self) -> pd.DataFrame:
        """Trainable parameters by kind of tensor."""
        counts = models.trainable_table(self.model)
        total = models.parameter_count(self.model)
        table = pd.DataFrame({"parameters": counts})
        table["share of the model"] = [f"{count / total:.3%}" for count in counts.values()]
        return table

    def run(self) -> records.RunRecord:
        """Train, resuming from the newest whole checkpoint, save the artefact and write the run's record."""
        state = self.settings.state_folder
        checkpoint = newest_whole_checkpoint(state)
        if checkpoint:
            print(f"Resuming from {checkpoint.name}: an earlier run of these settings was interrupted there")
        hardware.reset_peak_memory()
        self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        peak_bytes, peak_kind = hardware.peak_memory()
        folder = save_artefact(self)
        record = self._record(folder, peak_bytes, peak_kind)
        records.write(record, self.settings.run_folder)
        shutil.rmtree(state, ignore_errors=True)
        return record

    def _record(self, folder: Path, peak_bytes: int, peak_kind: str) -> records.RunRecord:
        recipe, state = self.settings.recipe, self.trainer.state
        tokens, articles = round(self.encoded_tokens * recipe.epochs), round(len(self.data.train) * recipe.epochs)
        training = records.Training(
            environment=records.environment(),
            settings_digest=self.settings.training_digest,
            seconds=self.clock.seconds,
            steps=state.global_step,
            articles=articles,
            tokens=tokens,
            articles_per_second=articles / self.clock.seconds,
            tokens_per_second=tokens / self.clock.seconds,
            peak_memory_bytes=peak_bytes,
            peak_memory_kind=peak_kind,
            energy_joules=self.clock.energy.joules,
            parameters=models.parameter_count(self.model),
            trainable_parameters=sum(models.trainable_table(self.model).values()),
            supervised_tokens_of_first_rows=self.supervision.labelled_tokens,
            attention=self.attention.implementation,
            choices=self.choices,
            artefact=str(folder.relative_to(paths.home())),
            artefact_bytes=folder_bytes(folder),
            artefact_digest=folder_digest(folder),
            history=_history(state.log_history),
        )
        return records.new_record(self.settings, self.data.reference, training=training)


def prepare_training(settings: Settings, data: PreparedData) -> Session:
    """Load the model, encode the rows and check what the loss will see; prints every choice made on the way.

    Raises:
        UserError: The model cannot be loaded, or no token carries loss.
    """
    set_seed(settings.experiment.seed)
    torch.backends.cudnn.benchmark = settings.recipe.cudnn_benchmark
    attention = models.choose_attention(settings)
    choices = _choices(settings, attention)
    for name, choice in choices.items():
        print(f"{name}: {choice}")
    tokenizer = models.load_tokenizer(settings)
    model = models.load_for_training(settings, attention)
    choices["memory"] = memory.require_room(settings.recipe, sum(models.trainable_table(model).values()))
    print(f"memory: {choices['memory']}")
    encode = partial(chat.encode, tokenizer, max_length=settings.recipe.max_length)
    encoded = encode(data.train)
    dataset = Dataset.from_list([row.row for row in encoded])
    clock = Clock(settings)
    watch = ValidationWatch(tokenizer, data.validation, encode(data.validation), settings)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(settings, attention),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[clock, watch, StopOnNonFiniteLoss()],
    )
    watch.trainer, watch.clock = trainer, clock
    _set_pace(trainer, settings)
    supervision = check_supervision(trainer, tokenizer)
    return Session(
        settings, data, model, tokenizer, trainer, attention, supervision, choices, clock, sum(map(len, encoded))
    )


def check_supervision(trainer: SFTTrainer, tokenizer) -> Supervision:
    """Collate the first rows as the training will, and read which tokens carry loss.

    Raises:
        UserError: None does. The training would run, and learn nothing.
    """
    rows = min(SUPERVISION_ROWS, len(trainer.train_dataset))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(rows)])
    labelled = batch["labels"] != chat.IGNORED
    if not labelled.any():
        raise UserError("no token of the first rows carries loss: the answers were lost in collation or truncation")
    return Supervision(
        rows=rows,
        tokens=sum(len(trainer.train_dataset[row]["input_ids"]) for row in range(rows)),
        labelled_tokens=int(labelled.sum()),
        decoded=[
            tokenizer.decode(ids[mask]) for ids, mask in zip(batch["input_ids"], labelled, strict=True) if mask.any()
        ],
    )


def newest_whole_checkpoint(state: Path) -> Path | None:
    """The checkpoint to resume from; one that was cut short while it was written does not count."""
    whole = [path.parent for path in state.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def save_artefact(session: Session) -> Path:
    """Save weights (or adapter), tokenizer and model card; the folder appears whole or not at all."""
    settings = session.settings
    folder = settings.artefact_folder
    # The wrapper that the trainer put around it, if any, is not what users load.
    model = session.trainer.accelerator.unwrap_model(session.trainer.model)
    if not settings.recipe.adapter:
        # The fp32 copy served the optimiser; bf16 is the precision that the model is used in, and half the size.
        model.to(torch.bfloat16)
    with replacing_folder(folder) as beside:
        model.save_pretrained(beside)
        session.tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(
            cards.model_card(settings, session.data, models.model_name(settings)), encoding="utf-8"
        )
    return folder


class Clock(TrainerCallback):
    """Counts seconds and energy of training, without those of validation, across interruptions; reports progress."""

    def __init__(self, settings: Settings):
        self.seconds = 0.0
        self.energy = energy.EnergyMeter()
        self._since = 0.0
        self._resumed_at = 0
        self._before = 0.0
        self._run = settings.run
        self._progress = paths.run_folder(settings.profile, settings.run) / "progress.json"

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self._since
        self.energy.stop()

    def go_on(self) -> None:
        self.energy.start()
        self._since = time.perf_counter()

    def on_train_begin(self, args, state, control, **_) -> None:
        checkpoint = newest_whole_checkpoint(Path(args.output_dir))
        if state.global_step and checkpoint:
            before = json.loads((checkpoint / WHOLE).read_text())
            self.seconds = before["seconds"]
            self.energy.go_on_from(before.get("joules"))
        self._resumed_at, self._before = state.global_step, self.seconds
        self.go_on()

    def on_step_end(self, args, state, control, **_) -> None:
        self.pause()
        self.go_on()
        pace = (self.seconds - self._before) / (state.global_step - self._resumed_at)
        write_json(
            self._progress,
            {
                "run": self._run,
                "step": state.global_step,
                "total_steps": state.max_steps,
                "seconds_left": round(pace * (state.max_steps - state.global_step)),
                "updated": time.time(),
            },
        )

    def on_save(self, args, state, control, **_) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(
            checkpoint / WHOLE, {"step": state.global_step, "seconds": self.seconds, "joules": self.energy.joules}
        )

    def on_train_end(self, args, state, control, **_) -> None:
        self.pause()
        self._progress.unlink(missing_ok=True)


class ValidationWatch(TrainerCallback):
    """Scores the validation rows several times during a training, and logs accuracy and log loss."""

    trainer: SFTTrainer
    clock: Clock

    def __init__(self, tokenizer, examples: Sequence[Example], encoded: Sequence[chat.Encoded], settings: Settings):
        self._tokenizer = tokenizer
        self._labels = [example.label for example in examples]
        self._prompts = [row.prompt for row in encoded]
        self._times = settings.recipe.evaluations
        self._batch_size = settings.experiment.evaluation_batch_size

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        if state.global_step not in _spread(state.max_steps, self._times):
            return
        self.clock.pause()
        models.evaluating(model)
        # Unsloth's forward passes (2026.10.9) treat the scorer's cache in a way of their own.
        scorer = evaluation.LabelScorer(models.for_scoring(model), self._tokenizer, self._batch_size)
        # The same products in bf16 as in training; the labels' probabilities are formed in fp32.
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            probabilities = scorer.score(self._prompts)
        model.train()
        result = metrics.compute(self._labels, evaluation.predicted_labels(probabilities))
        # Logging clears the flag that this step's loss is due to be logged too.
        due = control.should_log
        self.trainer.log(
            {
                "validation_accuracy": result.accuracy,
                "validation_log_loss": metrics.log_loss(self._labels, probabilities),
                "training_seconds": self.clock.seconds,
            }
        )
        control.should_log = due
        self.clock.go_on()


class StopOnNonFiniteLoss(TrainerCallback):
    """Ends a training whose loss is no number: it never recovers, and would fill hours with nothing."""

    def on_log(self, args, state, control, logs=None, **_) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {state.global_step}; lower learning_rate, or set weights=float32"
            )


def _choices(settings: Settings, attention: models.Attention) -> dict[str, str]:
    """What was decided for the user, each with its reason."""
    recipe = settings.recipe
    choices = {
        "device": f"{hardware.gpu_name() or 'CPU'}",
        "engine": f"{settings.engine}: {settings.engine_reason}",
        "attention": f"{attention.implementation}: {attention.reason}",
        "packing": _packing_choice(settings, attention),
        "gradient checkpointing": recipe.gradient_checkpointing,
        "precision": f"{recipe.weights} weights, bfloat16 products",
    }
    if recipe.load_in_4bit:
        choices["precision"] = "4-bit NormalFloat base, bfloat16 products"
    if recipe.gradient_checkpointing == "unsloth" and settings.engine != "unsloth":
        choices["gradient checkpointing"] = "plain: Unsloth's needs the Unsloth engine"
    return choices


def _packing_choice(settings: Settings, attention: models.Attention) -> str:
    if not settings.recipe.packing:
        return "off: packing=False; Unsloth joins a batch without padding" if settings.engine == "unsloth" else "off"
    if not attention.isolates:
        return f"off: {attention.implementation} attention does not keep packed articles apart; grouped by length"
    return "on: the attention keeps packed articles apart"


def _arguments(settings: Settings, attention: models.Attention) -> SFTConfig:
    recipe, seed = settings.recipe, settings.experiment.seed
    pack = recipe.packing and attention.isolates
    # transformers 5 takes the folder of TensorBoard's logs from the environment alone.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(settings.run_folder / "tensorboard")
    return SFTConfig(
        output_dir=str(_fresh_state(settings)),
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=recipe.warmup_share,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        max_length=recipe.max_length,
        packing=pack,
        train_sampling_strategy="random" if pack or settings.engine == "unsloth" else "group_by_length",
        gradient_checkpointing=recipe.gradient_checkpointing != "off",
        bf16=True,
        use_cpu=not hardware.has_cuda(),
        dataloader_pin_memory=hardware.has_cuda(),
        seed=seed,
        data_seed=seed,
        logging_nan_inf_filter=False,
        save_total_limit=2,
        report_to=["tensorboard"],
    )


def _set_pace(trainer: SFTTrainer, settings: Settings) -> None:
    """Log about 50 times and save `saves` times; where rows are packed, the trainer alone knows how many are left."""
    recipe = settings.recipe
    updates = math.ceil(len(trainer.train_dataset) / (recipe.batch_size * recipe.gradient_accumulation_steps))
    steps = math.ceil(updates * recipe.epochs)
    trainer.args.logging_steps = max(1, round(steps / 50))
    trainer.args.save_steps = math.ceil(steps / recipe.saves)


def _fresh_state(settings: Settings) -> Path:
    """The folder of this run's checkpoints, emptied if they are of other settings."""
    folder = settings.state_folder
    mark = folder / "settings.json"
    if folder.is_dir() and (not mark.is_file() or json.loads(mark.read_text())["digest"] != settings.training_digest):
        print(f"Discarding the checkpoints in {folder}: they are of other settings")
        shutil.rmtree(folder)
    write_json(mark, {"digest": settings.training_digest})
    return folder


def _spread(steps: int, times: int) -> set[int]:
    """`times` steps, evenly spread, the last among them."""
    return {max(1, round(steps * part / times)) for part in range(1, times + 1)}


def _history(log: list[dict[str, float]]) -> list[records.LogPoint]:
    """What the trainer logged, merged into one point a step."""
    points: dict[int, dict[str, float]] = {}
    for entry in log:
        known = {key: value for key, value in entry.items() if key in records.LogPoint.model_fields}
        points.setdefault(entry["step"], {}).update(known)
    return [
        records.LogPoint(**point)
        for _, point in sorted(points.items())
        if {"loss", "validation_accuracy"} & point.keys()
    ]
