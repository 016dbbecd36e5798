"""The bootstrap over test rows: paired, as all methods see the same resample, and stratified by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


def confusions(labels: Sequence[str], *predictions: Sequence[str], classes: Sequence[str]) -> list[np.ndarray]:
    """Confusion matrices of resampled test rows, one array a method, the same resamples for all.

    Within each class as many rows are drawn, with replacement, as it has. Rows that all methods answer alike are
    interchangeable, so that the draw is a multinomial one of the distinct answers: the same bootstrap as over rows, in
    milliseconds.

    Args:
        labels: The true labels, row by row.
        predictions: A sequence of predicted labels per method; anything that is no label is an invalid answer.
        classes: All labels of the task, in its order.

    Returns:
        Per method, counts of shape (RESAMPLES, classes, classes + 1); the last column counts invalid answers.
    """
    generator = np.random.default_rng(0)
    truth = codes(labels, classes)
    answers = np.stack([codes(predicted, classes) for predicted in predictions], axis=1)
    results = [np.zeros((RESAMPLES, len(classes), len(classes) + 1)) for _ in predictions]
    for label in np.unique(truth):
        distinct, counts = np.unique(answers[truth == label], axis=0, return_counts=True)
        draws = generator.multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
        for method, result in enumerate(results):
            result[:, label] = draws @ np.eye(len(classes) + 1)[distinct[:, method]]
    return results


def resampled(counts: np.ndarray) -> np.ndarray:
    """The resamples of one method's confusion matrix, which holds all that the bootstrap needs of its rows.

    Args:
        counts: Shape (classes, classes + 1).

    Returns:
        Counts of shape (RESAMPLES, classes, classes + 1), the same as `confusions` gives for the rows.
    """
    generator = np.random.default_rng(0)
    result = np.zeros((RESAMPLES, *counts.shape))
    for label, row in enumerate(counts.astype(int)):
        there = np.flatnonzero(row)
        if there.size:
            result[:, label, there] = generator.multinomial(row.sum(), row[there] / row.sum(), size=RESAMPLES)
    return result


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Accuracy of confusion matrices of shape (..., classes, classes + 1)."""
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum(axis=(-2, -1))


def f1(counts: np.ndarray) -> np.ndarray:
    """F1 of each class, shape (..., classes), of confusion matrices; 0 for a class without rows and predictions."""
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    rows, predicted = counts.sum(axis=-1), counts[..., :-1].sum(axis=-2)
    return 2 * right / np.maximum(rows + predicted, 1)


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
