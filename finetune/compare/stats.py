"""Two methods on the same test rows: differences with intervals, and paired tests.

Over several seeds. Other seeds would give other models, and other articles would be asked: both are samples. A mean
over n seeds and N rows (crossed random effects) has the variance

    s² / n  +  Σ_c N_c s_c² / N²

with s² the variance of the seeds' figures and s_c² that of class c's N_c rows, each a mean over the seeds. What a row
does with one seed alone is in both, so the sum is a little too large on average, never too small. A t distribution with
Satterthwaite's degrees of freedom (1946) takes into account that few seeds tell little of s².

These degrees of freedom are estimated too. With three seeds that differ by much more than the rows' error, a test at
5 % rejects up to 8 % of true hypotheses, and one at 0.05 / 14 up to six times as many as it should (simulated). Where
the rows' error is the larger, it rejects no more than it should.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from finetune import resampling
from finetune.metrics import POWER, SIGNIFICANT, mcnemar
from finetune.wording import NAMES, format_p, interval_of, one_decimal

CONFIDENCE = 0.95
ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and rows.

    Attributes:
        seed_variance, row_variance: What seeds and rows add to the mean's variance.
        freedom: Degrees of freedom of their sum.
    """

    mean: float
    seed_variance: float
    row_variance: float
    freedom: float

    @property
    def error(self) -> float:
        """The standard error."""
        error = float(np.sqrt(self.seed_variance + self.row_variance))
        # Seeds whose means are the same may differ in the last digit.
        return error if error > ROUNDING else 0.0

    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        reach = float(stdtrit(self.freedom, (1 + CONFIDENCE) / 2)) * self.error
        return self.mean - reach, self.mean + reach

    def p_value(self) -> float:
        """Two-sided, of the hypothesis that the true mean is zero; there has to be an error to test with."""
        return float(2 * stdtr(self.freedom, -abs(self.mean) / self.error))


def estimate(labels: Sequence[str], values: np.ndarray) -> Estimate:
    """The mean of `values`.

    Args:
        labels: The true labels, row by row.
        values: A figure of each training on each row, shape (seeds, rows), two seeds or more: 1 where it is right, or
            the difference of two methods' trainings with the same seed.
    """
    seeds, rows = values.shape
    truth = np.asarray(labels)
    classes = [values[:, truth == label].mean(axis=0) for label in sorted(set(truth.tolist()))]
    of_seeds = float(values.mean(axis=1).var(ddof=1)) / seeds
    # A class's single row shows no variance.
    of_rows = sum(len(of) * float(((of - of.mean()) ** 2).sum()) / max(len(of) - 1, 1) for of in classes) / rows**2
    spread = of_seeds**2 / (seeds - 1) + of_rows**2 / max(rows - len(classes), 1)
    freedom = (of_seeds + of_rows) ** 2 / spread if spread else np.inf
    return Estimate(float(values.mean()), of_seeds, of_rows, float(freedom))


@dataclass(frozen=True)
class OverSeeds:
    """Difference of two runs' mean accuracies over their seeds, in points, with its interval over seeds and rows.

    Attributes:
        seeds: How many; the same ones for both runs, and paired: the first training of one with that of the other.
        p_value: t test over seeds and rows, of this pair alone.
        corrected_p: The same after Holm's correction for all pairs that were tested with it.
    """

    seeds: int
    points: float
    low: float
    high: float
    p_value: float
    corrected_p: float


@dataclass(frozen=True)
class Pair:
    """Two runs on the same rows, the first minus the second; but for `over_seeds`, of the first seed alone.

    Attributes:
        points, low, high: Difference of the accuracies in percentage points, with its 95 % bootstrap interval.
        f1_points, f1_low, f1_high: The same of macro-F1.
        only_first, only_second: Rows that only one of the two gets right.
        p_value: Exact McNemar test, of this pair alone.
        corrected_p: The same after Holm's correction for all pairs that were tested with it.
        over_seeds: The difference over several seeds; None where the runs were trained with one.
    """

    first: str
    second: str
    points: float
    low: float
    high: float
    f1_points: float
    f1_low: float
    f1_high: float
    only_first: int
    only_second: int
    p_value: float
    corrected_p: float
    over_seeds: OverSeeds | None = None

    @property
    def judged(self) -> Pair | OverSeeds:
        """What decides: the difference over the seeds, if there are several."""
        return self.over_seeds or self

    @property
    def is_tie(self) -> bool:
        return self.judged.corrected_p >= SIGNIFICANT

    def __str__(self) -> str:
        """`LoRA against base model: +31.4 points (+30.6 to +32.5), p < 0.001`."""
        shown = self.judged
        return (
            f"{NAMES[self.first]} against {NAMES[self.second]}: {one_decimal(shown.points, '+')} points "
            f"({interval_of(shown.low, shown.high, '+')}), p {format_p(shown.corrected_p)}"
        )


def compare(
    first: str,
    second: str,
    labels: Sequence[str],
    answers: Sequence[str],
    others: Sequence[str],
    classes: Sequence[str],
) -> Pair:
    """Compare the predictions of two runs, as the only pair that is tested.

    Args:
        first: Name of the first run.
        second: Name of the second run.
        labels: The true labels, row by row.
        answers: The first run's predictions of the same rows.
        others: The second run's.
        classes: All labels of the task, in its order.
    """
    right = [[answer == label for answer, label in zip(of, labels, strict=True)] for of in (answers, others)]
    only_first, only_second, p_value = mcnemar(*right)
    counts = resampling.resamples(labels, answers, others, classes=classes)
    shares = [resampling.accuracy(of) for of in counts]
    macro = [resampling.macro_f1(of) for of in counts]
    matrices = [resampling.confusion(labels, of, classes) for of in (answers, others)]
    observed = [resampling.macro_f1(resampling.counted(matrix)) for matrix in matrices]
    low, high = resampling.interval(100 * (shares[0] - shares[1]))
    f1_low, f1_high = resampling.interval(100 * (macro[0] - macro[1]))
    return Pair(
        first,
        second,
        points=100 * (only_first - only_second) / len(labels),
        low=low,
        high=high,
        f1_points=100 * float(observed[0] - observed[1]),
        f1_low=f1_low,
        f1_high=f1_high,
        only_first=only_first,
        only_second=only_second,
        p_value=p_value,
        corrected_p=p_value,
    )


def over_seeds(labels: Sequence[str], first: np.ndarray, second: np.ndarray) -> OverSeeds | None:
    """The difference of two runs over their seeds, as the only pair that is tested; None where there is one training.

    Args:
        labels: The true labels, row by row.
        first: Whether the first run's trainings are right, shape (seeds, rows).
        second: The same of the second run, its seeds in the same order; or of shape (1, rows), of what has none.
    """
    seeds = max(len(first), len(second))
    if seeds == 1:
        return None
    found = estimate(labels, first.astype(float) - second)
    # Where all rows of a class differ alike in all seeds, there is no error to test with, however few rows these are.
    p_value = found.p_value() if found.error else mcnemar(first[0], second[0])[2]
    return OverSeeds(seeds, 100 * found.mean, *(100 * end for end in found.interval()), p_value, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for testing all of them (Holm 1979)."""
    # statsmodels' multipletests does the same, but collects garbage at each call: 0.14 s.
    order, count = np.argsort(p_values), len(p_values)
    adjusted = np.maximum.accumulate((count - np.arange(count)) * np.array(p_values)[order]) if count else []
    found = np.empty(count)
    found[order] = np.minimum(adjusted, 1)
    return found.tolist()


def corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with corrected p-values: those that decide, and, of pairs over several seeds, the first seed's too."""
    alone = holm([pair.p_value for pair in pairs])
    judged = holm([pair.judged.p_value for pair in pairs])
    return [
        replace(
            pair,
            corrected_p=p_alone if pair.over_seeds else p_judged,
            over_seeds=pair.over_seeds and replace(pair.over_seeds, corrected_p=p_judged),
        )
        for pair, p_alone, p_judged in zip(pairs, alone, judged, strict=True)
    ]


def score_test(only_first: int, only_second: int, rows: int, margin: float) -> tuple[float, float]:
    """One-sided non-inferiority on paired rows: is the first method's accuracy less than `margin` below the second's?

    Tango's score test (1998, Statistics in Medicine 17:891-908). Its variance is that of the most likely rates at
    which the first is worse by exactly the margin, so it also holds where no row tells the two methods apart.

    Args:
        only_first, only_second: Rows that only one of the two gets right.
        rows: All test rows.
        margin: As a share, above 0.

    Returns:
        The p-value of the hypothesis that the first is worse by the margin or more, and the variance of one row's
        difference.
    """
    # q, the rate at which the second alone is right, solves 2 n q² - b q + c = 0 where the likelihood has its maximum.
    b = only_first + only_second + margin * (2 * rows - only_first + only_second)
    c = only_second * margin * (1 + margin)
    q = (b + np.sqrt(b**2 - 8 * rows * c)) / (4 * rows)
    variance = 2 * q - margin * (1 + margin)
    return float(ndtr(-(only_first - only_second + rows * margin) / np.sqrt(rows * variance))), float(variance)


def no_worse(
    labels: Sequence[str], first: np.ndarray, second: np.ndarray, margin: float, level: float = SIGNIFICANT
) -> tuple[float, float]:
    """Is the first method less than `margin` below the second? By one training Tango's test, by several a t test.

    Args:
        labels: The true labels, row by row.
        first, second: Whether the trainings are right, as in `over_seeds`.
        margin: As a share, above 0.
        level: Of the test that more rows are wanted for.

    Returns:
        The one-sided p-value, and how many test rows would show it four times in five, if the differences between the
        methods and between the seeds stay as they are (infinite where rows alone would not).
    """
    rows, several = len(labels), max(len(first), len(second)) > 1
    found = estimate(labels, first.astype(float) - second) if several else None
    if found and found.error:
        p_value = float(stdtr(found.freedom, -(found.mean + margin) / found.error))
        mean, of_seeds, of_rows = found.mean, found.seed_variance, rows * found.row_variance
    else:
        only = [int((one & ~other).sum()) for one, other in ((first[0], second[0]), (second[0], first[0]))]
        p_value, of_rows = score_test(*only, rows, margin)
        mean, of_seeds = (only[0] - only[1]) / rows, 0.0
    z = ndtri(1 - level) + ndtri(POWER)
    room = (max(mean + margin, 0) / z) ** 2 - of_seeds
    return p_value, of_rows / room if room > 0 else np.inf
