"""Where rows come from: the hub, a folder of CSV files, or a task's built-in sample.

Every source yields `Row`s split by split, one by one, so that memory does not grow with the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from data_prep import csv_files
from data_prep.csv_files import CsvForm
from data_prep.errors import DataError, UserError
from data_prep.files import SPLITS, Split, file_digest
from data_prep.task import Task


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
class CsvFolder:
    """A folder with `train.csv`, `test.csv` and perhaps `validation.csv`, as `data_prep.csv_files` reads them.

    Labels are the task's own values (1 to 4), its names, or its values counted from 0. For the last, all files
    together must hold all of these and no other.

    Raises:
        DataError: A file is missing, or a row is not UTF-8 text with the task's columns and a known label.
    """

    folder: Path
    task: Task
    name: str = "csv"

    def splits(self) -> tuple[Split, ...]:
        for required in ("train", "test"):
            if not self._path(required).exists():
                # A packed file is named.
                next(csv_files.decoded_lines(self._path(required)))
        has_validation = self._path("validation").is_file()
        return ("train", "validation", "test") if has_validation else ("train", "test")

    def rows(self, split: Split) -> Iterator[Row]:
        labels, path = self._labels, self._path(split)
        for line, label, texts in csv_files.read_rows(path, self._forms[split], self._spellings):
            if not any(text.strip() for text in texts):
                columns = " and ".join(self._forms[split].columns.texts)
                raise DataError(path, f"empty text: nothing in {columns}", line)
            yield Row(tuple(text.strip() for text in texts), labels[label])

    def provenance(self) -> dict[str, Any]:
        return {
            "kind": self.name,
            "sha256": {f"{split}.csv": file_digest(self._path(split)) for split in self.splits()},
        }

    def place(self, split: Split) -> str:
        return str(self._path(split))

    def recognised(self) -> list[str]:
        names: dict[str, list[str]] = {}
        for split, form in self._forms.items():
            names.setdefault(str(form), []).append(f"{split}.csv")
        said = [f"in {' and '.join(files)} {form}" for form, files in names.items() if form]
        if "0" in map(_spelling, self._labels) and "0" not in self.task.csv.values:
            said.append(f"the labels {', '.join(self._counted_from_0)} stand for {', '.join(self.task.labels)}")
        numbers = self._counted_from_0 | self.task.csv.values
        if named := [label.strip() for label in self._labels if label.strip() not in numbers]:
            said.append(f"labels by name: {_some(named)}")
        return said

    @cached_property
    def _forms(self) -> dict[Split, CsvForm]:
        return {split: csv_files.recognise(self._path(split), self.task, self._spellings) for split in self.splits()}

    @cached_property
    def _counted_from_0(self) -> dict[str, str]:
        """The task's labels by their values minus 1, where these are 1, 2, 3 and so on."""
        values, count = self.task.csv.values, len(self.task.labels)
        if set(values) != {str(number) for number in range(1, count + 1)}:
            return {}
        return {str(number): values[str(number + 1)] for number in range(count)}

    @cached_property
    def _spellings(self) -> set[str]:
        """All ways to write a label, in lower case."""
        return {_spelling(value) for value in (*self.task.csv.values, *self.task.labels, *self._counted_from_0)}

    @cached_property
    def _labels(self) -> dict[str, str]:
        """What each label of all files stands for, as it is written there."""
        places: dict[str, tuple[Path, int]] = {}
        counts: Counter[str] = Counter()
        for split, form in self._forms.items():
            line = 0
            for line, label, _ in csv_files.read_rows(self._path(split), form, self._spellings):
                places.setdefault(label, (self._path(split), line))
                counts[label] += 1
            if not line:
                raise DataError(self._path(split), "the file holds no row")
        known = _spelled({label: label for label in self.task.labels}) | _spelled(self.task.csv.values)
        found = {_spelling(label): place for label, place in places.items()}
        # Read wrongly, 0 to 3 would pass for 1 to 4 but for one class: no other reading must be possible.
        if "0" not in known and self._counted_from_0 and self._counted_from_0.keys() <= found.keys():
            last = str(len(self.task.labels))
            if last in found:
                reason = f"the label is 0 here, and {last} in {found[last][0].name}:{found[last][1]}"
                raise DataError(found["0"][0], f"{reason}; count from 1 in all files, or from 0", found["0"][1])
            known |= self._counted_from_0
        for label, (path, line) in places.items():
            if _spelling(label) not in known:
                raise DataError(path, self._unknown(label, counts, line), line)
        return {label: known[_spelling(label)] for label in places}

    def _unknown(self, label: str, found: Counter[str], line: int) -> str:
        columns = self.task.csv
        known = [name if key == name else f"{key} ({name})" for key, name in columns.values.items()]
        what = f"unknown {columns.label} '{label}'; known are: {', '.join(known)}"
        if len(found) > 1:
            what += f"; the files have: {_some(list(found))}"
        is_header = line == 1 and not label.strip().isdecimal() and found[label] <= len(self._forms) < len(found)
        if is_header:
            what += f"; is this a header? Then its names must be {', '.join((columns.label, *columns.texts))}"
        return what

    def _path(self, split: str) -> Path:
        return self.folder / f"{split}.csv"


def sample(task: Task) -> CsvFolder:
    """A task's built-in sample: AG News' has invented items, written for this project. It is not AG News.

    Raises:
        UserError: The task has none.
    """
    if task.sample is None:
        raise UserError(f"task {task.name} has no built-in sample; use source=csv with data_path=FOLDER")
    return CsvFolder(task.sample, task, name="sample")


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
        classes = getattr(self._loaded["train"].features[self.task.hub.label], "names", None)
        said = (
            []
            if classes == list(self.task.labels)
            else ["labels by name, not by number" if classes else "labels by name"]
        )
        other = [f"'{label}' is {name}" for label, name in self._labels.items() if label != name]
        return said + ([_some(other)] if other else [])

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
        needed = [*self.task.hub.texts, self.task.hub.label]
        for split, rows in loaded.items():
            if split in SPLITS and not set(needed) <= set(rows.column_names):
                raise UserError(
                    f"the data set {self.dataset}, split {split}, has the columns {sorted(rows.column_names)}; "
                    f"{sorted(needed)} are needed"
                )
        return {split: rows.select_columns(needed) for split, rows in loaded.items()}

    def _values(self, split: Split) -> Iterator[tuple[list[str], str]]:
        """The texts and the label of each row as they are there, a class by its name."""
        columns, rows = self.task.hub, self._loaded[split]
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
        column, known = self.task.hub.label, _spelled({label: label for label in self.task.labels})
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
    """The source by its name: `sample`, `csv` (with the folder in `path`) or `hub` (a data set's name in `path`).

    Raises:
        UserError: There is no such source, or the task does not have it.
    """
    if name == "sample":
        return sample(task)
    if name == "csv":
        if path is None:
            raise UserError("source=csv needs data_path: the folder that holds train.csv and test.csv")
        return CsvFolder(Path(path), task)
    if name == "hub":
        dataset = path or task.hub_dataset
        if task.hub is None or dataset is None:
            raise UserError(f"task {task.name} is not on the hub; use source=csv with data_path=FOLDER")
        return Hub(dataset, task)
    raise UserError(f"unknown source '{name}'; the sources are: sample, csv, hub")


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
