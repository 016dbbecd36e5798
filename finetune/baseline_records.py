"""One typed record per baseline: `results/<profile>/baselines/<name>/record.json`, and its predictions beside it.

The SVM on fewer rows, for the learning curve: `svm/rows-250/record.json`. `finetune.evaluate.baselines` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from finetune.config.methods import BASELINES
from finetune.metrics import Metrics
from finetune.predictions import Prediction
from finetune.records import RECORD, DataReference, Environment, Part, parsed, read_scored

Name = Literal["majority", "svm", "encoder", "logistic", "few_shot"]


class Baseline(Part):
    """One baseline on the test rows. `model` is None where no language model is asked.

    `fit_seconds` and `validation_accuracy` are None where nothing is fitted.
    """

    schema_version: Literal[1] = 1
    name: Name
    description: str
    model: str | None
    data: DataReference
    environment: Environment
    fit_seconds: float | None
    validation_accuracy: float | None
    scoring: Metrics
    without_duplicates: Metrics | None
    predictions_digest: str


def read_all(folder: Path) -> tuple[dict[str, Baseline], dict[str, list[Prediction]]]:
    """The baselines in a results folder, those that are there, and their predictions.

    Raises:
        DataError: One is not a baseline's record, or its predictions are not its own.
    """
    return _read_those(folder, BASELINES)


def read_svm_curve(folder: Path) -> tuple[dict[str, Baseline], dict[str, list[Prediction]]]:
    """The same of the SVMs on fewer training rows, by their places (`svm/rows-250`), the fewest rows first."""
    places = (baselines_folder(folder) / "svm").glob("rows-*")
    found, rows = _read_those(folder, [f"svm/{place.name}" for place in places])
    return dict(sorted(found.items(), key=lambda item: item[1].data.train_rows)), rows


def _read_those(folder: Path, names: Sequence[str]) -> tuple[dict[str, Baseline], dict[str, list[Prediction]]]:
    found = {name: baselines_folder(folder) / name for name in names}
    there = {name: path for name, path in found.items() if (path / RECORD).is_file()}
    recorded = {name: read(path / RECORD) for name, path in there.items()}
    return recorded, {name: read_scored(name, recorded[name], there[name]) for name in there}


def baselines_folder(results: Path) -> Path:
    return results / "baselines"


def read(path: Path) -> Baseline:
    """A baseline's record.

    Raises:
        DataError: It does not match the schema.
    """
    return parsed(Baseline, path, "delete it")
