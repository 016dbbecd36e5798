"""Task metrics with their intervals, from labels and predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.special import ndtri
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.metrics import log_loss as sklearn_log_loss

from finetune import resampling
from finetune.resampling import Counts

# The level of all tests, and the power with which a difference should be found.
SIGNIFICANT = 0.05
POWER = 0.8
# Tables and pictures show so many classes one by one; of more, the worst.
MOST_CLASSES = 10


class ClassMetrics(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: float
    recall: float
    f1: float
    rows: int
    f1_low: float | None = None
    f1_high: float | None = None


class Metrics(BaseModel):
    """Accuracy with its 95 % Wilson interval, F1 with its bootstrap interval, figures per class, and counts.

    Records that are older than the intervals of F1 hold None there.
    `confusion` has a row per true label and a column per predicted one, in the order of `classes`; invalid answers are
    in no column, so a row may add up to less than its class has rows. `macro_f1` is over the classes that have rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float
    classes: dict[str, ClassMetrics]
    confusion: list[list[int]]
    macro_f1_low: float | None = None
    macro_f1_high: float | None = None

    @property
    def estimate(self) -> tuple[float, float, float]:
        """Accuracy with the ends of its interval."""
        return self.accuracy, self.accuracy_low, self.accuracy_high

    @property
    def counts(self) -> np.ndarray:
        """`confusion` with the invalid answers in a last column: shape (classes, classes + 1)."""
        known = np.array(self.confusion, float).reshape(len(self.classes), -1)
        rows = np.array([of.rows for of in self.classes.values()])
        return np.column_stack([known, rows - known.sum(axis=1)])


@dataclass(frozen=True)
class Metric:
    """A figure that tables show beside accuracy.

    Attributes:
        title: Its name in tables.
        function: From counts of shape (..., classes) to figures of shape (...).
        percent: Whether tables show it in percent.
        if_balanced: Whether tables show it where all classes have as many rows.
    """

    title: str
    function: Callable[[Counts], np.ndarray]
    percent: bool = True
    if_balanced: bool = True

    def estimate(self, observed: Counts, drawn: Counts) -> tuple[float, float, float]:
        """The figure, and its 95 % interval by the bootstrap over test rows, from their resamples."""
        return float(self.function(observed)), *resampling.interval(self.function(drawn))

    def shown(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"


def matthews(counts: Counts) -> np.ndarray:
    """Matthews' correlation of several classes (Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006); 0 where all
    rows have one label, or one answer."""
    right, total = counts.right.sum(axis=-1), counts.rows.sum()
    # An invalid answer is one more class, which no row has.
    invalid = total - counts.predicted.sum(axis=-1)
    together = right * total - (counts.rows * counts.predicted).sum(axis=-1)
    answers = (counts.predicted**2).sum(axis=-1) + invalid**2
    apart = np.sqrt((total**2 - (counts.rows**2).sum()) * (total**2 - answers))
    return np.divide(together, apart, out=np.zeros_like(together), where=apart > 0)


def balanced_accuracy(counts: Counts) -> np.ndarray:
    """The mean of the classes' recalls, of those that have rows."""
    there = counts.rows > 0
    return (counts.right[..., there] / counts.rows[there]).mean(axis=-1)


METRICS = {
    "macro_f1": Metric("macro-F1", resampling.macro_f1),
    "matthews": Metric("Matthews", matthews, percent=False),
    # It is the accuracy where all classes have as many rows.
    "balanced_accuracy": Metric("balanced accuracy", balanced_accuracy, if_balanced=False),
}


def figures(scoring: Metrics) -> dict[str, str]:
    """The cells of a table's line for all METRICS: the figure, and its interval."""
    cells, counts = {}, scoring.counts
    observed, drawn = resampling.counted(counts), resampling.resampled(counts)
    is_balanced = len({of.rows for of in scoring.classes.values()}) == 1
    for metric in METRICS.values():
        if metric.if_balanced or not is_balanced:
            value, low, high = metric.estimate(observed, drawn)
            cells[f"{metric.title}{' %' if metric.percent else ''}"] = metric.shown(value)
            cells[f"{metric.title} interval"] = f"{metric.shown(low)} to {metric.shown(high)}"
    return cells


def compute(labels: Sequence[str], predictions: Sequence[str | None], classes: Sequence[str]) -> Metrics:
    """Metrics of predictions; None stands for an invalid answer, and counts as wrong.

    Args:
        labels: The true labels, row by row.
        predictions: The predicted ones.
        classes: All labels of the task, in its order.
    """
    predicted = ["" if prediction is None else prediction for prediction in predictions]
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=list(classes), zero_division=0.0
    )
    correct = sum(label == prediction for label, prediction in zip(labels, predicted, strict=True))
    low, high = accuracy_interval(correct, len(labels))
    drawn = resampling.resamples(labels, predicted, classes=classes)[0]
    resampled = resampling.f1(drawn)
    macro_low, macro_high = resampling.interval(resampling.macro_f1(drawn))
    by_class = {}
    for i, label in enumerate(classes):
        f1_low, f1_high = resampling.interval(resampled[:, i])
        figures = {"precision": precision[i], "recall": recall[i], "f1": f1[i], "rows": support[i]}
        by_class[label] = ClassMetrics(**figures, f1_low=f1_low, f1_high=f1_high)
    return Metrics(
        rows=len(labels),
        accuracy=correct / len(labels),
        accuracy_low=low,
        accuracy_high=high,
        macro_f1=float(f1[support > 0].mean()),
        macro_f1_low=macro_low,
        macro_f1_high=macro_high,
        classes=by_class,
        confusion=confusion_matrix(labels, predicted, labels=[*classes, ""])[: len(classes), : len(classes)].tolist(),
    )


def compute_without(
    repeated: Sequence[bool], labels: Sequence[str], predictions: Sequence[str | None], classes: Sequence[str]
) -> Metrics | None:
    """The same on the rows that are not marked as repeated; None where all are."""
    alone = [row for row, is_repeated in enumerate(repeated) if not is_repeated]
    return compute([labels[row] for row in alone], [predictions[row] for row in alone], classes) if alone else None


def shown_classes(scorings: Iterable[Metrics]) -> list[str]:
    """The classes that tables and pictures of these figures show: of more than MOST_CLASSES those with the lowest mean
    F1, the worst first."""
    found = list(scorings)
    names = list(found[0].classes)
    if len(names) <= MOST_CLASSES:
        return names
    there = [name for name in names if found[0].classes[name].rows]
    return sorted(there, key=lambda name: sum(of.classes[name].f1 for of in found))[:MOST_CLASSES]


def first_difference(recorded: Metrics, labels: Sequence[str], predictions: Sequence[str]) -> str | None:
    """The name of the first of the recorded figures that these predictions do not give; None if there is none.

    Intervals of the bootstrap are left out: it takes long.
    """
    counted = resampling.confusion(labels, predictions, tuple(recorded.classes))
    correct = int(np.trace(counted))
    low, high = accuracy_interval(correct, len(labels))
    given = {
        "accuracy": correct / len(labels),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": resampling.macro_f1(resampling.counted(counted)),
        "confusion": counted[:, :-1],
    }
    # Sums in another order may differ in the last digit.
    differ = (what for what in given if not np.allclose(getattr(recorded, what), given[what], rtol=0, atol=1e-9))
    return next(differ, None)


def accuracy_interval(correct: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927)."""
    interval = binomtest(correct, rows).proportion_ci(resampling.CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """Exact McNemar test of two methods on the same rows.

    Args:
        first: Whether the first method is right, row by row.
        second: The same of the second.

    Returns:
        Rows that only the first gets right, rows that only the second gets right, and the two-sided p-value.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    p_value = binomtest(only_first, discordant).pvalue if discordant else 1.0
    return only_first, only_second, float(p_value)


def log_loss(labels: Sequence, probabilities: np.ndarray, classes: Sequence) -> float:
    """Mean negative log-probability of the true labels, in nats; `probabilities` has shape (rows, classes)."""
    # scikit-learn wants the columns in the order in which it sorts the labels.
    order = np.argsort(classes)
    return float(sklearn_log_loss(labels, probabilities[:, order], labels=[classes[i] for i in order]))


def rows_to_show(points: float, discordant: float = 0.03) -> int:
    """The test rows that show a difference of so many points: Connor's formula, see `detectable_difference`."""
    difference = points / 100
    z, power = ndtri(1 - SIGNIFICANT / 2), ndtri(POWER)
    return math.ceil(((z * np.sqrt(discordant) + power * np.sqrt(discordant - difference**2)) / difference) ** 2)


def detectable_difference(rows: int, discordant: float = 0.03) -> float:
    """The true difference of two accuracies that a test set can show: found four times in five, at a level of 5 %.

    Solves Connor's formula for McNemar's test (1987, Biometrics 43:207-211): n d² = (1.96 √ψ + 0.84 √(ψ - d²))².

    Args:
        rows: Test rows.
        discordant: ψ, the share of rows that one method alone gets right. Tuned models differ on 2 to 3 % of AG News'
            test rows, a tuned model and the linear SVM on 7 % (results/reference/gpu).

    Returns:
        In points; at most 100 ψ, and so many where these rows can show nothing.
    """
    z, power = ndtri(1 - SIGNIFICANT / 2), ndtri(POWER)
    half = z * np.sqrt(discordant * rows)
    root = np.sqrt(half**2 - (rows + power**2) * discordant * (z**2 - power**2))
    return 100 * min(float((half + root) / (rows + power**2)), discordant)
