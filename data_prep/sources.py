"""Where rows come from: the hub, a folder of CSV files, or a task's built-in sample.

Every source yields `Row`s split by split, one by one, so that memory does not grow with the rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep import csv_files, splits, tables
from data_prep.csv_files import CsvForm, TextRow, Wanted
from data_prep.errors import DataError, UserError
from data_prep.files import SPLITS, Split, file_digest
from data_prep.task import Columns, Task

LABEL_NAMES = ("label", "class", "category")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: its text columns in the task's order, some perhaps empty, and its label."""

    texts: tuple[str, ...]
    label: str

    @property
    def text(self) -> str:
        """The text columns joined by one space, alike whether or not one of them is empty."""
        return " ".join(filter(None, self.texts))


class Source(Protocol):
    """What `prepare` needs of a source."""

    name: str
    task: Task

    def splits(self) -> tuple[Split, ...]:
        """The splits that exist; a missing validation split is cut from train."""
        ...

    def rows(self, split: Split) -> Iterator[Row]: ...

    def provenance(self) -> dict[str, Any]:
        """Where the rows come from, exactly enough to find them again."""
        ...

    def place(self, split: Split) -> str:
        """Where a split's rows are, for messages."""
        ...

    def recognised(self) -> list[str]:
        """What is remarkable of how the rows are written, and how it was read."""
        ...


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
        for path in self._paths.values():
            if not path.exists():
                # A packed file is named.
                next(csv_files.decoded_lines(path))
        return tuple(split for split in SPLITS if split in self._paths)

    def rows(self, split: Split) -> Iterator[Row]:
        labels, part = self._labels, self._part(split)
        columns, path = self._columns(part), self._paths[part]
        for number, (line, label, texts, _) in enumerate(self._read(part)):
            if part == "all" and self._assigned[number] != SPLITS.index(split):
                continue
            if not any(text.strip() for text in texts):
                raise DataError(path, f"empty text: nothing in {' and '.join(columns.texts)}", line)
            yield Row(tuple(text.strip() for text in texts), labels[label])

    def provenance(self) -> dict[str, Any]:
        self.splits()
        return {"kind": self.name, "sha256": {path.name: file_digest(path) for path in self._paths.values()}}

    def place(self, split: Split) -> str:
        return str(self._paths[self._part(split)])

    def recognised(self) -> list[str]:
        names: dict[str, list[str]] = {}
        for part, form in self._forms.items():
            names.setdefault(str(form), []).append(self._paths[part].name)
        said = [f"in {' and '.join(files)} {form}" for form, files in names.items() if form]
        if self._counted_from_0 and "0" in map(_spelling, self._labels) and "0" not in self._table.values:
            said.append(f"the labels {', '.join(self._counted_from_0)} stand for {', '.join(self.task.labels)}")
        if self._table.values:
            numbers = self._counted_from_0 | self._table.values
            if named := [label.strip() for label in self._labels if label.strip() not in numbers]:
                said.append(f"labels by name: {_some(named)}")
        return said

    @cached_property
    def _table(self) -> Columns:
        return self.task.sources["csv" if self.name == "sample" else self.name]

    @cached_property
    def _paths(self) -> dict[str, Path]:
        """The file of each split, or one for `all`."""
        return dict(self.at) if isinstance(self.at, Mapping) else tables.find_files(self.at)

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
            part: csv_files.recognise(path, self._wanted, self._table.names, self._spellings)
            for part, path in self._paths.items()
            if path.suffix.lower() in tables.CSV
        }

    def _columns(self, part: str) -> Wanted:
        return self._forms[part].wanted if part in self._forms else self._wanted[0]

    def _read(self, part: str) -> Iterator[TextRow]:
        if part in self._forms:
            return csv_files.read_rows(self._paths[part], self._forms[part], self._spellings)
        return tables.read(self._paths[part], self._wanted[0])

    @cached_property
    def _assigned(self) -> np.ndarray:
        """The split of each row of a single file."""
        path = self._paths["all"]
        if self.task.splits is None or self.task.splits.by == "given":
            raise DataError(
                path, f"one file, and task {self.task.name} splits by the files that are given; set splits.by"
            )
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
        return {_spelling(value) for value in (*self._table.values, *self.task.labels, *self._counted_from_0)}

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
        known = _spelled({label: label for label in self.task.labels}) | _spelled(self._table.values)
        found = {_spelling(label): place for label, place in places.items()}
        # Read wrongly, 0 to 3 would pass for 1 to 4 but for one class: no other reading must be possible.
        if "0" not in known and self._counted_from_0 and self._counted_from_0.keys() <= found.keys():
            last = str(len(self.task.labels))
            if last in found:
                reason = f"the label is 0 here, and {last} in {found[last][0].name}:{found[last][1]}"
                raise DataError(found["0"][0], f"{reason}; count from 1 in all files, or from 0", found["0"][1])
            known |= self._counted_from_0
            meant |= self._counted_from_0
        for label, (path, line) in places.items():
            if label not in meant and _spelling(label) not in known:
                raise DataError(path, self._unknown(label, counts, line), line)
        if not self._table.merge_spellings:
            self._refuse_two_spellings(places, meant)
        return {label: meant.get(label) or known[_spelling(label)] for label in places}

    def _refuse_two_spellings(self, places: Mapping[str, tuple[Path, int]], meant: Mapping[str, str]) -> None:
        """`sports ` beside `Sports` may be another label, or the same by mistake: the task must say which."""
        first: dict[str, str] = {}
        for label, (path, line) in places.items():
            other = first.setdefault(_spelling(label), label)
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
            return f"no label: nothing in {columns.label}; give the row a label, or leave it out"
        known = [name if key == name else f"{key} ({name})" for key, name in columns.values.items()]
        what = f"unknown {columns.label} '{label}'; known are: {_some(known or self.task.labels)}"
        if len(found) > 1:
            what += f"; the files have: {_some(list(found))}"
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


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub, or a folder that `datasets` loads, with the task's columns.

    Its labels have names, and these count: data sets number the same classes differently.

    Raises:
        UserError: It cannot be loaded, lacks a split or a column, or its labels have other names or none; or a row
            lacks its text or label.
    """

    dataset: str
    task: Task
    revision: str | None = None
    name: str = "hub"

    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in SPLITS if split in self._loaded)

    def rows(self, split: Split) -> Iterator[Row]:
        for texts, label in self._values(split):
            yield Row(tuple(text.strip() for text in texts), self._labels[label])

    def provenance(self) -> dict[str, Any]:
        digests = {}
        for split in self.splits():
            digest = hashlib.sha256()
            for texts, label in self._values(split):
                digest.update(f"{json.dumps([*texts, label])}\n".encode())
            digests[split] = digest.hexdigest()
        return {"kind": self.name, "dataset": self.dataset, "revision": self.revision, "sha256": digests}

    def place(self, split: Split) -> str:
        return f"{self.dataset}, split {split}"

    def recognised(self) -> list[str]:
        classes = getattr(self._loaded["train"].features[self._table.label], "names", None)
        said = (
            []
            if classes == list(self.task.labels)
            else ["labels by name, not by number" if classes else "labels by name"]
        )
        other = [f"'{label}' is {name}" for label, name in self._labels.items() if label != name]
        return said + ([_some(other)] if other else [])

    @cached_property
    def _table(self) -> Columns:
        return self.task.sources["hub"]

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        """The splits by name, with the task's columns."""
        # Imported here: it takes seconds, and the other sources do not need it.
        from datasets import load_dataset, load_from_disk

        is_saved = Path(self.dataset, "dataset_dict.json").is_file()
        try:
            loaded = load_from_disk(self.dataset) if is_saved else load_dataset(self.dataset, revision=self.revision)
        except Exception as error:
            # The library raises a dozen unrelated types for "no network"; the remedy is the same for all.
            raise UserError(
                f"the data set {self.dataset} could not be loaded from the hub ({type(error).__name__}: {error}); "
                "check the network, or use source=csv with data_path=FOLDER, or source=sample"
            ) from error
        if missing := [split for split in ("train", "test") if split not in loaded]:
            raise UserError(
                f"the data set {self.dataset} has no {' and no '.join(missing)} split; it has {', '.join(loaded)}; "
                "divide its rows into splits named train and test"
            )
        needed = [*self._table.texts, self._table.label]
        for split, rows in loaded.items():
            if split in SPLITS and not set(needed) <= set(rows.column_names):
                raise UserError(
                    f"the data set {self.dataset}, split {split}, has the columns {sorted(rows.column_names)}; "
                    f"{sorted(needed)} are needed"
                )
        return {split: rows.select_columns(needed) for split, rows in loaded.items()}

    def _values(self, split: Split) -> Iterator[tuple[list[str], str]]:
        """The texts and the label of each row as they are there, a class by its name."""
        columns, rows = self._table, self._loaded[split]
        classes = getattr(rows.features[columns.label], "names", None)
        # In batches: row by row takes ten times as long.
        batches = (zip(*(batch[name] for name in rows.column_names), strict=True) for batch in rows.iter(1000))
        for number, (*texts, label) in enumerate(chain.from_iterable(batches), start=1):
            where = f"{self.place(split)}, row {number}"
            if not all(isinstance(text, str) for text in texts) or not any(text.strip() for text in texts):
                raise DataError(where, f"no text in {' and '.join(columns.texts)}; leave the row out")
            if label is None or (classes and label == -1):
                raise DataError(where, f"no {columns.label}; leave the row out")
            yield texts, classes[label] if classes else str(label)

    @cached_property
    def _labels(self) -> dict[str, str]:
        """What each label of all splits stands for."""
        column = self._table.label
        known = _spelled({label: label for label in self.task.labels}) | _spelled(self._table.values)
        found = dict.fromkeys(label for split in self.splits() for _, label in self._values(split))
        if unknown := [label for label in found if _spelling(label) not in known]:
            split = next(split for split in self.splits() if unknown[0] in {label for _, label in self._values(split)})
            named = _some(self.task.labels)
            if all(label.lstrip("-").isdecimal() for label in found):
                raise DataError(
                    self.place(split),
                    f"{column} holds the numbers {_some(sorted(found, key=int))} without names, and numbers alone do "
                    f"not say which class is which; write the names {named} instead, or make the column a ClassLabel "
                    "with these names in the order of the numbers",
                )
            raise DataError(
                self.place(split),
                f"{column} has {_some(sorted(found))}, and task {self.task.name} has {_some(self.task.labels)}; rename "
                "the labels, or describe a task with these",
            )
        return {label: known[_spelling(label)] for label in found}


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


def _spelling(label: str) -> str:
    """A label without what people vary: case, and blanks around it."""
    return label.strip().lower()


def _spelled(labels: Mapping[str, str]) -> dict[str, str]:
    """What labels stand for, by their spelling; one whose spelling is another's too is left out."""
    counts = Counter(map(_spelling, labels))
    return {_spelling(label): of for label, of in labels.items() if counts[_spelling(label)] == 1}


def _some(parts: Sequence[str]) -> str:
    """The first ten of a list."""
    return ", ".join(parts[:10]) + (f" and {len(parts) - 10} more" if len(parts) > 10 else "")
