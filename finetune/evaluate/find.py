"""Which model an evaluation judges: the base model, or the artefact that lies there, as its record describes it.

A model is compared with its record twice: on the disk before it is loaded, and in memory before it is judged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from data_prep import UserError
from finetune import machine, paths, records
from finetune.config.methods import METHODS
from finetune.config.plan import EVALUATION_ONLY, NAMING, TASK, Experiment, left_aligned, plan
from finetune.files import folder_digest
from finetune.model import load
from finetune.model.hub import base_digest, model_path
from finetune.records import RunRecord, Training
from finetune.wording import duration


@dataclass(frozen=True)
class Found:
    """A model to evaluate.

    Attributes:
        run: The method's name in METHODS.
        place: The name of the folders that hold it: its profile, with task and model where these are not its own.
        experiment: Model, data and prompt as in its training; rows and batches of the evaluation as planned now.
        folder: Where its record is.
        record: Its record; None for the base model.
        artefact: The folder of weights or adapter; None for the base model.
    """

    run: str
    place: str
    experiment: Experiment
    folder: Path
    record: RunRecord | None = None
    artefact: Path | None = None

    @property
    def training(self) -> Training | None:
        return self.record.training if self.record else None

    @property
    def trained(self) -> dict[str, Any]:
        """How it was trained: every setting by name; empty for the base model."""
        return self.record.settings if self.record else {}

    @property
    def load_in_4bit(self) -> bool:
        """Whether the base that its adapter was trained on is in 4 bits: on another base it is another model."""
        return self.trained.get("load_in_4bit", False)

    def table(self) -> pd.DataFrame:
        """What it is, a line a fact."""
        facts = {"method": METHODS[self.run].title, "model": self.experiment.model_name}
        if self.record:
            training = self.record.training
            facts |= {
                "artefact": f"{self.artefact} ({training.artefact_bytes / 1e6:,.1f} MB)",
                "trained on": f"{self.record.data.train_rows:,} rows of {self.record.data.title}",
                "trained": f"{training.environment.created[:10]} in {duration(training.seconds)}, "
                f"{training.environment.machine}",
                "of commit": training.environment.short_commit,
                "learning rate, epochs, seed": f"{self.trained['learning_rate']:g}, "
                f"{self.trained['num_train_epochs']:g}, {self.record.seed}",
            }
            if self.trained.get("adapter"):
                facts["rank, alpha, modules"] = (
                    f"{self.trained['r']}, {self.trained['lora_alpha']}, {self.trained['target_modules']}"
                )
        return pd.DataFrame({"": facts})

    def _repr_html_(self) -> str:
        return left_aligned(self.table()).to_html()


def find_run(run: str, profile: str = "auto", overrides: Mapping[str, Any] | None = None, task: str = TASK) -> Found:
    """The model that a training left, or the base model.

    Args:
        run: The method's name.
        profile: As in the training.
        overrides: Parameters of the evaluation (`generation_rows`, `test_rows`, ...), and what names the training:
            `model`, `variant`; for the base model also those of the data.
        task: As in the training.

    Raises:
        UserError: There is none yet, it is not the one that its record describes, or an override is not the
            evaluation's.
    """
    settings = plan(run, profile, overrides, task)
    if settings.recipe is None:
        return Found(run, settings.place, settings.experiment, settings.run_folder)
    notebook = f"{METHODS[run].notebook}.ipynb"
    if other := sorted(set(overrides or {}) - EVALUATION_ONLY - NAMING):
        raise UserError(
            f"{', '.join(other)}: not a parameter of an evaluation, which takes the model as it lies there; "
            f"set it in {notebook} and train"
        )
    folder = settings.run_folder
    if not (folder / records.RECORD).is_file():
        raise UserError(f"there is no {run} model of {settings.place} yet: run {notebook} first")
    record = records.read(folder)
    of_training = {field.name for field in fields(Experiment)} - EVALUATION_ONLY
    known = {name: value for name, value in record.settings.items() if name in of_training}
    artefact = paths.home() / record.training.artefact
    found = Found(run, settings.place, replace(settings.experiment, **known), folder, record, artefact)
    check_artefact(found)
    return found


def check_artefact(found: Found) -> None:
    """Refuse an artefact that is not the one that its training left.

    Raises:
        UserError: It is gone, or a file of it was changed, added or removed.
    """
    again = f"run {METHODS[found.run].notebook}.ipynb again"
    if not found.artefact.is_dir():
        raise UserError(f"{found.artefact} is gone: {again}")
    if folder_digest(found.artefact) != found.training.artefact_digest:
        raise UserError(f"{found.artefact} is not the one that {found.folder / records.RECORD} describes: {again}")


@torch.no_grad()
def check_loaded(found: Found, model, ids: Sequence[int]) -> None:
    """Refuse a model in memory that is not the one found, before it is judged under its name.

    Args:
        found: What will be recorded.
        model: What was loaded, with its adapter if it has one.
        ids: Token ids of a row that it will read.

    Raises:
        UserError: It was loaded from another place, the artefact was changed meanwhile, its adapter's base was changed
            since the training, or its adapter is not in the model, not as it was trained, or changes nothing.
    """
    is_adapter = found.trained.get("adapter", False)
    place = found.artefact if found.artefact and not is_adapter else model_path(found.experiment.model)
    if os.path.realpath(model.config.name_or_path) != os.path.realpath(place):
        raise UserError(f"the weights are from {model.config.name_or_path}, and not from {place}: load them from there")
    if found.artefact:
        check_artefact(found)
    if not is_adapter:
        return
    if found.training.base_digest not in ("", base_digest(model.config)):
        raise UserError(
            f"{place} holds other weights than those that the {found.run} adapter was trained on: put these back, or "
            f"run {METHODS[found.run].notebook}.ipynb again"
        )
    saved = load_file(found.artefact / "adapter_model.safetensors")
    own = get_peft_model_state_dict(model, save_embedding_layers=False) if isinstance(model, PeftModel) else {}
    adapter = {name: tensor.float() for name, tensor in saved.items() if ".lora_" in name or ".score." in name}
    lacking = [
        name
        for name, tensor in adapter.items()
        # Rounded to bf16, it is still the same.
        if name not in own or not torch.allclose(own[name].float().cpu(), tensor, rtol=0.01)
    ]
    if lacking:
        raise UserError(
            f"the adapter in {found.artefact} was not applied: the model lacks {len(lacking)} of its {len(adapter)} "
            f"matrices, such as {lacking[0]}; load it by PeftModel.from_pretrained(model, found.artefact)"
        )
    as_saved, as_loaded = LoraConfig.from_pretrained(found.artefact), model.peft_config["default"]
    scales = ("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")
    if model.active_adapters != ["default"] or any(getattr(as_saved, of) != getattr(as_loaded, of) for of in scales):
        raise UserError(
            f"the adapter in {found.artefact} was not applied as it was trained: another one is active, or its scale "
            "was changed; load it by PeftModel.from_pretrained(model, found.artefact)"
        )
    row = torch.tensor([list(ids)], device=model.device)
    tuned = model(input_ids=row).logits
    with model.disable_adapter():
        if torch.equal(model(input_ids=row).logits, tuned):
            raise UserError(
                f"the adapter in {found.artefact} changes nothing: the model's output is the base model's; "
                "train longer, or with a larger learning_rate"
            )


def values_of(found: Found) -> dict[str, Any]:
    """Every setting of a model and of its evaluation, for the record."""
    return found.trained | asdict(found.experiment)


def loading(found: Found) -> dict[str, Any]:
    """What `load_model` takes besides the method's own arguments: types by the machine, and fused kernels on a GPU."""
    precision = load.choose_precision(found.experiment, found.trained.get("dtype"))
    fused = found.experiment.evaluation_kernels == "fused" and machine.has_cuda()
    return {"dtype": precision.name, "compute_dtype": precision.name, "use_liger_kernel": fused}
