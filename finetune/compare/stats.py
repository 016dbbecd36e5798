"""Two methods on the same test rows: the difference with its interval, a paired test, and what it could have shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom
from statsmodels.stats.multitest import multipletests

from finetune import resampling
from finetune.compare import seeds
from finetune.compare.seeds import POWER, Estimate
from finetune.metrics import mcnemar
from finetune.wording import format_p, interval_of, one_decimal, spoken

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class MeanOverSeeds:
    """Accuracies of one run's seeds, shape (seeds,), and the 95 % interval of their mean over seeds and rows."""

    accuracies: np.ndarray
    low: float
    high: float

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())


@dataclass(frozen=True)
class OverSeeds:
    """Difference of two runs' mean accuracies over their seeds, in points, with its interval over seeds and rows.

    Attributes:
        seeds: How many; the same ones for both runs, and paired: the first training of one with that of the other.
        p_value: t test over seeds and rows (`finetune.seeds`), of this pair alone.
        corrected_p: The same after Holm's correction for all pairs that were tested with it.
        detectable: The true difference that this test would have found four times in five; None where nothing varies.
        estimate: The difference as a share, with its standard error.
    """

    seeds: int
    points: float
    low: float
    high: float
    p_value: float
    corrected_p: float
    detectable: float | None
    estimate: Estimate


@dataclass(frozen=True)
class Pair:
    """Two runs on the same rows, the first minus the second; but for `over_seeds`, of the first seed alone.

    Attributes:
        points, low, high: Difference of the accuracies in percentage points, with its 95 % bootstrap interval.
        f1_points, f1_low, f1_high: The same of macro-F1.
        only_first, only_second: Rows that only one of the two gets right.
        p_value: Exact McNemar test, of this pair alone.
        corrected_p: The same after Holm's correction for all pairs that were tested with it.
        detectable: The true difference in points that this test would have found four times in five, given as many
            rows on which one alone is right; None where they are too few for any difference to be found.
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
    detectable: float | None
    over_seeds: OverSeeds | None = None

    @property
    def judged(self) -> Pair | OverSeeds:
        """What the verdict rests on: the difference over the seeds, if there are several."""
        return self.over_seeds or self

    @property
    def is_tie(self) -> bool:
        return self.judged.corrected_p >= SIGNIFICANT

    @property
    def winner(self) -> str:
        """The run with the higher accuracy; it says nothing where the pair is a tie."""
        return self.first if self.judged.points > 0 else self.second

    @property
    def loser(self) -> str:
        return self.second if self.judged.points > 0 else self.first

    def lead(self) -> str:
        """How far the winner leads: `14.1 points (12.9 to 15.3, p < 0.001)`; over the seeds, if there are several."""
        points, low, high = self.lead_interval()
        p_value = format_p(self.judged.corrected_p)
        return f"{one_decimal(points)} points ({interval_of(low, high)}{self._of_seeds()}, p {p_value})"

    def lead_interval(self) -> tuple[float, float, float]:
        """The winner's lead in points, and its interval; over the seeds, if there are several."""
        shown = self.judged
        low, high = (shown.low, shown.high) if shown.points > 0 else (-shown.high, -shown.low)
        return abs(shown.points), low, high

    def tie(self) -> str:
        """A tie in short: `LoRA and QLoRA (+0.2 points, -0.3 to +0.7, p = 0.510)`."""
        return f"{spoken(self.first)} and {spoken(self.second)} ({self.difference()})"

    def power(self) -> str:
        """What the test could have shown, as a clause."""
        if self.judged.detectable is not None:
            found = one_decimal(self.judged.detectable)
            return f"a true difference of {found} points would have been found four times in five"
        return f"{self.what_tells_apart()}, no difference could have been shown"

    def what_tells_apart(self) -> str:
        """Why no difference could have been shown, as a clause."""
        if self.over_seeds:
            return "as no row and no seed tells the two apart"
        count = self.only_first + self.only_second
        rows = {0: "no row", 1: "one row"}.get(count, f"{count} rows")
        return f"with {rows} that one of them alone gets right"

    def __str__(self) -> str:
        if self.is_tie:
            both = f"{spoken(self.first)} and {spoken(self.second)}"
            return f"{both} cannot be told apart ({self.difference()}; {self.power()})"
        return f"{spoken(self.winner)} beats {spoken(self.loser)} by {self.lead()}"

    def difference(self) -> str:
        """`+0.2 points, -0.3 to +0.7, p = 0.510`; over the seeds, if there are several."""
        shown = self.judged
        interval = f"{interval_of(shown.low, shown.high, '+')}{self._of_seeds()}"
        return f"{one_decimal(shown.points, '+')} points, {interval}, p {format_p(shown.corrected_p)}"

    def _of_seeds(self) -> str:
        return f" over {self.over_seeds.seeds} seeds" if self.over_seeds else ""


def compare(first: str, second: str, labels: Sequence[str], answers: Sequence[str], others: Sequence[str]) -> Pair:
    """Compare the predictions of two runs, as the only pair that is tested.

    Args:
        first: Name of the first run.
        second: Name of the second run.
        labels: The true labels, row by row.
        answers: The first run's predictions of the same rows.
        others: The second run's.
    """
    right = [[answer == label for answer, label in zip(of, labels, strict=True)] for of in (answers, others)]
    only_first, only_second, p_value = mcnemar(*right)
    counts = resampling.confusions(labels, answers, others)
    shares = [resampling.accuracy(of) for of in counts]
    macro = [resampling.f1(of).mean(axis=-1) for of in counts]
    observed = [resampling.f1(resampling.confusion(labels, of)).mean() for of in (answers, others)]
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
        detectable=detectable(only_first + only_second, len(labels), SIGNIFICANT),
    )


def mean_over_seeds(labels: Sequence[str], right: np.ndarray) -> MeanOverSeeds:
    """The mean accuracy of a run that is right on the rows that `right`, of shape (seeds, rows), says."""
    return MeanOverSeeds(right.mean(axis=1), *seeds.estimate(labels, right).interval())


def over_seeds(labels: Sequence[str], first: np.ndarray, second: np.ndarray) -> OverSeeds:
    """The difference of two runs over their seeds, as the only pair that is tested.

    Args:
        labels: The true labels, row by row.
        first: Whether the first run's trainings are right, shape (seeds, rows).
        second: The same of the second run, its seeds in the same order; or of shape (1, rows), of what has none.
    """
    found = seeds.estimate(labels, first.astype(float) - second)
    # Where all rows of a class differ alike in all seeds, there is no error to test with, however few rows these are.
    p_value = found.p_value() if found.error else mcnemar(first[0], second[0])[2]
    return OverSeeds(
        max(len(first), len(second)),
        100 * found.mean,
        *(100 * end for end in found.interval()),
        p_value,
        p_value,
        _percent(found.detectable(SIGNIFICANT)),
        found,
    )


def corrected(pairs: Sequence[Pair], rows: int) -> list[Pair]:
    """The pairs with p-values corrected for testing all of them (Holm 1979): those that the verdicts rest on, and, of
    pairs over several seeds, those of the first seed too.

    Holm asks of the pairs that stay ties that one of them reach 5 % divided by their number: that is the level at which
    their detectable difference is found.
    """
    if not pairs:
        return []
    alone, level_alone = _holm([pair.p_value for pair in pairs])
    judged, level = _holm([pair.judged.p_value for pair in pairs])
    found = []
    for pair, p_alone, p_judged in zip(pairs, alone, judged, strict=True):
        over, discordant = pair.over_seeds, pair.only_first + pair.only_second
        found.append(
            replace(
                pair,
                corrected_p=p_alone if over else p_judged,
                detectable=detectable(discordant, rows, level_alone if over else level),
                over_seeds=over and _at_level(over, p_judged, level),
            )
        )
    return found


def _at_level(over: OverSeeds, corrected_p: float, level: float) -> OverSeeds:
    return replace(over, corrected_p=corrected_p, detectable=_percent(over.estimate.detectable(level)))


def _holm(p_values: Sequence[float]) -> tuple[list[float], float]:
    """Corrected p-values, and the level that is asked of the least of those that stay above 5 %."""
    rejected, corrected_p, _, _ = multipletests(p_values, SIGNIFICANT, method="holm")
    return [float(p_value) for p_value in corrected_p], SIGNIFICANT / max(1, sum(~rejected))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def detectable(discordant: int, rows: int, level: float) -> float | None:
    """The true difference, in points, that the exact McNemar test finds with a probability of 80 %.

    Args:
        discordant: Rows that one method alone gets right.
        rows: All test rows.
        level: Two-sided level of the test.

    Returns:
        The difference at which the test, which is binomial given `discordant`, has that power; None if there are too
        few rows for any outcome to be significant.
    """
    outcomes = np.arange(discordant + 1)
    significant = outcomes[2 * binom.cdf(outcomes, discordant, 0.5) < level]
    if not len(significant):
        return None
    critical = significant[-1]

    def missing(share: float) -> float:
        """How much power is missing where the better method alone is right on this share of the discordant rows."""
        tails = binom.cdf(critical, discordant, 1 - share) + binom.cdf(critical, discordant, share)
        return POWER - tails

    share = brentq(missing, 0.5, 1)
    return 100 * (2 * share - 1) * discordant / rows
