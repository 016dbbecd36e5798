"""Calibration: whether a model that says 90 % is right nine times in ten, and what abstaining would buy."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.metrics import brier_score_loss

from finetune.metrics import accuracy_interval, log_loss
from finetune.predictions import Prediction
from finetune.resampling import interval

# As in Guo et al. 2017.
BINS = 15
# Of the confidences themselves, rows cannot be drawn as counts of a few outcomes: fewer resamples than elsewhere.
RESAMPLES = 2000
COVERAGES = (0.95, 0.9, 0.8)
# A probability may be 0; the logarithm needs more than nothing.
SMALLEST = 1e-10


@dataclass(frozen=True)
class Reliability:
    """Rows binned by confidence: mean confidence, accuracy and number of rows of each bin that holds any."""

    confidence: np.ndarray
    accuracy: np.ndarray
    rows: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: distance of accuracy and confidence, weighted by rows (Naeini et al. 2015)."""
        return float(np.abs(self.accuracy - self.confidence) @ self.rows / self.rows.sum())


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % bootstrap interval over the rows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Calibration of one set of probabilities: expected calibration error, Brier score and log loss in nats."""

    error: Figure
    brier: Figure
    log_loss: Figure


@dataclass(frozen=True)
class Calibration:
    """A run's calibration on the test rows.

    Attributes:
        temperature: What divides the logarithms of the probabilities, fitted on validation rows, or why there is none.
        scaled: The scores after that division; None without it.
        surest_right: Whether each row is right (0 or 1), the surest first.
    """

    scores: Scores
    reliability: Reliability
    temperature: float | str
    scaled: Scores | None
    surest_right: np.ndarray

    def accuracy_at(self, coverage: float) -> Figure:
        """Accuracy on the surest rows, with Wilson's interval, if the model answers this share and abstains else."""
        answered = max(1, round(coverage * len(self.surest_right)))
        right = int(self.surest_right[:answered].sum())
        return Figure(right / answered, *accuracy_interval(right, answered))


def of(test: Sequence[Prediction], validation: Sequence[Prediction]) -> Calibration:
    """Calibration of a run from its predictions of the test rows, and of validation rows if there are any."""
    truth, probabilities = arrays(test)
    confidence, right = confidences(truth, probabilities)
    if not validation:
        temperature = "not recorded"
    elif all(row.prediction == row.label for row in validation):
        # Log loss then falls without end as the temperature does: 0.05 raised the test rows' from 0.14 to 0.92.
        temperature = "none: all validation rows are right"
    else:
        temperature = fit_temperature(*arrays(validation))
    return Calibration(
        scores=score(truth, probabilities),
        reliability=reliability(confidence, right),
        temperature=temperature,
        scaled=None if isinstance(temperature, str) else score(truth, with_temperature(probabilities, temperature)),
        surest_right=right[np.argsort(-confidence, kind="stable")],
    )


def score(truth: np.ndarray, probabilities: np.ndarray) -> Scores:
    """Scores of probabilities of shape (rows, labels); Brier is the sum over the labels, from 0 to 2 (Brier 1950).

    `truth` has the index of each row's label, shape (rows,).
    """
    classes = range(probabilities.shape[1])
    confidence, right = confidences(truth, probabilities)
    error = reliability(confidence, right).error
    brier = brier_score_loss(truth, probabilities, labels=classes, scale_by_half=False)
    losses = -np.log(np.maximum(probabilities[np.arange(len(truth)), truth], SMALLEST))
    # Of each row's probabilities to its label: their mean is the Brier score.
    distances = ((probabilities - np.eye(len(classes))[truth]) ** 2).sum(axis=1)
    observed = (error, float(brier), log_loss(truth, probabilities, classes))
    of_rows = (right - confidence, _bins(confidence), distances, losses)
    return Scores(*(Figure(value, *ends) for value, ends in zip(observed, _intervals(*of_rows), strict=True)))


def confidences(truth: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of each row's most probable label, and whether that label is right (0 or 1)."""
    predicted = probabilities.argmax(axis=1)
    return probabilities.max(axis=1), (predicted == truth).astype(float)


def reliability(confidence: np.ndarray, right: np.ndarray) -> Reliability:
    """Bins of equal width in confidence; empty ones are left out."""
    bins = _bins(confidence)
    rows = np.bincount(bins, minlength=BINS)
    there = rows > 0
    means = [np.bincount(bins, weights=values, minlength=BINS)[there] / rows[there] for values in (confidence, right)]
    return Reliability(*means, rows[there])


def fit_temperature(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature that minimises log loss (Guo et al. 2017), between 1/20 and 20."""

    def loss(logarithm: float) -> float:
        scaled = with_temperature(probabilities, np.exp(logarithm))
        return log_loss(truth, scaled, range(probabilities.shape[1]))

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded").x))


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of shape (rows, labels) with their logarithms divided by a temperature; the order stays."""
    return softmax(np.log(np.maximum(probabilities, SMALLEST)) / temperature, axis=1)


def arrays(predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """Index of each row's label, shape (rows,), and probabilities of shape (rows, labels), in the task's order."""
    classes = list(predictions[0].probabilities)
    probabilities = np.array([[row.probabilities[label] for label in classes] for row in predictions])
    # Nine digits each add up to one within some 1e-9.
    truth = np.array([classes.index(row.label) for row in predictions])
    return truth, probabilities / probabilities.sum(axis=1, keepdims=True)


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.minimum((confidence * BINS).astype(int), BINS - 1)


def _intervals(gaps: np.ndarray, bins: np.ndarray, *averaged: np.ndarray) -> list[tuple[float, float]]:
    """95 % percentile intervals over the rows: of the expected calibration error, and of the mean of each `averaged`.

    Args:
        gaps: By how much each row is right more than it was sure, shape (rows,).
        bins: Each row's bin of confidence.
        averaged: Figures of each row.
    """
    rows = len(gaps)
    if rows < 2:
        return [(float("nan"), float("nan"))] * (1 + len(averaged))
    # A sum over drawn rows is a product with how often each was drawn: all sums at once, in a matrix product.
    gaps_by_bin = np.where(bins[:, None] == np.arange(BINS), gaps[:, None], 0)
    means = np.concatenate([of @ np.column_stack([gaps_by_bin, *averaged]) for of in _drawn(rows)]) / rows
    errors = np.abs(means[:, :BINS]).sum(axis=1)
    return [interval(of) for of in (errors, *means[:, BINS:].T)]


@functools.lru_cache(maxsize=1)
def _drawn(rows: int) -> list[np.ndarray]:
    """How often each row is in each resample, in batches of shape (100, rows); the same resamples for all runs."""
    generator = np.random.default_rng(0)
    batches = [generator.integers(rows, size=(100, rows)) for _ in range(RESAMPLES // 100)]
    return [np.stack([np.bincount(of, minlength=rows) for of in batch]).astype(np.float32) for batch in batches]
