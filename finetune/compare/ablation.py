"""Ablations: two folders of records that differ in exactly one setting, run by run, on the same test rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep import DataError, UserError
from finetune.compare import comparison, stats, tables
from finetune.compare.comparison import HARMLESS, Comparison, check_comparable
from finetune.compare.stats import OverSeeds, Pair
from finetune.config.plan import meaning
from finetune.records import RunRecord
from finetune.wording import NAMES, format_p, interval_of, listed, one_decimal, sentence, spoken

# What says how a run was judged, or which of its trainings it is: test rows and seeds are compared themselves.
NO_DIFFERENCE = HARMLESS | {"test_rows", "seed", "variant"}
# What else of the data a setting changes: the articles and their labels stay.
RENDERED_BY = {"prompt": {"prompt", "fingerprint"}, "normalise": {"fingerprint"}}


class NoAblation(UserError):
    """Two folders that differ in no setting, or in more than one."""


@dataclass(frozen=True)
class Change:
    """The setting that differs, with its value in the folder in question and in the one that it is compared with."""

    name: str
    value: Any
    other: Any

    @property
    def title(self) -> str:
        """`With r=8 instead of r=16`."""
        return f"With {self.name}={self.value} instead of {self.name}={self.other}"


@dataclass(frozen=True)
class Ablation:
    """The runs of one folder against the same runs of another.

    Attributes:
        mine: The folder in question.
        other: The folder that it is compared with.
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

    def tables(self) -> list[pd.DataFrame]:
        """Accuracies with their tests; of several seeds the first alone; costs, where both ran on the same machines.

        A line a run; an arrow leads from the other folder to this one. All are narrow enough for a terminal.
        """
        seeds, lines, first, costs = self.mine.first_seed, {}, {}, {}
        for pair in self.pairs:
            run, sides = pair.first, (self.other, self.mine)
            lines[NAMES[run]] = {
                "accuracy %": _arrow([100 * side.right(run).mean() for side in sides], ".1f"),
                "points (95 % interval)": _difference(pair.judged),
                "p, corrected": format_p(pair.judged.corrected_p),
                "result": "tie" if pair.is_tie else "better" if pair.judged.points > 0 else "worse",
            }
            if pair.over_seeds:
                first[NAMES[run]] = {
                    f"accuracy %, {seeds}": _arrow([100 * side.scoring[run].accuracy for side in sides], ".1f"),
                    "points (95 % interval)": _difference(pair),
                    "McNemar's p, corrected": format_p(pair.corrected_p),
                }
            if run in self.mine.tuned() and self.same_machines():
                both = [side.trainings(run) for side in sides]
                costs[NAMES[run]] = {
                    title: _arrow([scale * tables.median(of, name) for of in both], form)
                    for title, name, scale, form in (
                        ("training s", "seconds", 1, ".0f"),
                        ("samples/s", "articles_per_second", 1, ",.0f"),
                        ("tokens/s", "tokens_per_second", 1, ",.0f"),
                        ("memory GB", "peak_memory_bytes", 1e-9, ".1f"),
                    )
                }
        return [pd.DataFrame.from_dict(of, orient="index") for of in (lines, first, costs) if of]

    def same_machines(self) -> bool:
        """Whether the trainings ran on the same machines in both folders: only then are their costs comparable."""
        return all(
            ours.environment.machine == theirs.environment.machine
            for run in (pair.first for pair in self.pairs if pair.first in self.mine.tuned())
            for ours, theirs in zip(self.mine.trainings(run), self.other.trainings(run), strict=True)
        )

    def notes(self) -> list[str]:
        """What a reader has to know of these figures, in sentences."""
        where = f"{len(self.mine.labels):,} test rows of {self.mine.any_record.data.title}"
        found = [f"{self.change.name}: {self.meaning}", f"Measured on {where} with {self.mine.any_record.model}."]
        if not self.same_machines():
            found.append("The trainings ran on different machines, so we do not compare their costs.")
        # Of an untuned model a change of its accuracy may be no more than a change of the label that it prefers.
        for run in (pair.first for pair in self.pairs if pair.first not in self.mine.tuned()):
            (label, share), (other, before) = (side.most_frequent(run) for side in (self.mine, self.other))
            found.append(
                f"{sentence(spoken(run))} now answers {label} most often, for {share:.0%} of the rows. "
                f"Before, it was {other}, for {before:.0%}."
            )
        if self.left_out:
            reasons = [f"{NAMES[run]} ({reason})" for run, reason in self.left_out.items()]
            found.append(f"Left out: {listed(reasons)}.")
        return found

    def provenance(self) -> str:
        """Both folders, with the commits and machines that their figures come from."""
        sides = []
        for side in (self.mine, self.other):
            where = [of for pair in self.pairs for of in side.records[pair.first].environments]
            commits = list(dict.fromkeys(of.short_commit for of in where))
            machines = list(dict.fromkeys(of.machine for of in where))
            sides.append(f"{side.profile} (commit {listed(commits)}; {listed(machines)})")
        return " against ".join(sides)


def load(folder: Path, other: Path) -> Ablation:
    """Compare the records in `folder` with those in `other`.

    Raises:
        NoAblation: They do not differ in exactly one setting.
        DataError: One of the two holds no records, broken ones, or (NotComparable) records on other data.
    """
    for path in (folder, other):
        if not path.is_dir():
            raise DataError(path, "no such folder; name one that holds a folder of records for each run")
    return between(*(comparison.load_folder(path, str(path)) for path in (folder, other)))


def between(mine: Comparison, other: Comparison) -> Ablation:
    """Compare two folders of records.

    Raises:
        NotComparable: They are of other models, data, test rows or seeds.
        NoAblation: They do not differ in exactly one setting.
    """
    shared = [run for run in mine.records if run in other.records]
    differences = {run: _differences(mine.records[run], other.records[run]) for run in shared}
    concerned = {run: found for run, found in differences.items() if found}
    changed = {name for found in concerned.values() for name in found}
    rendered = {what for name in changed for what in RENDERED_BY.get(name, set())}
    for run in shared:
        sides = {Path(side.profile) / run: side for side in (other, mine)}
        facts = {place: comparison.facts(side.records[run], side.predictions[run]) for place, side in sides.items()}
        check_comparable(facts, may_differ=rendered)
    change = _only_change(mine, other, concerned)
    for run in concerned.keys() & mine.tuned().keys():
        check_comparable({Path(side.profile) / run: {"seeds": side.seeds_of(run)} for side in (other, mine)})

    pairs = [
        replace(
            stats.compare(run, run, mine.labels, mine.answers(run), other.answers(run), mine.classes),
            over_seeds=stats.over_seeds(mine.labels, mine.right(run), other.right(run)),
        )
        for run in concerned
    ]
    left_out = {}
    for run in NAMES:
        there = [side.profile for side in (mine, other) if run in side.records]
        if there and run not in concerned:
            left_out[run] = f"only in {there[0]}" if len(there) == 1 else "the same in both"
    return Ablation(mine, other, change, stats.corrected(pairs), left_out)


def _differences(mine: RunRecord, other: RunRecord) -> dict[str, tuple[Any, Any]]:
    """The settings in which two records of a run differ, with both values; of the engine, the one that ran."""
    # Where the data lay tells nothing of data that is the same.
    same_place = {"data_path"} if mine.data.fingerprint == other.data.fingerprint else set()
    settings, others = (
        record.settings | {"engine": record.engine, "task": record.data.task} for record in (mine, other)
    )
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
        raise NoAblation(f"{both} differ in no setting: there is nothing to compare")
    if len(runs) > 1:
        described = [f"{of.name} ({of.value}, and {of.other}; {listed(names)})" for of, names in runs.items()]
        raise NoAblation(
            f"{both} differ in more than one setting: {listed(described)}; compare folders with one change"
        )
    return next(iter(runs))


def _difference(of: Pair | OverSeeds) -> str:
    return f"{one_decimal(of.points, '+')} ({interval_of(of.low, of.high, '+')})"


def _arrow(values: Iterable[float], form: str) -> str:
    """`94.5 → 91.6`."""
    return " → ".join(f"{value:{form}}" for value in values)
