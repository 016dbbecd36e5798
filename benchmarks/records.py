"""Records of speed: what `python -m benchmarks.throughput` wrote, read and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_prep import DataError
from finetune.config.methods import METHODS
from finetune.config.recipes import Recipe

# What every training has.
FIGURES = [
    "parameters",
    "articles_per_second",
    "tokens_per_second",
    "computed_per_second",
    "tflops",
    "matrix_peak_tflops",
    "share_of_peak",
    "peak_gib",
]
NUMBERS = [*FIGURES, "seconds_to_first_step"]
COLUMNS = ["key", "name", "run", "overrides", "outcome", *NUMBERS]


@dataclass(frozen=True)
class SpeedRecord:
    """A file of measurements, all made on one machine.

    Attributes:
        path: The file.
        environment: Commit, command, packages and hardware.
        data: Title and fingerprint of the articles.
        model: What was trained, in words.
        rows: One line a measurement, by its key in benchmarks/ladder.py. `failure` says why a line has no figures.
            `tokens_per_second` counts the articles' own tokens, `computed_per_second` those that were computed: a
            beginning that rows share is computed once. `seconds` are those of a micro-batch. `recipe` is a training's.
    """

    path: Path
    environment: dict[str, Any]
    data: dict[str, Any]
    model: str
    rows: pd.DataFrame

    @property
    def gpu(self) -> str:
        return str(self.environment["hardware"]["gpu"])

    @property
    def is_repeatable(self) -> bool:
        """Whether it was measured on a commit without changes."""
        return bool(self.environment["commit"]) and not self.environment["dirty"]

    def measured(self, *keys: str) -> list[pd.Series]:
        """The rows of these keys that have figures, in the order of the keys."""
        return [row for _, row in self.rows.reindex(keys).dropna(subset="articles_per_second").iterrows()]

    def lacking(self, *keys: str) -> str:
        """Which of these keys have no figures, and why; empty if all have."""
        rows = self.rows.reindex(keys)
        failures = rows.failure.fillna("not measured")[rows.articles_per_second.isna()]
        return "; ".join(f"`{key}`: {failure}" for key, failure in failures.items())


def read(path: Path) -> SpeedRecord:
    """The measurements in a file.

    Raises:
        DataError: The file is missing, is no record of speed, or contradicts itself.
    """
    try:
        content = json.loads(path.read_bytes())
        rows = pd.DataFrame(content["results"]).reindex(columns=COLUMNS).rename(columns={"name": "setting"})
        rows = rows.set_index("key", verify_integrity=True).astype(dict.fromkeys(NUMBERS, float))
        rows["recipe"] = [recipe_of(row.run, row.overrides) if pd.notna(row.run) else None for row in rows.itertuples()]
        record = SpeedRecord(path, content["environment"], content["data"], content["model"], rows)
    except FileNotFoundError as error:
        command = f"python -m benchmarks.throughput CSV_FOLDER --out {path}"
        raise DataError(path, f"no such file; measure it on a GPU first ({command})") from error
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).replace("\n", " ")
        raise DataError(path, f"no measurements of this version ({reason}); measure again") from error

    has_figures = rows.articles_per_second.notna() | rows.seconds_to_first_step.notna()
    faults = {
        "needs figures or an outcome, and not both": has_figures == rows.outcome.notna(),
        "lacks a figure": rows.run.notna() & rows[FIGURES].isna().any(axis=1),
        "has a figure that is not above 0": (rows[NUMBERS] <= 0).any(axis=1),
        "has a share_of_peak above 1": rows.share_of_peak > 1,
    }
    for fault, found in faults.items():
        if found.any():
            raise DataError(path, f"{rows.index[np.argmax(found)]} {fault}; measure again")

    kinds = [str(outcome).split(":")[0].strip() if pd.notna(outcome) else None for outcome in rows.outcome]
    words = {None: None, "OutOfMemoryError": "out of memory"}
    rows["failure"] = [words.get(kind, f"failed ({kind})") for kind in kinds]
    rows["computed_per_article"] = rows.computed_per_second / rows.articles_per_second
    batches = [recipe.per_device_train_batch_size if recipe else np.nan for recipe in rows.recipe]
    rows["seconds"] = batches / rows.articles_per_second
    return record


def recipe_of(run: str, values: dict[str, Any]) -> Recipe:
    """A run's recipe with those of `values` that belong to a recipe.

    Raises:
        KeyError, ValidationError: There is no such run, or a recipe cannot have one of the values.
    """
    names = {field.name for field in fields(Recipe)}
    return replace(METHODS[run].recipe, **{name: value for name, value in values.items() if name in names})
