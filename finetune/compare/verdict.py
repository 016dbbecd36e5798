"""The verdict: the cheapest method that is shown to be no worse than the best by more than the user's margin."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep import UserError
from data_prep.duplicates import MANY
from finetune.compare import stats
from finetune.compare.comparison import Comparison
from finetune.wording import listed, one_decimal, percent, sentence, spoken

MARGIN = 1.0
# What a user may want to save, and how its lack is told.
SAVE = {"time": "training time", "memory": "memory", "artefact size": "disk space"}


@dataclass(frozen=True)
class Shown:
    """Whether one method is shown to be no worse than any other by the margin: its p-value, alone and corrected, and
    how many test rows would show it (infinite where rows alone would not)."""

    p_value: float
    corrected_p: float
    rows: float


@dataclass(frozen=True)
class Verdict:
    """What to take.

    Attributes:
        margin: In points of accuracy.
        save: A key of SAVE.
        best: The method with the highest accuracy, over its seeds where it has several.
        methods: All that were judged, the cheapest first.
        taken: The cheapest one that is shown to be within the margin; None where none is.
        text: The verdict in two or three sentences.
        method: How it was reached, in two.
    """

    margin: float
    save: str
    best: str
    methods: dict[str, Shown]
    taken: str | None
    text: str
    method: str

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return f"### {self.text}\n\n{self.method}"


def cost(comparison: Comparison, name: str, save: str) -> float:
    """What a method costs in seconds or bytes, of several seeds the median.

    What trains no language model has no peak memory and no artefact in the records: it counts as 0. Its time is the
    time to fit it.
    """
    if name in comparison.tuned():
        field = {"time": "seconds", "memory": "peak_memory_bytes", "artefact size": "artefact_bytes"}[save]
        return statistics.median(getattr(training, field) for training in comparison.trainings(name))
    fitted = comparison.baselines.get(name)
    return (fitted.fit_seconds or 0.0) if fitted and save == "time" else 0.0


def show(
    labels: Sequence[str],
    names: Sequence[str],
    outcomes: Callable[[str, str], tuple[np.ndarray, np.ndarray]],
    margin: float,
) -> dict[str, Shown]:
    """Test of each method: is it worse than no other by the margin or more?

    Which method is the best is not known, and the one with the highest accuracy may be it by luck. So each method is
    tested against every other, and counts as shown only if all of these one-sided tests reject: an intersection-union
    test at the level of each (Berger 1982, Technometrics 24:295-300), which asks what Hsu's comparison with the best
    asks (1981, Annals of Statistics 9:1026-1034). Holm's correction over the methods (1979) then keeps the chance of
    any wrong "no worse" at 5 %, so that the cheapest may be picked from those that are shown.

    Args:
        labels: The true labels, row by row.
        names: The methods.
        outcomes: Gives, of two methods, whether their trainings are right, as `stats.no_worse` takes them.
        margin: In points.
    """
    level = stats.SIGNIFICANT / max(len(names), 1)
    tests = {
        name: [stats.no_worse(labels, *outcomes(name, other), margin / 100, level) for other in names if other != name]
        for name in names
    }
    p_values = {name: max((p for p, _ in found), default=0.0) for name, found in tests.items()}
    corrected = stats.holm(list(p_values.values()))
    return {
        name: Shown(p_values[name], p_corrected, max((rows for _, rows in tests[name]), default=0.0))
        for name, p_corrected in zip(names, corrected, strict=True)
    }


def decide(comparison: Comparison, margin: float = MARGIN, save: str = "time") -> Verdict:
    """The verdict on everything in the tables that answers the task.

    Raises:
        UserError: The margin is not above 0, or nothing of that name can be saved.
    """
    if not 0 < margin < 100:
        raise UserError(f"the margin is {margin}: give points of accuracy above 0 and below 100, for example 1.0")
    if save not in SAVE:
        raise UserError(f"save is {save!r}: choose one of {', '.join(map(repr, SAVE))}")
    names = comparison.answering()
    shown = show(comparison.labels, names, comparison.outcomes, margin)
    costs = {name: cost(comparison, name, save) for name in names}
    names.sort(key=costs.__getitem__)
    # Of equal accuracies the cheaper one.
    best = max(names, key=lambda name: comparison.right(name).mean())
    taken = next((name for name in names if shown[name].corrected_p < stats.SIGNIFICANT), None)
    best_accuracy = percent(float(comparison.right(best).mean()))
    points = f"{margin:g} point{'s' * (margin != 1)}"
    if len(names) == 1:
        text = f"Only {spoken(best)} was evaluated. It gets {best_accuracy} %."
    elif taken is None:
        rows = min(of.rows for of in shown.values())
        needed = f"About {_round_up(rows):,} test rows would decide." if rows < np.inf else "More seeds would decide."
        text = (
            f"No method is shown to be within {points} of the best. {sentence(spoken(best))} has the highest accuracy, "
            f"{best_accuracy} %. {needed}"
        )
    elif taken == best:
        cheaper = names.index(best) > 0
        rest = f"No cheaper method is shown to be within {points}." if cheaper else "No method is cheaper."
        text = f"Take {spoken(taken)}. It gets {best_accuracy} %, the highest accuracy. {rest}"
    else:
        high = comparison.pair(best, taken).judged.high
        text = (
            f"Take {spoken(taken)}. It gets {percent(float(comparison.right(taken).mean()))} %; {spoken(best)} is at "
            f"most {one_decimal(high)} points better (95 % interval)"
        )
        factor = costs[best] / costs[taken] if costs[taken] else 0
        text += f" and needs {factor:.2g} x the {SAVE[save]}." if factor >= 1.05 else "."
    text += _caution(comparison, dict.fromkeys([taken or best, best]))
    method = (
        f"Margin {points}; what to save: {SAVE[save]}. We test each of {len(names)} methods against all others on the "
        "same test rows (one-sided, 5 %, Holm's correction)."
    )
    if comparison.tuned() and not comparison.over_seeds:
        method += " Each method was trained once: another seed may change the verdict."
    return Verdict(margin, save, best, {name: shown[name] for name in names}, taken, text, method)


def _caution(comparison: Comparison, names: Iterable[str]) -> str:
    """A sentence where many test rows repeat rows of other splits, with the accuracy on the others."""
    rows, repeated = len(comparison.labels), sum(comparison.repeated)
    if repeated < MANY * rows:
        return ""
    places = f"{comparison.repeated_splits} rows"
    if repeated == rows:
        return f" But all test rows repeat {places}: these figures show memory alone."
    alone = {spoken(name): percent(comparison.without_duplicates[name].accuracy) for name in names}
    found = listed([f"{name} gets {accuracy} %" for name, accuracy in alone.items()])
    return f" But {repeated:,} of {rows:,} test rows repeat {places}. On the other {rows - repeated:,}, {found}."


def _round_up(rows: float) -> int:
    """To two digits: more would look like more than an estimate."""
    step = 10 ** max(math.floor(math.log10(max(rows, 1))) - 1, 0)
    return math.ceil(rows / step) * step
