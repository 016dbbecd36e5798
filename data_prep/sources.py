"""Where rows come from: the hub, a folder of CSV files, or a task's built-in sample.

Every source yields `Row`s split by split, one by one, so that memory does not grow with the rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_prep.errors import DataError, UserError
from data_prep.files import Split, file_digest
from data_prep.task import Columns, Task


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


@dataclass(frozen=True)
class CsvFolder:
    """A folder with `train.csv`, `test.csv` and perhaps `validation.csv`: the task's label column, then its texts.

    Raises:
        DataError: A file is missing, or a row is not UTF-8 text with these columns and a known label.
    """

    folder: Path
    task: Task
    name: str = "csv"

    def splits(self) -> tuple[Split, ...]:
        for required in ("train", "test"):
            if not self._path(required).is_file():
                raise DataError(self._path(required), "no such file; the folder must hold train.csv and test.csv")
        has_validation = self._path("validation").is_file()
        return ("train", "validation", "test") if has_validation else ("train", "test")

    def rows(self, split: Split) -> Iterator[Row]:
        path = self._path(split)
        names = [self.task.csv.label, *self.task.csv.texts]
        reader = csv.reader(_decoded_lines(path), strict=True)
        # A row may span lines: it is reported by the one that it begins on.
        begin = 1
        try:
            for row in reader:
                # Some copies of the files carry a header; AG News' original does not.
                is_header = begin == 1 and [column.strip().lower() for column in row] == [n.lower() for n in names]
                if not is_header:
                    if len(row) != len(names):
                        what = f"{len(row)} columns instead of {len(names)} ({', '.join(names)})"
                        raise DataError(path, what, begin)
                    yield _checked(row[0], row[1:], self.task.csv, path, begin)
                begin = reader.line_num + 1
        except csv.Error as error:
            raise DataError(path, f"not valid CSV ({error}); is the file cut short?", begin) from error

    def provenance(self) -> dict[str, Any]:
        return {
            "kind": self.name,
            "sha256": {f"{split}.csv": file_digest(self._path(split)) for split in self.splits()},
        }

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
    """A data set of the Hugging Face hub with the task's columns.

    Raises:
        UserError: The hub cannot be reached and no cached copy exists, or the columns are others.
    """

    dataset: str
    task: Task
    revision: str | None = None
    name: str = "hub"
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in ("train", "validation", "test") if split in self._load())

    def rows(self, split: Split) -> Iterator[Row]:
        columns = self.task.hub
        for number, row in enumerate(self._load()[split], start=1):
            texts = [row[name] or "" for name in columns.texts]
            yield _checked(row[columns.label], texts, columns, f"{self.dataset}/{split}", number)

    def provenance(self) -> dict[str, Any]:
        checksums = self._load()["train"].info.download_checksums or {}
        return {
            "kind": self.name,
            "dataset": self.dataset,
            "revision": self.revision,
            "files": sorted(checksums),
        }

    def _load(self) -> dict[str, Any]:
        if not self._loaded:
            # Imported here: it takes seconds, and the other sources do not need it.
            from datasets import load_dataset

            try:
                loaded = load_dataset(self.dataset, revision=self.revision)
            except Exception as error:
                # The library raises a dozen unrelated types for "no network"; the remedy is the same for all.
                raise UserError(
                    f"the data set {self.dataset} could not be loaded from the hub ({type(error).__name__}: {error}); "
                    "check the network, or use source=csv with data_path=FOLDER, or source=sample"
                ) from error
            there, needed = set(loaded["train"].column_names), {*self.task.hub.texts, self.task.hub.label}
            if not needed <= there:
                raise UserError(
                    f"the data set {self.dataset} has the columns {sorted(there)}; {sorted(needed)} are needed"
                )
            self._loaded.update(loaded)
        return self._loaded


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


def _decoded_lines(path: Path) -> Iterator[str]:
    """The file's lines, decoded one by one so that an undecodable byte is reported with its line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(path, f"not UTF-8 ({error.reason}, byte {error.start + 1})", number) from error
    except FileNotFoundError as error:
        raise DataError(path, "no such file") from error


def _checked(value: Any, texts: list[str], columns: Columns, where: str | Path, line: int) -> Row:
    label = columns.values.get(str(value).strip())
    if label is None:
        known = [name if key == name else f"{key} ({name})" for key, name in columns.values.items()]
        raise DataError(where, f"unknown {columns.label} '{value}'; known are: {', '.join(known)}", line)
    if not any(text.strip() for text in texts):
        raise DataError(where, f"empty text: nothing in {' and '.join(columns.texts)}", line)
    return Row(tuple(text.strip() for text in texts), label)
