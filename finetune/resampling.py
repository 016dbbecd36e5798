"""The bootstrap over test rows: paired, as all methods see the same resample, and stratified by class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Counts:
    """What figures need of confusion matrices: for each class its right answers, its rows and its answers, each of
    shape (..., classes). Matrices of 300 classes would take 7 GB for all resamples."""

    right: np.ndarray
    rows: np.ndarray
    predicted: np.ndarray


def counted(matrix: np.ndarray) -> Counts:
    """The counts of a confusion matrix of shape (classes, classes + 1), whose last column counts invalid answers."""
    return Counts(matrix.diagonal(), matrix.sum(axis=1), matrix[:, :-1].sum(axis=0))


def resamples(labels: Sequence[str], *predictions: Sequence[str], classes: Sequence[str]) -> list[Counts]:
    """Counts of resampled test rows, for each method, the same resamples for all.

    Within each class as many rows are drawn, with replacement, as it has. Rows that all methods answer alike are
    interchangeable, so that the draw is a multinomial one of the distinct answers: the same bootstrap as over rows, in
    milliseconds.

    Args:
        labels: The true labels, row by row.
        predictions: A sequence of predicted labels per method; anything that is no label is an invalid answer.
        classes: All labels of the task, in its order.
    """
    truth = codes(labels, classes)
    answers = np.stack([codes(predicted, classes) for predicted in predictions], axis=1)
    found = (np.unique(answers[truth == label], axis=0, return_counts=True) for label in range(len(classes)))
    return _drawn(found, np.bincount(truth, minlength=len(classes)).astype(float), len(predictions))


def resampled(matrix: np.ndarray) -> Counts:
    """The resamples of one method's confusion matrix, which holds all that the bootstrap needs of its rows.

    Args:
        matrix: Shape (classes, classes + 1).

    Returns:
        The same as `resamples` gives for the rows.
    """
    found = ((np.flatnonzero(row)[:, None], row[row > 0].astype(int)) for row in matrix)
    return _drawn(found, matrix.sum(axis=1), 1)[0]


def _drawn(found: Iterable[tuple[np.ndarray, np.ndarray]], rows: np.ndarray, methods: int) -> list[Counts]:
    """Resamples of each class's distinct answers, shape (distinct, methods), and how many rows have each."""
    generator, count = np.random.default_rng(0), len(rows)
    results = [Counts(np.zeros((RESAMPLES, count)), rows, np.zeros((RESAMPLES, count))) for _ in range(methods)]
    for label, (distinct, counts) in enumerate(found):
        if not len(counts):
            continue
        draws = generator.multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
        for method, result in enumerate(results):
            drawn = draws @ np.eye(count + 1)[distinct[:, method]]
            result.right[:, label] = drawn[:, label]
            result.predicted[:] += drawn[:, :-1]
    return results


def accuracy(counts: Counts) -> np.ndarray:
    """The share of right answers."""
    return counts.right.sum(axis=-1) / counts.rows.sum()


def f1(counts: Counts) -> np.ndarray:
    """F1 of each class, shape (..., classes); 0 for a class without rows and predictions."""
    return 2 * counts.right / np.maximum(counts.rows + counts.predicted, 1)


def macro_f1(counts: Counts) -> np.ndarray:
    """The mean F1 of the classes that have rows."""
    there, of_classes = np.asarray(counts.rows) > 0, f1(counts)
    # Sums in another order differ in the last digit: where all have rows, we add as we always did.
    return (of_classes if there.all() else of_classes[..., there]).mean(axis=-1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resampled figures (Efron and Tibshirani 1993, chapter 13)."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def confusion(labels: Sequence[str], answers: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """The confusion matrix of all rows, shape (classes, classes + 1), invalid answers in the last column."""
    counts = np.zeros((len(classes), len(classes) + 1))
    np.add.at(counts, (codes(labels, classes), codes(answers, classes)), 1)
    return counts


def codes(answers: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Index of each answer's class; one past the last for an invalid answer."""
    index = {label: code for code, label in enumerate(classes)}
    return np.array([index.get(answer, len(classes)) for answer in answers])
