"""What accuracy costs: the trainings' costs, who reaches an accuracy first, and what more rows buy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from finetune.records import RunRecord, Training
from finetune.wording import NAMES

if TYPE_CHECKING:
    from finetune.comparison import Comparison

TARGETS = (0.90, 0.92, 0.93, 0.94)


def table(record: RunRecord) -> pd.DataFrame:
    """What one training cost, as a table of one row; `-` where it was not measured."""
    training = record.training
    energy = training.energy_joules
    return pd.DataFrame(
        {
            "training": _time(training.seconds),
            "articles/s": training.articles_per_second,
            "real tokens/s": training.tokens_per_second,
            "peak memory GB": training.peak_memory_bytes / 1e9,
            "energy kJ": "-" if energy is None else f"{energy / 1000:.1f}",
            "trained parameters": training.trainable_parameters,
            "share of parameters %": 100 * training.trainable_parameters / training.parameters,
            "artefact MB": training.artefact_bytes / 1e6,
            "engine": record.engine,
        },
        index=[NAMES[record.run]],
    )


def costs(training: Training) -> dict[str, float | None]:
    """The costs that accuracy is held against, by axis title; None where one was not measured."""
    return {
        "training time (minutes)": training.seconds / 60,
        "peak memory (GB)": training.peak_memory_bytes / 1e9,
        "energy (kJ)": None if training.energy_joules is None else training.energy_joules / 1000,
        "artefact (MB)": training.artefact_bytes / 1e6,
        "trained parameters (millions)": training.trainable_parameters / 1e6,
    }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, accuracy) that none beats in one without losing in the other, the cheapest first."""
    front = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def seconds_to(training: Training, target: float) -> float | None:
    """Seconds of training until a validation first showed this accuracy; None if none did, or was not timed."""
    reached = [
        point.training_seconds
        for point in training.history
        if point.validation_accuracy is not None and point.validation_accuracy >= target
    ]
    return reached[0] if reached else None


def time_to_accuracy(comparison: Comparison) -> pd.DataFrame:
    """Training time until each target was first seen on the validation rows, a column a target."""
    trainings = {NAMES[run]: record.training for run, record in comparison.tuned().items()}
    timed = {name: training for name, training in trainings.items() if _is_timed(training)}
    rows = {name: {_title(target): _cell(training, target) for target in TARGETS} for name, training in timed.items()}
    svm = comparison.baselines.get("svm")
    if svm:
        rows[NAMES["svm"]] = {
            _title(target): _reached(
                svm.fit_seconds if svm.validation_accuracy >= target else None, svm.validation_accuracy
            )
            for target in TARGETS
        }
    return pd.DataFrame(rows).T if timed else pd.DataFrame()


def curve_table(comparison: Comparison) -> pd.DataFrame:
    """Accuracy in percent with its interval, and training time: a line a number of training rows, a column a run."""
    columns = {
        NAMES[run]: {
            record.data.train_rows: _point(record)
            for record in [*(variant.record for variant in comparison.curve[run]), main]
        }
        for run, main in comparison.tuned().items()
        if comparison.curve[run]
    }
    table = pd.DataFrame(columns).sort_index().fillna("-")
    return table.set_axis([f"{count:,} rows" for count in table.index])


def _point(record: RunRecord) -> str:
    scoring = record.evaluation.scoring
    interval = f"{100 * scoring.accuracy_low:.1f} to {100 * scoring.accuracy_high:.1f}"
    return f"{100 * scoring.accuracy:.1f} ({interval}), {_time(record.training.seconds)}"


def _is_timed(training: Training) -> bool:
    """Whether validations were timed: older records' are not."""
    return any(point.training_seconds is not None for point in training.history)


def _cell(training: Training, target: float) -> str:
    best = max(point.validation_accuracy for point in training.history if point.validation_accuracy is not None)
    return _reached(seconds_to(training, target), best)


def _reached(seconds: float | None, best: float) -> str:
    if seconds is None:
        return f"never (best {100 * best:.1f} %)"
    return _time(seconds)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _title(target: float) -> str:
    return f"{target:.0%}"
