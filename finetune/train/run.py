"""Training: TRL's SFTTrainer, loss on the answer alone, resumable, watched on validation rows."""

from __future__ import annotations

import json
import math
import os
import shutil
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

from data_prep.files import write_json
from finetune import cards, machine, paths, records
from finetune.config.plan import Settings
from finetune.config.recipes import Recipe
from finetune.data import PreparedData
from finetune.files import folder_bytes, folder_digest, replacing_folder
from finetune.model import encode, load, packing
from finetune.model.precision import Precision
from finetune.train import memory
from finetune.train.callbacks import Clock, StopOnNonFiniteLoss, ValidationWatch, newest_whole_checkpoint
from finetune.train.checks import Supervision, check_isolation, check_supervision
from finetune.train.trainer import FixedShapes, RowCollator, RowTrainer


@dataclass
class Session:
    """A training that is ready to run: model, tokenizer, trainer, and what was checked before the start."""

    settings: Settings
    data: PreparedData
    model: Any
    tokenizer: Any
    trainer: SFTTrainer
    backbone: packing.Backbone
    attention: load.Attention
    supervision: Supervision
    choices: dict[str, str]
    clock: Clock
    encoded_tokens: int

    def trainable(self) -> pd.DataFrame:
        """Trainable parameters by kind of tensor."""
        counts = load.trainable_table(self.model)
        total = load.parameter_count(self.model)
        table = pd.DataFrame({"parameters": counts})
        table["share of the model"] = [f"{count / total:.3%}" for count in counts.values()]
        return table

    def run(self) -> records.RunRecord:
        """Train, resuming from the newest whole checkpoint, save the artefact and write the run's record."""
        state = self.settings.state_folder
        checkpoint = newest_whole_checkpoint(state)
        if checkpoint:
            print(f"Resuming from {checkpoint.name}: an earlier run of these settings was interrupted there")
        machine.reset_peak_memory()
        self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        peak_bytes, peak_kind = machine.peak_memory()
        folder = save_artefact(self)
        record = self._record(folder, peak_bytes, peak_kind)
        records.write(record, self.settings.run_folder)
        shutil.rmtree(state, ignore_errors=True)
        return record

    def _record(self, folder: Path, peak_bytes: int, peak_kind: str) -> records.RunRecord:
        recipe, state = self.settings.recipe, self.trainer.state
        tokens, articles = (
            round(self.encoded_tokens * recipe.num_train_epochs),
            round(len(self.data.train) * recipe.num_train_epochs),
        )
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
            parameters=load.parameter_count(self.model),
            trainable_parameters=sum(load.trainable_table(self.model).values()),
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
        UserError: The model cannot be loaded or will not fit, no token carries loss, or packed articles see each other.
    """
    recipe = settings.recipe
    set_seed(settings.experiment.seed)
    torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    tokenizer = load.load_tokenizer(settings)
    encoder = partial(encode.encode, tokenizer, max_length=recipe.max_length)
    encoded = encoder(data.train)
    attention = load.choose_attention(settings)
    precision = load.choose_precision(settings)
    checkpointing = memory.choose_checkpointing(settings, load.configuration(settings), list(map(len, encoded)))
    choices = _choices(settings, attention, precision, checkpointing)
    for name, choice in choices.items():
        print(f"{name}: {choice}")
    model = load.load_for_training(settings, checkpointing.mode)
    choices["memory"] = memory.require_room(recipe, sum(load.trainable_table(model).values()))
    backbone = load.training_backbone(model, settings)
    clock = Clock(settings)
    watch = ValidationWatch(backbone, precision, tokenizer, data.validation, encoder(data.validation), settings)
    callbacks = [clock, watch, StopOnNonFiniteLoss()]
    trainer = _trainer(settings, backbone, precision, tokenizer, encoded, checkpointing.mode, callbacks)
    if recipe.adapter:
        _hold_in_fp32(model)
    watch.trainer, watch.clock = trainer, clock
    _set_pace(trainer, settings)
    supervision = check_supervision(trainer, tokenizer)
    if recipe.packing:
        choices["isolation"] = check_isolation(backbone, precision, encoded)
    for name in ("memory", "isolation"):
        print(f"{name}: {choices.get(name, 'nothing to check: padded batches')}")
    tokens = sum(map(len, encoded))
    return Session(settings, data, model, tokenizer, trainer, backbone, attention, supervision, choices, clock, tokens)


def _trainer(
    settings: Settings,
    backbone: packing.Backbone,
    precision: Precision,
    tokenizer,
    encoded: Sequence[encode.Encoded],
    checkpointing: str,
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    recipe = settings.recipe
    arguments = {
        "model": backbone.model,
        "args": _arguments(settings, precision, checkpointing),
        "train_dataset": Dataset.from_list([row.row(recipe.completion_only_loss) for row in encoded]),
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    if not recipe.packing:
        return SFTTrainer(**arguments)
    # Where prompts carry loss or meet with dropout, each article needs its own.
    alike = recipe.completion_only_loss and recipe.lora_dropout == 0
    shared = encode.shared_length([row.prompt for row in encoded]) if alike else 0
    shapes = _fixed_shapes(recipe, encoded, shared) if use_graphs(recipe, checkpointing) else None
    collator = RowCollator(shared, shapes, _article_weight(recipe, encoded, shared))
    options = shapes is not None, recipe.label_smoothing_factor, recipe.update_in_backward
    return RowTrainer(backbone, precision, *options, data_collator=collator, **arguments)


def _hold_in_fp32(model) -> None:
    """TRL rounds a 4-bit base's adapter to bf16 (1.14, SFTTrainer.__init__), in which small updates are lost, and from
    which a resumed training departs: peft loads adapters in fp32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _article_weight(recipe: Recipe, encoded: Sequence[encode.Encoded], shared: int) -> float:
    """What an article's token weighs against an answer's, so that the two means are weighed as the recipe says."""
    answers = sum(len(row.answer) for row in encoded)
    articles = sum(len(row.prompt) - shared for row in encoded)
    return recipe.article_loss * answers / articles


def use_graphs(recipe: Recipe, checkpointing: str) -> bool:
    """CUDA graphs, where they are asked for and can be: checkpointing asks for random states as it goes."""
    return recipe.cuda_graphs and machine.has_cuda() and checkpointing == "off"


def _fixed_shapes(recipe: Recipe, encoded: Sequence[encode.Encoded], shared: int) -> FixedShapes:
    answers_alone = recipe.completion_only_loss and not recipe.article_loss
    supervised = max(len(row.answer) if answers_alone else len(row) for row in encoded)
    # Few shapes, each of which is recorded once, against little padding: an eighth of a batch, as a power of two.
    batch = recipe.per_device_train_batch_size * (sum(map(len, encoded)) / len(encoded) - shared)
    multiple = max(64, 2 ** round(math.log2(batch / 8)))
    return FixedShapes(multiple, longest=max(map(len, encoded)), supervised=supervised)


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
            cards.model_card(settings, session.data, settings.model_name), encoding="utf-8"
        )
    return folder


def _choices(
    settings: Settings, attention: load.Attention, precision: Precision, checkpointing: memory.Checkpointing
) -> dict[str, str]:
    """What was decided for the user, each with its reason."""
    recipe = settings.recipe
    weights = precision.name if recipe.dtype == "auto" else recipe.dtype
    held = "4-bit NormalFloat base" if recipe.load_in_4bit else f"{weights} weights"
    return {
        "device": machine.gpu_name() or "CPU",
        "engine": f"{settings.engine}: {settings.engine_reason}",
        "attention": f"{attention.implementation}: {attention.reason}",
        "packing": "on: a batch is one row, and what prompts share is computed once" if recipe.packing else "off",
        "gradient checkpointing": f"{checkpointing.mode}: {checkpointing.reason}",
        "precision": f"{held}, {precision}",
        "kernels": _kernels_choice(settings),
        "gradients": _gradients_choice(recipe),
        "CUDA graphs": _graphs_choice(recipe, checkpointing.mode),
    }


def _kernels_choice(settings: Settings) -> str:
    if settings.engine == "unsloth":
        return "Unsloth's"
    if load.uses_liger(settings):
        return "Liger's for norms, rotary embeddings and the MLP's activation, where it knows the model"
    return "PyTorch's: fused ones need CUDA" if settings.recipe.use_liger_kernel else "PyTorch's: asked for"


def _gradients_choice(recipe: Recipe) -> str:
    if recipe.update_in_backward:
        return "used and freed one by one in the backward pass, not clipped: asked for"
    return f"kept until the update, clipped to a norm of {recipe.max_grad_norm}"


def _graphs_choice(recipe: Recipe, checkpointing: str) -> str:
    if use_graphs(recipe, checkpointing):
        return "on: a step is recorded once per shape of its batch, then replayed"
    if not recipe.cuda_graphs:
        return "off: asked for"
    return "off: they need CUDA, and no gradient checkpointing"


def _arguments(settings: Settings, precision: Precision, checkpointing: str) -> SFTConfig:
    recipe, seed = settings.recipe, settings.experiment.seed
    # transformers 5 takes the folder of TensorBoard's logs from the environment alone.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(settings.run_folder / "tensorboard")
    arguments = SFTConfig(
        output_dir=str(_fresh_state(settings)),
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.num_train_epochs,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=0.0 if recipe.update_in_backward else recipe.max_grad_norm,
        optim=recipe.optim,
        optim_args=recipe.optim_args,
        max_length=recipe.max_length,
        # Rows are encoded, and no longer than max_length.
        dataset_kwargs={"skip_prepare_dataset": True},
        # Packing is ours (RowTrainer). Unsloth would turn its own on.
        packing=False,
        padding_free=False,
        train_sampling_strategy="random" if recipe.packing else "group_by_length",
        gradient_checkpointing=checkpointing != "off",
        bf16=precision.name == "bfloat16",
        use_cpu=not machine.has_cuda(),
        dataloader_pin_memory=machine.has_cuda(),
        seed=seed,
        data_seed=seed,
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_steps else "no",
        save_total_limit=2,
        report_to=["tensorboard"],
    )
    # Where several GPUs are visible the trainer would split each batch (DataParallel), and no row can be split.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _set_pace(trainer: SFTTrainer, settings: Settings) -> None:
    """Log about 50 times, and save after each `save_steps` of all steps."""
    recipe = settings.recipe
    updates = math.ceil(
        len(trainer.train_dataset) / (recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps)
    )
    steps = math.ceil(updates * recipe.num_train_epochs)
    trainer.args.logging_steps = max(1, round(steps / 50))
    if recipe.save_steps:
        trainer.args.save_steps = math.ceil(steps * recipe.save_steps)


def _fresh_state(settings: Settings) -> Path:
    """The folder of this run's checkpoints, emptied if they are of other settings."""
    folder = settings.state_folder
    mark = folder / "settings.json"
    if folder.is_dir() and (not mark.is_file() or json.loads(mark.read_text())["digest"] != settings.training_digest):
        print(f"Discarding the checkpoints in {folder}: they are of other settings")
        shutil.rmtree(folder)
    write_json(mark, {"digest": settings.training_digest})
    return folder


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
