"""What several seeds say: a mean over trainings, or a difference of two, with its error over seeds and test rows.

Other seeds would give other models, and other articles would be asked: both are samples. A figure that is a mean over
n seeds and N rows (crossed random effects) has the variance

    s² / n  +  Σ_c N_c s_c² / N²

with s² the variance of the seeds' figures and s_c² that of class c's N_c rows, each a mean over the seeds. What a row
does with one seed alone is in both, so that the sum is a little too large, never too small on average. A t
distribution with Satterthwaite's degrees of freedom (1946) takes into account that few seeds tell little of s².

These degrees of freedom are estimated too: with three seeds that differ by much more than the rows' error, a test at
5 % rejects up to 8 % of true hypotheses, and one at 0.05 / 14 up to six times as many as it should (simulated); where
the rows' error is the larger, not more than it should.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import brentq

CONFIDENCE = 0.95
POWER = 0.8
ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and rows, its standard error, and the degrees of freedom of the latter."""

    mean: float
    error: float
    freedom: float

    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        reach = self._critical(1 - CONFIDENCE) * self.error
        return self.mean - reach, self.mean + reach

    def p_value(self) -> float:
        """Two-sided, of the hypothesis that the true mean is zero; there has to be an error to test with."""
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))

    def detectable(self, level: float) -> float | None:
        """The true mean that the test at a two-sided level finds with a probability of 80 %; None without an error."""
        if self.error == 0:
            return None
        critical = self._critical(level) * self._scales()

        def missing(shift: float) -> float:
            """How much power is missing if the true mean is so many standard errors from zero."""
            return POWER - (stats.norm.sf(critical - shift) + stats.norm.cdf(-critical - shift)).mean()

        return self.error * brentq(missing, 0, 2 * critical.max() + 4)

    def _scales(self, count: int = 4000) -> np.ndarray:
        """By how much the error may be estimated too large or too small, equally likely values.

        In place of scipy's non-central t distribution, which is NaN for few degrees of freedom and a large shift.
        """
        return np.sqrt(stats.chi2.ppf((np.arange(count) + 0.5) / count, self.freedom) / self.freedom)

    def _critical(self, level: float) -> float:
        return float(stats.t.isf(level / 2, self.freedom))


def estimate(labels: Sequence[str], values: np.ndarray) -> Estimate:
    """The mean of `values`.

    Args:
        labels: The true labels, row by row.
        values: A figure of each training on each row, shape (seeds, rows), two seeds or more: 1 where it is right, or
            the difference of two methods' trainings with the same seed.
    """
    seeds, rows = values.shape
    classes = [values[:, np.array(labels) == label].mean(axis=0) for label in sorted(set(labels))]
    of_seeds = values.mean(axis=1).var(ddof=1) / seeds
    of_rows = sum(len(of) * _variance(of) for of in classes) / rows**2
    spread = of_seeds**2 / (seeds - 1) + of_rows**2 / max(rows - len(classes), 1)
    freedom = (of_seeds + of_rows) ** 2 / spread if spread else np.inf
    error = float(np.sqrt(of_seeds + of_rows))
    # Seeds whose means are the same may differ in the last digit.
    return Estimate(float(values.mean()), error if error > ROUNDING else 0.0, float(freedom))


def _variance(values: np.ndarray) -> float:
    """Of a class's rows; a single one shows none."""
    return float(((values - values.mean()) ** 2).sum()) / max(len(values) - 1, 1)
