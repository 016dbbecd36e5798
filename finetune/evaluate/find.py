"""Which model an evaluation judges: the base model, or the artefact that lies there, as its record describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep import UserError
from finetune import machine, paths, records
from finetune.config.methods import METHODS
from finetune.config.plan import EVALUATION_ONLY, Experiment, plan
from finetune.files import folder_digest
from finetune.model import load
from finetune.records import RunRecord, Training
from finetune.wording import duration


@dataclass(frozen=True)
class Found:
    """A model to evaluate.

    Attributes:
        run: The method's name in METHODS.
        profile: The profile whose folders hold it.
        experiment: Model, data and prompt as in its training; rows and batches of the evaluation as planned now.
        folder: Where its record is.
        record: Its record; None for the base model.
        artefact: The folder of weights or adapter; None for the base model.
    """

    run: str
    profile: str
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
        return self.table().style.set_properties(**{"text-align": "left"}).to_html()


def find_run(run: str, profile: str = "auto", overrides: Mapping[str, Any] | None = None) -> Found:
    """The model that a training left, or the base model.

    Args:
        run: The method's name.
        profile: As in the training.
        overrides: Parameters of the evaluation (`generation_rows`, `test_rows`, ...), and `variant`; for the base
            model also those of model and data.

    Raises:
        UserError: There is none yet, it is not the one that its record describes, or an override is not the
            evaluation's.
    """
    settings = plan(run, profile, overrides)
    if settings.recipe is None:
        return Found(run, settings.profile, settings.experiment, settings.run_folder)
    notebook = f"{METHODS[run].notebook}.ipynb"
    if other := sorted(set(overrides or {}) - EVALUATION_ONLY - {"variant"}):
        raise UserError(
            f"{', '.join(other)}: not a parameter of an evaluation, which takes the model as it lies there; "
            f"set it in {notebook} and train"
        )
    folder = settings.run_folder
    if not (folder / records.RECORD).is_file():
        raise UserError(f"there is no {run} model of profile {settings.profile} yet: run {notebook} first")
    record = records.read(folder)
    artefact = paths.home() / record.training.artefact
    if not artefact.is_dir():
        raise UserError(f"{artefact} is gone: run {notebook} again")
    if folder_digest(artefact) != record.training.artefact_digest:
        raise UserError(f"{artefact} is not the one that {folder / records.RECORD} describes: run {notebook} again")
    of_training = {field.name for field in fields(Experiment)} - EVALUATION_ONLY
    known = {name: value for name, value in record.settings.items() if name in of_training}
    return Found(run, settings.profile, replace(settings.experiment, **known), folder, record, artefact)


def values_of(found: Found) -> dict[str, Any]:
    """Every setting of a model and of its evaluation, for the record."""
    return found.trained | asdict(found.experiment)


def loading(found: Found) -> dict[str, Any]:
    """What `load_model` takes besides the method's own arguments: types by the machine, and fused kernels on a GPU."""
    precision = load.choose_precision(found.experiment, found.trained.get("dtype"))
    fused = found.experiment.evaluation_kernels == "fused" and machine.has_cuda()
    return {"dtype": precision.name, "compute_dtype": precision.name, "use_liger_kernel": fused}
