"""Where articles come from: the hub, a folder of the original CSV files, or the built-in sample.

Every source yields `Article`s split by split, row by row, so that memory does not grow with the rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_prep.errors import DataError, UserError
from data_prep.schema import LABELS, Article, Split
from data_prep.store import file_digest

HUB_DATASET = "fancyzhx/ag_news"
# Of the official splits (Zhang, Zhao and LeCun 2015).
AG_NEWS_ROWS: dict[Split, int] = {"train": 120_000, "test": 7_600}
SAMPLE_FOLDER = Path(__file__).parent / "sample"
# Some copies of the CSV files carry this header; the original does not.
CSV_HEADER = ["class index", "title", "description"]


class Source(Protocol):
    """What the pipeline needs of a source."""

    name: str

    def splits(self) -> tuple[Split, ...]:
        """The splits that exist; a missing validation split is cut from train."""
        ...

    def articles(self, split: Split) -> Iterator[Article]: ...

    def provenance(self) -> dict[str, Any]:
        """Where the rows come from, exactly enough to find them again."""
        ...


@dataclass(frozen=True)
class CsvFolder:
    """A folder with `train.csv`, `test.csv` and perhaps `validation.csv`: class index, title, description.

    Raises:
        DataError: A file is missing, or a row is not three columns of UTF-8 text with a class from 1 to 4.
    """

    folder: Path
    name: str = "csv"

    def splits(self) -> tuple[Split, ...]:
        for required in ("train", "test"):
            if not self._path(required).is_file():
                raise DataError(self._path(required), "no such file; the folder must hold train.csv and test.csv")
        has_validation = self._path("validation").is_file()
        return ("train", "validation", "test") if has_validation else ("train", "test")

    def articles(self, split: Split) -> Iterator[Article]:
        path = self._path(split)
        reader = csv.reader(_decoded_lines(path), strict=True)
        # A row may span lines: it is reported by the one that it begins on.
        begin = 1
        try:
            for row in reader:
                is_header = begin == 1 and [column.strip().lower() for column in row] == CSV_HEADER
                if not is_header:
                    yield _article_from_row(row, path, begin)
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


def sample() -> CsvFolder:
    """The built-in sample: invented items in AG News' form, written for this project. It is not AG News."""
    return CsvFolder(SAMPLE_FOLDER, name="sample")


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub with a `text` column and a `label` column from 0 to 3.

    Raises:
        UserError: The hub cannot be reached and no cached copy exists, or the columns are others.
    """

    dataset: str = HUB_DATASET
    revision: str | None = None
    name: str = "hub"
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in ("train", "validation", "test") if split in self._load())

    def articles(self, split: Split) -> Iterator[Article]:
        for number, row in enumerate(self._load()[split], start=1):
            yield _checked_article("", row["text"], row["label"] + 1, f"{self.dataset}/{split}", number)

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
            columns = set(loaded["train"].column_names)
            if not {"text", "label"} <= columns:
                raise UserError(
                    f"the data set {self.dataset} has the columns {sorted(columns)}; 'text' and 'label' are needed"
                )
            self._loaded.update(loaded)
        return self._loaded


def open_source(name: str, path: str | None = None) -> Source:
    """The source by its name: `sample`, `csv` (with the folder in `path`) or `hub` (a data set's name in `path`)."""
    if name == "sample":
        return sample()
    if name == "csv":
        if path is None:
            raise UserError("source=csv needs data_path: the folder that holds train.csv and test.csv")
        return CsvFolder(Path(path))
    if name == "hub":
        return Hub(path or HUB_DATASET)
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


def _article_from_row(row: list[str], path: Path, line: int) -> Article:
    if len(row) != 3:
        raise DataError(path, f"{len(row)} columns instead of 3 (class index, title, description)", line)
    return _checked_article(row[1], row[2], row[0], path, line)


def _checked_article(title: str, description: str, class_index: str | int, where: str | Path, line: int) -> Article:
    index = str(class_index).strip()
    if index not in ("1", "2", "3", "4"):
        raise DataError(where, f"unknown class '{class_index}'; the classes are 1 World to 4 Sci/Tech", line)
    if not (title.strip() or description.strip()):
        raise DataError(where, "empty text: neither title nor description", line)
    return Article(title.strip(), description.strip(), LABELS[int(index) - 1])
