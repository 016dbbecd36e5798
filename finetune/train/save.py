"""What a training leaves behind: its artefact and its record, which is read from the objects that ran."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import MISSING, asdict, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from data_prep import UserError
from finetune import cards, machine, paths, records
from finetune.config.plan import Settings
from finetune.config.recipes import ADAPTER_ONLY, Recipe
from finetune.data import PreparedData
from finetune.files import MODEL, disown, file_digests, folder_bytes, folder_digest, own, replacing_folder, short_digest
from finetune.model import load, unsloth
from finetune.model.hub import base_digest, model_path
from finetune.model.packing import Backbone
from finetune.model.template import Template
from finetune.records import RunRecord
from finetune.train.callbacks import WHOLE
from finetune.train.processes import whole_weights
from finetune.train.resolve import Resolved
from finetune.train.watched import Watched

# Arguments that are not the method's: where things go, how often they are said, and what the trainer sets itself.
HOUSEKEEPING = {
    "output_dir",
    "logging_dir",
    "logging_steps",
    "logging_nan_inf_filter",
    "report_to",
    "save_strategy",
    "save_total_limit",
    "use_cpu",
    "dataloader_pin_memory",
    "dataset_kwargs",
    "padding_free",
    "train_sampling_strategy",
    "eval_strategy",
    "per_device_eval_batch_size",
    "ddp_find_unused_parameters",
    "ddp_broadcast_buffers",
    "bf16",
    "data_seed",
    "disable_tqdm",
    "run_name",
    "project",
    # What is filled in where nothing was set.
    "do_eval",
    "debug",
    "accelerator_config",
    "loss_type",
    "hub_token",
    "push_to_hub_token",
    "eos_token",
    "pad_token",
    # Unsloth's own defaults for arguments that say nothing of the method.
    "bf16_full_eval",
    "torch_empty_cache_steps",
    "eval_accumulation_steps",
    "dataset_num_proc",
    "max_seq_length",
}


def observed(trainer: Watched) -> dict[str, Any]:
    """How a model is trained, read from the trainer, its arguments and the adapter; not from the plan.

    Returns:
        The recipe's fields by name; `seed`; and what a notebook's cell adds: `callbacks`, `other_arguments`.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    adapters = getattr(model, "peft_config", None) or {}
    known = {field.name for field in fields(Recipe)}
    given = {name: _plain(value) for name, value in args.to_dict().items()}
    found = {name: value for name, value in given.items() if name in known}
    four_bit = load.compute_dtype_of_4bit(model)
    held = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad or not adapters}
    found |= {
        "adapter": bool(adapters),
        "engine": "unsloth" if unsloth.has_loaded(model) else "transformers",
        "load_in_4bit": four_bit is not None,
        "use_liger_kernel": load.has_liger(model),
        "gradient_checkpointing": _checkpointing(args.gradient_checkpointing, model),
        "per_device_train_batch_size": trainer.update[0],
        "gradient_accumulation_steps": trainer.update[1],
        "packing": trainer.packed and isinstance(trainer.backbone, Backbone),
        "completion_only_loss": args.completion_only_loss is not False,
        "article_loss": trainer.article_loss,
        "cuda_graphs": trainer.cuda_graphs,
        "update_in_backward": trainer.update_in_backward,
        "dtype": str(load.compute_dtype_of_4bit(model) or max(held, key=lambda dtype: dtype.itemsize)).removeprefix(
            "torch."
        ),
        "save_steps": found["save_steps"] if given["save_strategy"] == "steps" else 0.0,
        "seed": args.seed,
        "early_stopping_patience": trainer.early_stopping_patience,
        "callbacks": [type(callback).__name__ for callback in trainer.added_callbacks],
    }
    other = {name: value for name, value in given.items() if name not in known | HOUSEKEEPING | {"seed"}}
    # Not from an SFTConfig of our own: making one forgets the devices that the trainer was set up with.
    usual = {field.name: _plain(field.default) for field in fields(args) if field.default is not MISSING}
    found["other_arguments"] = {name: value for name, value in other.items() if value != usual.get(name, value)}
    for config in adapters.values():
        values = {name: _plain(value) for name, value in config.to_dict().items()}
        names = {path.rpartition(".")[2] for path in config.target_modules}
        linear = load.linear_names(model.get_base_model())
        found |= {name: values[name] for name in ADAPTER_ONLY}
        # PEFT replaces `all-linear` by the path of every layer.
        found["target_modules"] = "all-linear" if names == linear else sorted(names)
        usual = {name: _plain(value) for name, value in type(config)().to_dict().items()}
        ours = ADAPTER_ONLY | {"inference_mode", "base_model_name_or_path", "auto_mapping"}
        if config.task_type == "SEQ_CLS":
            # The order of a head's labels is in no file of its adapter. PEFT adds both names of heads itself.
            found["labels"] = [label for _, label in sorted(model.config.id2label.items())]
            ours |= {"modules_to_save"} if set(config.modules_to_save) <= {"score", "classifier"} else set()
        different = {f"LoraConfig.{name}": value for name, value in values.items() if value != usual[name]}
        found["other_arguments"] |= {
            name: value for name, value in different.items() if name.partition(".")[2] not in ours
        }
    optimizer = (trainer.added.get("optimizers") or (None,))[0]
    if optimizer is not None:
        found["optim"] = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    return found


def newest_checkpoint(trainer: Watched) -> str | None:
    """The checkpoint to resume from: the newest whole one of the same training. All that are newer, or of another
    training, are removed.

    Returns:
        Its folder, for `trainer.train(resume_from_checkpoint=...)`; None to begin anew.

    Raises:
        UserError: Another process trains there; or a file of the base model was changed or damaged since.
    """
    folder = Path(trainer.args.output_dir)
    if machine.rank() == 0:
        own(folder)
    rows = hashlib.sha256(json.dumps(trainer.train_dataset.to_list()).encode()).hexdigest()
    configuration = trainer.model.config
    # What is trained, and on which base: an adapter's checkpoint is nothing on other weights.
    asked, base = short_digest([configuration.to_dict(), observed(trainer)]), base_digest(configuration, MODEL)
    trainer.clock.training = f"{asked} {short_digest(rows)} {base}"
    # One process decides, and removes.
    found = [_newest_whole(folder, trainer.clock.training) if machine.rank() == 0 else None]
    return broadcast_object_list(found)[0] if machine.processes() > 1 else found[0]


def _newest_whole(folder: Path, training: str) -> str | None:
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in numbered:
        fault = checkpoint_fault(checkpoint, training)
        if fault is None:
            print(f"Resuming from {checkpoint.name}: an earlier run of this training was interrupted there")
            return str(checkpoint)
        print(f"Discarding {checkpoint}: {fault}")
        shutil.rmtree(checkpoint)
    return None


def checkpoint_fault(checkpoint: Path, training: str) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it can be.

    Raises:
        UserError: It is of this training, and a file of the base model is another by now.
    """
    try:
        mark = json.loads((checkpoint / WHOLE).read_bytes())
        of, files = mark["training"], mark["files"]
    except FileNotFoundError:
        return "it was cut short while it was written"
    except (ValueError, KeyError, TypeError):
        return f"{WHOLE} is damaged"
    if of.partition(" ")[0] == training.partition(" ")[0] and of.split()[-1] != training.split()[-1]:
        raise UserError(
            f"{checkpoint} was trained on other files of the base model, which were changed or damaged since: put them "
            f"back, or delete {checkpoint.parent} to begin anew"
        )
    if of != training:
        return "it is of another training"
    found = file_digests(checkpoint)
    damaged = [name for name, digest in files.items() if found.get(name) != digest]
    return f"{', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} damaged or missing" if damaged else None


def save_run(settings: Settings, data: PreparedData, resolved: Resolved, trainer: Watched) -> RunRecord:
    """Save weights (or adapter), tokenizer and model card, and write the run's record. Of several processes the first
    one does, and the others end.

    The artefact's folder appears whole or not at all; then the trainer's checkpoints go.

    Args:
        settings: Names the folders.
        data: What the trainer was given.
        resolved: Says why the machine's choices were made.
        trainer: After `train()`.

    Raises:
        UserError: The training was interrupted.
    """
    if trainer.signals.received:
        raise UserError("the training was interrupted before its end: run the cell that trains again, then save")
    model = trainer.accelerator.unwrap_model(trainer.model)
    ran = observed(trainer)
    parameters, trainable = load.parameter_count(model), sum(load.trainable_counts(model).values())
    # What nothing that ran can tell (cudnn_benchmark, offload_embedding) is as it was planned.
    values = asdict(settings.experiment) | asdict(settings.recipe) | ran
    base = model.config.name_or_path
    if base != model_path(settings.experiment.model):
        values["model"] = base
    articles = round(len(trainer.train_dataset) * trainer.state.epoch)
    tokens = round(trainer.encoded_tokens * trainer.state.epoch)
    record = RunRecord(
        run=settings.run,
        profile=settings.place,
        engine=ran["engine"],
        model=settings.experiment.model_name if values["model"] == settings.experiment.model else base,
        seed=ran["seed"],
        settings=values,
        settings_digest=short_digest(values),
        data=data.reference.model_copy(update={"train_rows": len(trainer.train_dataset)}),
    )

    folder = paths.artefact_folder(settings.place, settings.run, ran["adapter"], settings.experiment.variant)
    if not ran["adapter"]:
        # The fp32 copy served the optimiser; bf16 is the precision that the model is used in, and half the size.
        model.to(torch.bfloat16)
    weights = whole_weights(model, machine.rank() == 0) if trainer.is_fsdp_enabled else None
    if machine.rank():
        raise SystemExit
    with replacing_folder(folder) as beside:
        model.save_pretrained(beside, state_dict=weights)
        trainer.processing_class.save_pretrained(beside)
        (beside / "README.md").write_text(cards.model_card(record, data), encoding="utf-8")

    choices = resolved.reasons | trainer.checks
    if not ran["packing"]:
        # Found when the model was there, or set in a cell, after the choices were made.
        why = "the model cannot read packed rows" if trainer.packed else "packing=False"
        choices |= {name: f"off: {why}" for name in ("packing", "CUDA graphs") if choices[name].startswith("on")}
        choices["attention"] = f"{model.config._attn_implementation}: padded batches"
    if trainer.portions.note:
        choices["memory"] += f"; {trainer.portions.note}"
    clock = trainer.clock
    training = records.Training(
        environment=records.environment(),
        settings_digest=record.settings_digest,
        rendered_prompt=Template(trainer.processing_class).shown(data.form),
        seconds=clock.seconds,
        steps=trainer.state.global_step,
        articles=articles,
        tokens=tokens,
        articles_per_second=articles / clock.seconds,
        tokens_per_second=tokens / clock.seconds,
        peak_memory_bytes=clock.peak_memory[0],
        peak_memory_kind=clock.peak_memory[1],
        processes=machine.processes(),
        strategy=machine.strategy(),
        hosts=clock.hosts,
        device_peak_bytes=clock.peaks,
        energy_joules=clock.energy.joules,
        parameters=parameters,
        trainable_parameters=trainable,
        supervised_tokens_of_first_rows=trainer.supervision.labelled_tokens,
        attention=choices["attention"].partition(":")[0],
        choices=choices,
        artefact=str(folder.relative_to(paths.home())),
        artefact_bytes=folder_bytes(folder),
        artefact_digest=folder_digest(folder),
        base_digest=base_digest(model.config),
        base_revision=model.config._commit_hash or "",
        history=_history(trainer.state.log_history),
    )
    record = record.model_copy(update={"training": training})
    records.write(record, settings.run_folder)
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    disown(Path(trainer.args.output_dir))
    return record


def _checkpointing(is_on: bool, model: torch.nn.Module) -> str:
    if not is_on:
        return "off"
    return "unsloth" if unsloth.checkpointing(model) == "unsloth" else "plain"


def _plain(value: Any) -> Any:
    """What JSON holds of an argument: an enumeration's value, a set in order."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


def _history(log: list[dict[str, float]]) -> list[records.LogPoint]:
    """What the trainer logged, merged into one point a step."""
    names = {"eval_accuracy": "validation_accuracy", "eval_log_loss": "validation_log_loss"}
    points: dict[int, dict[str, float]] = {}
    for entry in log:
        renamed = {names.get(key, key): value for key, value in entry.items()}
        known = {key: value for key, value in renamed.items() if key in records.LogPoint.model_fields}
        points.setdefault(entry["step"], {}).update(known)
    return [
        records.LogPoint(**point)
        for _, point in sorted(points.items())
        if {"loss", "validation_accuracy"} & point.keys()
    ]
