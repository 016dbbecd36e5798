"""What accuracy costs: the trainings' costs, who reaches an accuracy first, and what more rows buy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from finetune.records import RunRecord, Training
from finetune.wording import NAMES, extent

if TYPE_CHECKING:
    from finetune.compare.comparison import Comparison, CurvePoint

TARGETS = (0.90, 0.92, 0.93, 0.94)


def costs(record: RunRecord, *others: Training) -> pd.DataFrame:
    """What a run's training cost, as a table of one row; `-` where it was not measured.

    Args:
        record: The run's.
        others: Its trainings with other seeds, if any: costs are medians over all, the time with its range.
    """
    training, trainings = record.training, (record.training, *others)
    energy = middle(trainings, "energy_joules")
    return pd.DataFrame(
        {
            "training": time_with_range(trainings),
            "articles/s": middle(trainings, "articles_per_second"),
            "real tokens/s": middle(trainings, "tokens_per_second"),
            "peak memory GB": middle(trainings, "peak_memory_bytes") / 1e9,
            "energy kJ": "-" if energy is None else f"{energy / 1000:.1f}",
            "trained parameters": training.trainable_parameters,
            "share of parameters %": 100 * training.trainable_parameters / training.parameters,
            "artefact MB": training.artefact_bytes / 1e6,
            "engine": record.engine,
        },
        index=[NAMES[record.run]],
    )


def middle(trainings: Sequence[Training], what: str) -> float | None:
    """The median of a cost over trainings; None where one of them did not measure it."""
    values = [getattr(training, what) for training in trainings]
    return None if None in values else statistics.median(values)


def time_with_range(trainings: Sequence[Training]) -> str:
    """`32 s`; of several trainings the median and the range: `32 s (32 s to 59 s)`."""
    return _median_and_range([training.seconds for training in trainings])


def measured(trainings: Sequence[Training]) -> dict[str, float | None]:
    """The costs that accuracy is held against, by axis title, medians over a run's trainings; None where one was not
    measured."""
    energy = middle(trainings, "energy_joules")
    return {
        "training time (minutes)": middle(trainings, "seconds") / 60,
        "peak memory (GB)": middle(trainings, "peak_memory_bytes") / 1e9,
        "energy (kJ)": None if energy is None else energy / 1000,
        "artefact (MB)": trainings[0].artefact_bytes / 1e6,
        "trained parameters (millions)": trainings[0].trainable_parameters / 1e6,
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
    """Training time until each target was first seen on the validation rows, a column a target; of several seeds the
    median and the range."""
    trainings = {NAMES[run]: comparison.trainings(run) for run in comparison.tuned()}
    timed = {name: of for name, of in trainings.items() if all(map(_is_timed, of))}
    rows = {name: {_title(target): _cell(of, target) for target in TARGETS} for name, of in timed.items()}
    svm = comparison.baselines.get("svm")
    if svm:
        rows[NAMES["svm"]] = {
            _title(target): _time(svm.fit_seconds)
            if svm.validation_accuracy >= target
            else _never(svm.validation_accuracy)
            for target in TARGETS
        }
    return pd.DataFrame(rows).T if timed else pd.DataFrame()


def curve_table(comparison: Comparison) -> pd.DataFrame:
    """Accuracy in percent with its interval, and training time: a line a number of training rows, a column a run; the
    linear SVM's, where it was fitted on fewer rows too."""
    columns = {
        NAMES[run]: {point.train_rows: _point(point) for point in points}
        for run, points in comparison.learning_curve().items()
    }
    table = pd.DataFrame(columns).sort_index().fillna("-")
    return table.set_axis([f"{count:,} rows" for count in table.index])


def _point(point: CurvePoint) -> str:
    scoring = point.scoring
    interval = f"{100 * scoring.accuracy_low:.1f} to {100 * scoring.accuracy_high:.1f}"
    return f"{100 * scoring.accuracy:.1f} ({interval}), {_time(point.seconds)}"


def _is_timed(training: Training) -> bool:
    """Whether validations were timed: older records' are not."""
    return any(point.training_seconds is not None for point in training.history)


def _cell(trainings: Sequence[Training], target: float) -> str:
    reached = [found for training in trainings if (found := seconds_to(training, target)) is not None]
    if not reached:
        return _never(max(map(_best, trainings)))
    if len(reached) < len(trainings):
        return f"{len(reached)} of {len(trainings)} seeds ({_range(reached)})"
    return _median_and_range(reached)


def _median_and_range(seconds: Sequence[float]) -> str:
    """`32 s (32 s to 59 s)`; of values that are written alike only one of them."""
    median, reach = _time(statistics.median(seconds)), _range(seconds)
    return median if median == reach else f"{median} ({reach})"


def _range(seconds: Sequence[float]) -> str:
    return extent([_time(min(seconds)), _time(max(seconds))])


def _best(training: Training) -> float:
    return max(point.validation_accuracy for point in training.history if point.validation_accuracy is not None)


def _never(best: float) -> str:
    return f"never (best {100 * best:.1f} %)"


def _time(seconds: float) -> str:
    if seconds < 1:
        return "< 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _title(target: float) -> str:
    return f"{target:.0%}"
