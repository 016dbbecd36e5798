"""Where rows come from: a table in files, the hub, or a task's built-in sample.

Every source yields `Row`s split by split, one by one, so that memory does not grow with the rows.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import csv_files, splits, tables
from data_prep.csv_files import CsvForm, TextRow, Wanted
from data_prep.errors import DataError, UserError
from data_prep.files import SPLITS, Split, file_digest
from data_prep.hub import Hub
from data_prep.rows import LEAVE_OUT, Row, Source, some, spelled, spelling
from data_prep.task import Columns, Task
from data_prep.text_files import ending, how_read

LABEL_NAMES = ("label", "class", "category")


@dataclass(frozen=True)
class Files:
    """A table in files: a folder of `train`, `test` and perhaps `validation` files, or one file for all splits.

    Labels are the task's own values (1 to 4), its names, or its values counted from 0. For the last, all files
    together must hold all of these and no other.

    Args:
        at: The folder or the file, or a file for each split.
        task: The columns are those of its source of this name.
        name: `csv`: a folder of the form that the task describes; `files`: the task's own; `sample`: built in.

    Raises:
        DataError: A file is missing, or a row is not text in UTF-8 with the task's columns and a known label.
    """

    at: Path | Mapping[str, Path]
    task: Task
    name: str = "csv"

    def splits(self) -> tuple[Split, ...]:
        if "all" in self._paths:
            return SPLITS
        if not self.task.is_split:
            raise DataError(
                next(iter(self._paths.values())),
                f"the files are split already: set splits.by to given in task {self.task.name}, or name one file",
            )
        return tuple(split for split in SPLITS if split in self._paths)

    def rows(self, split: Split) -> Iterator[Row]:
        labels, part = self._labels, self._part(split)
        columns, path = self._columns(part), self._paths[part]
        for number, (line, label, texts, _) in enumerate(self._read(part)):
            if part == "all" and self._assigned[number] != SPLITS.index(split):
                continue
            if not any(text.strip() for text in texts):
                raise DataError(path, f"empty text: nothing in {' and '.join(columns.texts)}; {LEAVE_OUT}", line)
            yield Row(tuple(text.strip() for text in texts), labels[label])

    def provenance(self) -> dict[str, Any]:
        self.splits()
        return {"kind": self.name, "sha256": {path.name: file_digest(path) for path in self._paths.values()}}

    def place(self, split: Split) -> str:
        part = self._part(split)
        return f"{self._paths[part]}, split {split}" if part == "all" else str(self._paths[part])

    def recognised(self) -> list[str]:
        names: dict[str, list[str]] = {}
        for part, path in self._paths.items():
            form = (how_read(path, self._table.encoding), str(self._forms.get(part, "")))
            names.setdefault(", ".join(filter(None, form)), []).append(path.name)
        said = [f"in {' and '.join(files)} {form}" for form, files in names.items() if form]
        if self._table.skip_incomplete:
            left_out = sum(
                sum(1 for _ in self._read_all(part)) - sum(1 for _ in self._read(part)) for part in self._paths
            )
            said.append(f"rows without text or label, left out: {left_out:,}")
        if self._counted_from_0 and "0" in map(spelling, self._labels) and "0" not in self._table.values:
            said.append(f"the labels {', '.join(self._counted_from_0)} stand for {', '.join(self.task.labels)}")
        if self._table.values:
            numbers = set(map(spelling, self._counted_from_0 | self._table.values))
            if named := [label.strip() for label in self._labels if spelling(label) not in numbers]:
                said.append(f"labels by name: {some(named)}")
        return said

    @cached_property
    def _table(self) -> Columns:
        return self.task.sources["csv" if self.name == "sample" else self.name]

    @cached_property
    def _paths(self) -> dict[str, Path]:
        """The file of each split, or one for `all`."""
        return tables.find_files(self.at, self.task.is_split)

    def _part(self, split: Split) -> str:
        return "all" if "all" in self._paths else split

    @cached_property
    def _wanted(self) -> list[Wanted]:
        """The columns to look for. In a folder that a user brings, those of the hub's form will do, and a label's
        column by one of its usual names."""
        named = [self._table]
        if self.name != "files":
            named = [self.task.sources[kind] for kind in ("csv", "hub") if kind in self.task.sources]
        usual = () if self.name == "files" else LABEL_NAMES
        key = self.task.splits.column if self.task.splits and "all" in self._paths else None
        return [
            Wanted(label, columns.texts, key)
            for columns in named
            for label in (columns.label, *usual)
            if label not in columns.texts
        ]

    @cached_property
    def _forms(self) -> dict[str, CsvForm]:
        """How the CSV files are written."""
        return {
            part: csv_files.recognise(path, self._wanted, self._table.names, self._spellings, self._table.encoding)
            for part, path in self._paths.items()
            if ending(path) in tables.CSV
        }

    def _columns(self, part: str) -> Wanted:
        return self._forms[part].wanted if part in self._forms else self._wanted[0]

    def _read(self, part: str) -> Iterator[TextRow]:
        """The rows of a file, without those that the task leaves out."""
        for row in self._read_all(part):
            if not self._table.skip_incomplete or (row.label.strip() and any(text.strip() for text in row.texts)):
                yield row

    def _read_all(self, part: str) -> Iterator[TextRow]:
        if part in self._forms:
            return csv_files.read_rows(self._paths[part], self._forms[part], self._spellings)
        return tables.read(self._paths[part], self._wanted[0], self._table.encoding)

    @cached_property
    def _assigned(self) -> np.ndarray:
        """The split of each row of a single file."""
        path = self._paths["all"]
        if self.task.is_split:
            raise DataError(path, f"one file: set splits.by in the description of task {self.task.name}")
        labels, keys = zip(*((self._labels[row.label], row.key) for row in self._read("all")), strict=True)
        try:
            return splits.assign(self.task.splits, labels, keys)
        except ValueError as error:
            raise DataError(path, str(error)) from error

    @cached_property
    def _counted_from_0(self) -> dict[str, str]:
        """The task's labels by their values minus 1, where these are 1, 2, 3 and so on."""
        values, count = self._table.values, len(self.task.labels)
        if set(values) != {str(number) for number in range(1, count + 1)}:
            return {}
        return {str(number): values[str(number + 1)] for number in range(count)}

    @cached_property
    def _spellings(self) -> set[str]:
        """All ways to write a label, in lower case."""
        return {spelling(value) for value in (*self._table.values, *self.task.labels, *self._counted_from_0)}

    @cached_property
    def _labels(self) -> dict[str, str]:
        """What each label of all files stands for, as it is written there."""
        places: dict[str, tuple[Path, int]] = {}
        counts: Counter[str] = Counter()
        for part, path in self._paths.items():
            line = 0
            for line, label, *_ in self._read(part):
                places.setdefault(label, (path, line))
                counts[label] += 1
            if not line:
                raise DataError(path, "the file holds no row")
        meant = {label: label for label in self.task.labels} | self._table.values
        known = spelled({label: label for label in self.task.labels}) | spelled(self._table.values)
        found = {spelling(label): place for label, place in places.items()}
        # Read wrongly, 0 to 3 would pass for 1 to 4 but for one class: no other reading must be possible.
        if "0" not in known and self._counted_from_0 and self._counted_from_0.keys() <= found.keys():
            last = str(len(self.task.labels))
            if last in found:
                reason = f"the label is 0 here, and {last} in {found[last][0].name}:{found[last][1]}"
                raise DataError(found["0"][0], f"{reason}; count from 1 in all files, or from 0", found["0"][1])
            known |= self._counted_from_0
            meant |= self._counted_from_0
        for label, (path, line) in places.items():
            if label not in meant and spelling(label) not in known:
                raise DataError(path, self._unknown(label, counts, line), line)
        if not self._table.merge_spellings:
            self._refuse_two_spellings(places, meant)
        return {label: meant.get(label) or known[spelling(label)] for label in places}

    def _refuse_two_spellings(self, places: Mapping[str, tuple[Path, int]], meant: Mapping[str, str]) -> None:
        """`sports ` beside `Sports` may be another label, or the same by mistake: the task must say which."""
        first: dict[str, str] = {}
        for label, (path, line) in places.items():
            other = first.setdefault(spelling(label), label)
            if other != label and not (label in meant and other in meant):
                where = f"{places[other][0].name}:{places[other][1]}"
                raise DataError(
                    path,
                    f"the label is {label!r} here, and {other!r} in {where}; if they are one, set "
                    f"merge_spellings: true in sources.{self.name} of task {self.task.name}, else list both as labels",
                    line,
                )

    def _unknown(self, label: str, found: Counter[str], line: int) -> str:
        columns, wanted = self._table, self._wanted[0]
        if not label.strip() and not columns.values:
            return f"no label: nothing in {columns.label}; {LEAVE_OUT}"
        known = [name if key == name else f"{key} ({name})" for key, name in columns.values.items()]
        what = f"unknown {columns.label} '{label}'; known are: {some(known or self.task.labels)}"
        if len(found) > 1:
            what += f"; the files have: {some(list(found))}"
        is_header = line == 1 and not label.strip().isdecimal() and found[label] <= len(self._forms) < len(found)
        if is_header and columns.names:
            what += f"; is this a header? Then its names must be {', '.join(wanted.names)}"
        return what


def sample(task: Task) -> Files:
    """A task's built-in sample: AG News' has invented items, written for this project. It is not AG News.

    Raises:
        UserError: The task has none.
    """
    if task.sample is None:
        raise UserError(f"task {task.name} has no built-in sample; use source={next(iter(task.sources))}")
    return Files(task.sample, task, name="sample")


def open_source(name: str, task: Task, path: str | None = None) -> Source:
    """The source by its name.

    Args:
        name: `sample`; `csv`, with the folder in `path`; `files`, or `hub`.
        task: Its description names columns, files and data set.
        path: Other files, or another data set.

    Raises:
        UserError: There is no such source, or the task does not have it.
    """
    if name == "sample":
        return sample(task)
    if name not in task.sources:
        raise UserError(f"task {task.name} has no source '{name}'; its sources are: {', '.join(task.kinds)}")
    at = path or task.sources[name].at
    if name == "csv" and at is None:
        raise UserError("source=csv needs data_path: the folder that holds train.csv and test.csv")
    if name == "hub":
        if not isinstance(at, str):
            raise UserError(f"task {task.name} names no data set of the hub; set data_path to one")
        return Hub(at, task)
    # A path that a user gives begins where the user is, one of a description beside the folder of descriptions.
    folder = Path() if path else task.folder
    if isinstance(at, str):
        return Files(folder / os.path.expanduser(at), task, name)
    return Files({split: folder / os.path.expanduser(file) for split, file in at.items()}, task, name)
