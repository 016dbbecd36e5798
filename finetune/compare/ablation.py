"""What one changed setting costs: two folders of records that differ in exactly one thing, run by run.

A comparison never puts such records into one table. Here the same run stands against itself, on the same test rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep import DataError, UserError
from finetune.compare import answer, comparison
from finetune.compare import stats as pairs
from finetune.compare import tables as costs
from finetune.compare.comparison import Comparison
from finetune.compare.stats import OverSeeds, Pair
from finetune.compare.variants import HARMLESS
from finetune.records import DataReference, RunRecord, Training
from finetune.settings import meaning
from finetune.wording import (
    NAMES,
    capitalised,
    format_p,
    interval_of,
    listed,
    one_decimal,
    or_none,
    sentence,
    spoken,
    value_in_words,
)

# What says how a run was judged, or which of its trainings it is: test rows and seeds are compared themselves.
NO_DIFFERENCE = HARMLESS | {"test_rows", "seed", "variant"}
# What else of the data a setting changes: the articles and their labels stay.
RENDERED_BY = {"prompt": {"prompt", "fingerprint"}, "normalise": {"fingerprint"}}


class NoContrast(UserError):
    """Two folders that differ in nothing, in more than one thing, or in what must be the same."""


@dataclass(frozen=True)
class Change:
    """The setting that differs, with its value in the folder in question and in the one that it is held against."""

    name: str
    value: Any
    other: Any

    @property
    def title(self) -> str:
        """`Loss on all tokens instead of loss on the answer alone`."""
        words, others = (value_in_words(self.name, value) for value in (self.value, self.other))
        if words and others:
            return capitalised(f"{words} instead of {others}")
        return f"With {self.name}={self.value} instead of {self.name}={self.other}"


@dataclass(frozen=True)
class Contrast:
    """The runs of one folder against the same runs of another.

    Attributes:
        mine: The folder in question.
        other: The folder that it is held against.
        change: What differs.
        pairs: A pair a run that the change concerns, this folder minus the other, corrected for their number.
        left_out: The other runs, each with the reason.
    """

    mine: Comparison
    other: Comparison
    change: Change
    pairs: list[Pair]
    left_out: dict[str, str]

    @property
    def title(self) -> str:
        return self.change.title

    @property
    def meaning(self) -> str:
        """What the changed setting is."""
        return meaning(self.change.name)

    def table(self) -> pd.DataFrame:
        """Accuracies, differences, tests and costs (of the same machines), a line a run; an arrow leads from the other
        folder to this one."""
        return pd.DataFrame({NAMES[pair.first]: self._line(pair) for pair in self.pairs}).T

    def answer(self) -> str:
        """The contrast in one paragraph, true whatever the figures are."""
        return _paragraph(self)

    def provenance(self) -> str:
        """Both folders, with the commits and machines that their figures come from."""
        return f"{self._source(self.mine)} against {self._source(self.other)}"

    def trainings(self) -> dict[str, tuple[list[Training], list[Training]]]:
        """What each run's trainings cost, in this folder and in the other; empty where these were other machines."""
        both = {
            pair.first: (self.mine.trainings(pair.first), self.other.trainings(pair.first))
            for pair in self.pairs
            if pair.first in self.mine.tuned()
        }
        same = all(
            ours.environment.machine == theirs.environment.machine
            for mine, other in both.values()
            for ours, theirs in zip(mine, other, strict=True)
        )
        return both if same else {}

    def _source(self, side: Comparison) -> str:
        found = [where for pair in self.pairs for where in side.records[pair.first].environments]
        commits = _distinct(where.short_commit for where in found)
        return f"{side.profile} (commit {listed(commits)}; {listed(_distinct(where.machine for where in found))})"

    def _line(self, pair: Pair) -> dict[str, str]:
        """First what the verdict rests on, then, beside several seeds, the first one alone, then costs."""
        run, several = pair.first, any(of.over_seeds for of in self.pairs)
        seeds = self.mine.first_seed
        means = [100 * side.right(run).mean() for side in (self.other, self.mine)]
        line = {
            f"{'mean ' * several}accuracy %": _arrow(means, ".1f"),
            "points (95 % interval)": _difference(pair.judged),
            "p, corrected": format_p(pair.judged.corrected_p),
            "verdict": "tie" if pair.is_tie else _verb(pair),
            "detectable points": or_none(pair.judged.detectable),
        }
        if several:
            alone = [100 * side.scoring[run].accuracy for side in (self.other, self.mine)]
            line |= {
                f"accuracy % ({seeds})": _arrow(alone, ".1f"),
                f"points ({seeds})": _difference(pair),
                f"McNemar's p, corrected ({seeds})": format_p(pair.corrected_p),
            }
        return line | (self._costs(run) if self.trainings() else {})

    def _costs(self, run: str) -> dict[str, str]:
        """Medians over the trainings."""
        figures = {
            "training s": ("seconds", 1, ".0f"),
            "articles/s": ("articles_per_second", 1, ",.0f"),
            "real tokens/s": ("tokens_per_second", 1, ",.0f"),
            "peak memory GB": ("peak_memory_bytes", 1e-9, ".1f"),
        }
        if run not in self.trainings():
            return dict.fromkeys(figures, "-")
        mine, other = self.trainings()[run]
        return {
            title: _arrow([scale * costs.middle(of, name) for of in (other, mine)], form)
            for title, (name, scale, form) in figures.items()
        }


def _difference(of: Pair | OverSeeds) -> str:
    return f"{one_decimal(of.points, '+')} ({interval_of(of.low, of.high, '+')})"


def load(folder: Path, other: Path) -> Contrast:
    """Contrast the records in `folder` with those in `other`.

    Raises:
        NoContrast: They do not differ in exactly one thing.
        DataError: One of the two holds no records, or broken ones.
    """
    for path in (folder, other):
        if not path.is_dir():
            raise DataError(path, "no such folder; name one that holds a folder of records for each run")
    return between(*(comparison.load_folder(path, str(path)) for path in (folder, other)))


def between(mine: Comparison, other: Comparison) -> Contrast:
    """Contrast two folders of records.

    Raises:
        NoContrast: They are of other models, data, test rows or seeds, or do not differ in exactly one setting.
    """
    shared = [run for run in mine.records if run in other.records]
    _require_same_model(mine, other)
    differences = {run: _differences(mine.records[run], other.records[run]) for run in shared}
    concerned = {run: found for run, found in differences.items() if found}
    _require_same_data(mine, other, shared, {name for found in concerned.values() for name in found})
    change = _only_change(mine, other, concerned)
    _require_same_rows(mine, other)
    _require_same_seeds(mine, other, concerned)
    return Contrast(mine, other, change, _pairs(mine, other, concerned), _left_out(mine, other, concerned))


def _differences(mine: RunRecord, other: RunRecord) -> dict[str, tuple[Any, Any]]:
    """The settings in which two records of a run differ, with both values; of the engine, the one that ran."""
    # Where the data lay tells nothing of data that is the same.
    same_place = {"data_path"} if mine.data.fingerprint == other.data.fingerprint else set()
    settings, others = (record.settings | {"engine": record.engine} for record in (mine, other))
    both = {
        name: (settings.get(name, "not recorded"), others.get(name, "not recorded"))
        for name in sorted((settings.keys() | others.keys()) - NO_DIFFERENCE - same_place)
    }
    return {name: values for name, values in both.items() if values[0] != values[1]}


def _only_change(mine: Comparison, other: Comparison, concerned: Mapping[str, dict[str, tuple[Any, Any]]]) -> Change:
    """The one change, which is the same in all runs that it concerns."""
    runs: dict[Change, list[str]] = {}
    for run, found in concerned.items():
        for name, values in found.items():
            runs.setdefault(Change(name, *values), []).append(NAMES[run])
    both = f"{mine.profile} and {other.profile}"
    if not runs:
        raise NoContrast(f"{both} differ in no setting: there is nothing to contrast")
    if len(runs) > 1:
        described = [f"{of.name} ({of.value}, and {of.other}; {listed(names)})" for of, names in runs.items()]
        raise NoContrast(f"{both} differ in more than one thing, and a contrast is of one: {listed(described)}")
    return next(iter(runs))


def _require_same_model(mine: Comparison, other: Comparison) -> None:
    models = [side.any_record.model for side in (mine, other)]
    if models[0] != models[1]:
        raise NoContrast(
            f"the model is {models[0]} in {mine.profile}, and {models[1]} in {other.profile}: "
            "a contrast needs the same model"
        )


def _require_same_data(mine: Comparison, other: Comparison, shared: Iterable[str], changed: set[str]) -> None:
    """The same data, but for how a changed setting renders it."""
    rendered = {what for name in changed for what in RENDERED_BY.get(name, set())}
    for run in shared:
        for what in (name for name in DataReference.model_fields if name not in rendered):
            value, against = (getattr(side.records[run].data, what) for side in (mine, other))
            if value != against:
                raise NoContrast(
                    f"{what} is {value} in {mine.profile}/{run}, and {against} in {other.profile}/{run}: "
                    "a contrast needs the same data"
                )


def _require_same_rows(mine: Comparison, other: Comparison) -> None:
    rows = [[(row.id, row.label) for row in side.predictions["base"]] for side in (mine, other)]
    if rows[0] != rows[1]:
        raise NoContrast(
            f"{mine.profile} and {other.profile} were evaluated on other test rows, in another order, or with other "
            "labels: a contrast is row by row"
        )


def _require_same_seeds(mine: Comparison, other: Comparison, concerned: Iterable[str]) -> None:
    for run in concerned:
        seeds = [_seeds(side, run) for side in (mine, other)]
        if seeds[0] != seeds[1]:
            have = [listed([str(seed) for seed in of]) for of in seeds]
            raise NoContrast(
                f"the seeds of {NAMES[run]} are {have[0]} in {mine.profile}, and {have[1]} in {other.profile}: "
                "a contrast needs the same seeds"
            )


def _seeds(side: Comparison, run: str) -> list[int]:
    """The seeds of a run's trainings; none of the base model, which has no training."""
    return list(side.seeds_of(run)) if run in side.tuned() else []


def _pairs(mine: Comparison, other: Comparison, concerned: Iterable[str]) -> list[Pair]:
    alone = [pairs.compare(run, run, mine.labels, mine.answers(run), other.answers(run)) for run in concerned]
    tested = [replace(pair, over_seeds=_over_seeds(mine, other, pair.first)) for pair in alone]
    return pairs.corrected(tested, len(mine.labels))


def _over_seeds(mine: Comparison, other: Comparison, run: str) -> OverSeeds | None:
    """None for a run with one seed, or none."""
    outcomes = [side.right(run) for side in (mine, other)]
    return pairs.over_seeds(mine.labels, *outcomes) if len(outcomes[0]) > 1 else None


def _left_out(mine: Comparison, other: Comparison, concerned: Iterable[str]) -> dict[str, str]:
    """The runs that are in one folder alone, or the same in both, each with that reason."""
    reasons = {}
    for run in NAMES:
        there = [side.profile for side in (mine, other) if run in side.records]
        if len(there) == 1:
            reasons[run] = f"only in {there[0]}"
        elif there and run not in concerned:
            reasons[run] = "the same in both"
    return reasons


def _paragraph(contrast: Contrast) -> str:
    """What was changed, who gains and who loses by it, what cannot be told apart, and what it cost."""
    record = contrast.mine.any_record
    clear = [pair for pair in contrast.pairs if not pair.is_tie]
    parts = [
        f"{contrast.title}, on {record.data.test_rows:,} test rows of {record.data.title} ({record.model}):",
        *_moved([pair for pair in clear if pair.judged.points < 0]),
        *_moved([pair for pair in clear if pair.judged.points > 0]),
        *_tied([pair for pair in contrast.pairs if pair.is_tie]),
        *_preferences(contrast),
        answer.test(contrast.pairs),
        *_costs(contrast),
    ]
    if contrast.left_out:
        reasons = [f"{spoken(run)} ({reason})" for run, reason in contrast.left_out.items()]
        parts.append(f"Left out: {listed(reasons)}.")
    return " ".join(parts)


def _moved(of: list[Pair]) -> list[str]:
    """`LoRA loses 2.9 points (2.3 to 3.5, p < 0.001) and QLoRA 3.1 points (...).`"""
    if not of:
        return []
    first, *others = of
    clauses = [f"{spoken(first.first)} {_verb(first)} {first.lead()}"]
    return [sentence(listed(clauses + [f"{spoken(pair.first)} {pair.lead()}" for pair in others]))]


def _verb(pair: Pair) -> str:
    return "gains" if pair.judged.points > 0 else "loses"


def _tied(of: list[Pair]) -> list[str]:
    if not of:
        return []
    if len(of) == 1:
        pair = of[0]
        return [f"The two results of {spoken(pair.first)} cannot be told apart ({pair.difference()}; {pair.power()})."]
    parts = [f"{spoken(pair.first)} ({pair.difference()}), {answer.detectable(pair)}" for pair in of]
    return [
        "The two results cannot be told apart, each with the true difference that would have been found four times in "
        f"five: {'; '.join(parts)}."
    ]


def _preferences(contrast: Contrast) -> list[str]:
    """The label that a model without tuning prefers: of its accuracy a change may be no more than a change of that."""
    sentences = []
    for run in (pair.first for pair in contrast.pairs if pair.first not in contrast.mine.tuned()):
        (label, share), (other, before) = (side.most_frequent(run) for side in (contrast.mine, contrast.other))
        where = f"{label}, for {share:.0%} of the rows, instead of {other}, for {before:.0%}"
        sentences.append(f"The most frequent label of {spoken(run)} is {where}.")
    return sentences


def _costs(contrast: Contrast) -> list[str]:
    """Training time and memory in both folders; of other machines, that they say nothing."""
    both = contrast.trainings()
    if both:
        seconds = [
            f"{spoken(run)} {costs.middle(mine, 'seconds'):.0f} s instead of {costs.middle(other, 'seconds'):.0f} s"
            for run, (mine, other) in both.items()
        ]
        memory = [f"{spoken(run)} {_peak(mine)} instead of {_peak(other)}" for run, (mine, other) in both.items()]
        medians = " (medians over the seeds)" if any(len(mine) > 1 for mine, _ in both.values()) else ""
        text = f"Training time{medians}: {listed(seconds)}; peak memory: {listed(memory)}."
        if any(one.environment.jobs > 1 for sides in both.values() for side in sides for one in side):
            text += " Other notebooks ran meanwhile: the load may have a part in the difference of the seconds."
        return [text]
    if any(pair.first in contrast.mine.tuned() for pair in contrast.pairs):
        return ["The trainings ran on different machines: their costs say nothing of the change."]
    return []


def _peak(trainings: Sequence[Training]) -> str:
    return f"{costs.middle(trainings, 'peak_memory_bytes') / 1e9:.1f} GB"


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _arrow(values: list[float], form: str) -> str:
    """`94.5 → 91.6`."""
    return " → ".join(f"{value:{form}}" for value in values)
