"""The bootstrap against one that draws rows, one by one, and computes every figure in another way."""

import random

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from data_prep.task import AG_NEWS
from finetune import resampling

LABELS = AG_NEWS.labels


def answers(seed: int, rows: int, skill: float) -> list[str]:
    """Answers to the labels in turn: right with probability `skill`, else anything, invalid answers included."""
    generator = random.Random(seed)
    labels = [LABELS[row % 4] for row in range(rows)]
    return [label if generator.random() < skill else generator.choice([*LABELS, ""]) for label in labels]


LABELS_OF_120 = [LABELS[row % 4] for row in range(120)]
FIRST, SECOND = answers(1, 120, 0.8), answers(2, 120, 0.6)


def macro_f1(labels, predicted) -> float:
    """The mean over the classes of 2 right / (labelled + answered): scikit-learn takes minutes for all draws."""
    of = [2 * ((labels == c) & (predicted == c)).sum() / ((labels == c).sum() + (predicted == c).sum()) for c in LABELS]
    return float(np.mean(of))


def brute_force(resamples: int) -> np.ndarray:
    """Accuracy and macro-F1 of both, and the differences, of resamples that are drawn row by row within the classes."""
    generator = np.random.default_rng(7)
    labels, first, second = map(np.array, (LABELS_OF_120, FIRST, SECOND))
    classes = [np.flatnonzero(labels == label) for label in LABELS]
    draws = []
    for _ in range(resamples):
        rows = np.concatenate([generator.choice(of_class, len(of_class)) for of_class in classes])
        scores = [((labels == of)[rows].mean(), macro_f1(labels[rows], of[rows])) for of in (first, second)]
        draws.append([*scores[0], *scores[1], scores[0][0] - scores[1][0], scores[0][1] - scores[1][1]])
    return np.array(draws)


def test_intervals_are_those_of_a_bootstrap_row_by_row():
    known = f1_score(LABELS_OF_120, FIRST, labels=list(LABELS), average="macro", zero_division=0)
    assert macro_f1(np.array(LABELS_OF_120), np.array(FIRST)) == pytest.approx(known)
    expected = np.percentile(brute_force(1500), [2.5, 97.5], axis=0).T
    first, second = resampling.resamples(LABELS_OF_120, FIRST, SECOND, classes=LABELS)
    shares = [resampling.accuracy(of) for of in (first, second)]
    macro = [resampling.f1(of).mean(axis=1) for of in (first, second)]
    drawn = [shares[0], macro[0], shares[1], macro[1], shares[0] - shares[1], macro[0] - macro[1]]
    # The ends of 1,500 draws' intervals wander by a hundredth; the intervals are 0.1 wide or more.
    np.testing.assert_allclose([resampling.interval(of) for of in drawn], expected, atol=0.015)


def test_the_resamples_are_paired():
    """Of the same answers twice, every resample's difference is nothing."""
    first, second = resampling.resamples(LABELS_OF_120, FIRST, FIRST, classes=LABELS)
    assert (first.right == second.right).all() and (first.predicted == second.predicted).all()


def test_the_resamples_are_stratified():
    (counts,) = resampling.resamples(LABELS_OF_120, FIRST, classes=LABELS)
    assert (counts.rows == 30).all() and counts.right.max() <= 30


def test_figures_of_a_table_are_those_of_scikit_learn():
    table = resampling.confusion(LABELS_OF_120, SECOND, LABELS)
    assert table.sum() == 120
    counts = resampling.counted(table)
    assert resampling.accuracy(counts) == pytest.approx(accuracy_score(LABELS_OF_120, SECOND))
    expected = f1_score(LABELS_OF_120, SECOND, labels=list(LABELS), average=None)
    np.testing.assert_allclose(resampling.f1(counts), expected)


def test_a_class_without_rows_or_predictions_has_an_f1_of_nothing():
    table = resampling.confusion(["World", "World"], ["World", "Sports"], LABELS)
    np.testing.assert_allclose(resampling.f1(resampling.counted(table)), [2 / 3, 0, 0, 0])


def test_a_bootstrap_of_perfect_answers_has_no_width():
    (counts,) = resampling.resamples(LABELS_OF_120, LABELS_OF_120, classes=LABELS)
    assert resampling.interval(resampling.accuracy(counts)) == (1, 1)
