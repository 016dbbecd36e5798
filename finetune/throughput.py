"""What `python -m benchmarks.throughput` measured, as the README's tables need it: read, checked, found by key.

The form of the file lies here and not beside the benchmark, because this package makes the README, and benchmarks
import it, never the other way round.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep import DataError
from finetune.records import DataReference, Environment

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

TRAINING_FIGURES = (
    "parameters",
    "articles_per_second",
    "tokens_per_second",
    "computed_per_second",
    "tflops",
    "matrix_peak_tflops",
    "share_of_peak",
    "peak_gib",
)


class Row(BaseModel):
    """One measurement, or what went wrong instead (`outcome`).

    `computed_per_second`: tokens that were computed; `tokens_per_second`: the articles' own. A row may hold more than
    is read here, the kernels of a profile for one.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    part: str
    key: Annotated[str, Field(pattern="^[a-z0-9_]+$")]
    name: str
    run: Literal["full", "full_unsloth", "lora", "qlora"] | None = None
    overrides: dict[str, Any] = {}
    outcome: str | None = None
    parameters: int | None = None
    articles_per_second: Positive | None = None
    tokens_per_second: Positive | None = None
    computed_per_second: Positive | None = None
    tflops: Positive | None = None
    matrix_peak_tflops: Positive | None = None
    share_of_peak: Annotated[float, Field(gt=0, le=1)] | None = None
    peak_gib: Positive | None = None
    seconds_to_first_step: Positive | None = None

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> Row:
        has_figures = self.articles_per_second is not None or self.seconds_to_first_step is not None
        if has_figures == (self.outcome is not None):
            raise ValueError(f"{self.key} needs figures or an outcome, and not both")
        return self

    @model_validator(mode="after")
    def _a_training_has_all_figures(self) -> Row:
        missing = [name for name in TRAINING_FIGURES if getattr(self, name) is None]
        if self.run and not self.outcome and missing:
            raise ValueError(f"{self.key} lacks {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _shares_are_of_the_peak(self) -> Row:
        if None not in (self.share_of_peak, self.tflops, self.matrix_peak_tflops) and not math.isclose(
            self.share_of_peak, self.tflops / self.matrix_peak_tflops, rel_tol=1e-6
        ):
            raise ValueError(f"{self.key}: share_of_peak is not tflops / matrix_peak_tflops")
        return self

    @property
    def failure(self) -> str:
        """What went wrong, in two or three words; the file has the rest."""
        kind = self.outcome.split(":")[0].strip()
        return "out of memory" if kind == "OutOfMemoryError" else f"failed ({kind})"

    @property
    def computed_per_article(self) -> float:
        """Tokens computed for an article, its part of what a batch shares included."""
        return self.computed_per_second / self.articles_per_second


class Throughput(BaseModel):
    """A file of measurements, all of them made on one machine in one run."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    environment: Environment
    data: DataReference
    model: str
    results: tuple[Row, ...]

    @model_validator(mode="after")
    def _keys_are_unique(self) -> Throughput:
        keys = [row.key for row in self.results]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"two rows have the key {key}")
        return self

    def row(self, key: str) -> Row | None:
        """The row of a key, failed or not; None if the file has none."""
        return next((row for row in self.results if row.key == key), None)

    def measured(self, key: str) -> Row | None:
        """The row of a key; None if the file has none, or if it failed."""
        row = self.row(key)
        return row if row and row.outcome is None else None

    def lacking(self, key: str) -> str:
        """Why there are no figures of a key, in words."""
        row = self.row(key)
        return row.failure if row else "not measured"

    def first_measured(self, keys: tuple[str, ...]) -> Row | None:
        """The first of these rows that was measured."""
        return next(filter(None, map(self.measured, keys)), None)


def read(path: Path) -> Throughput:
    """The measurements in a file.

    Raises:
        DataError: It is missing, or does not match the schema.
    """
    try:
        return Throughput.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            path, f"no such file; measure it on a GPU first (python -m benchmarks.throughput CSV_FOLDER --out {path})"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise DataError(path, f"not measurements of this version ({where}: {first['msg']}); measure again") from error


def read_published(path: Path) -> Throughput:
    """The measurements in a file that is to be published.

    Raises:
        DataError: As `read`; or nobody could repeat them, because the tree had uncommitted changes.
    """
    found = read(path)
    if found.environment.dirty or found.environment.commit is None:
        raise DataError(path, "was measured on a tree with uncommitted changes: commit, then measure again")
    return found
