"""Variants of a run: trained with other seeds (`<run>/seed-43/`) or on fewer rows (`<run>/rows-250/`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep import DataError
from finetune import records
from finetune.records import Prediction, RunRecord

# What a variant may differ in from its run, besides how it is evaluated.
VARIED = {"seed": {"seed", "variant"}, "rows": {"train_rows", "variant"}}
HARMLESS = {"evaluation_batch_size", "generation_rows"}


@dataclass(frozen=True)
class Variant:
    """A variant's record, and whether it is right on each test row, shape (rows,)."""

    record: RunRecord
    right: np.ndarray


def read(folder: Path, main: RunRecord, rows: Sequence[Prediction], kind: Literal["seed", "rows"]) -> list[Variant]:
    """The evaluated variants in a run's folder, by seed or by number of rows, the run itself not among them.

    Args:
        folder: The run's.
        main: The run's record.
        rows: The run's predictions of the test rows.
        kind: What the variants vary.

    Raises:
        DataError: One differs from its run in more than its kind says, was made on other data, or judged on other rows.
    """
    found = []
    for path in sorted(folder.glob(f"{kind}-*/{records.RECORD}")):
        record = records.read(path.parent)
        if record.evaluation:
            _require_same_but(record, main, VARIED[kind] | HARMLESS, path)
            predictions = records.read_predictions(record, path.parent)
            if [row.id for row in predictions] != [row.id for row in rows]:
                raise DataError(path, f"was evaluated on other test rows than {main.run}")
            found.append(Variant(record, outcomes(predictions)))
    return sorted(found, key=lambda variant: (variant.record.data.train_rows, variant.record.seed))


def outcomes(predictions: Sequence[Prediction]) -> np.ndarray:
    """Whether each row's prediction is right, shape (rows,)."""
    return np.array([row.prediction == row.label for row in predictions])


def _require_same_but(record: RunRecord, main: RunRecord, varied: set[str], path: Path) -> None:
    mine = record.settings | {"model": record.model, "engine": record.engine, "data": record.data.fingerprint}
    theirs = main.settings | {"model": main.model, "engine": main.engine, "data": main.data.fingerprint}
    for name in sorted((mine.keys() | theirs.keys()) - varied):
        if mine.get(name) != theirs.get(name):
            raise DataError(path, f"{name} is {mine.get(name)}, and {theirs.get(name)} in the record of {main.run}")
