"""Tables in files of other forms than CSV: JSON, JSON lines and Parquet; and the files of a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.csv_files import TextRow, Wanted
from data_prep.errors import DataError
from data_prep.files import SPLITS
from data_prep.rows import some
from data_prep.text_files import WORKBOOK, cell, decoded_lines, ending

# A workbook is read as CSV.
CSV = (".csv", ".tsv", ".txt", WORKBOOK)
# In a folder, the first of these is taken.
READ = (*CSV, ".jsonl", ".ndjson", ".json", ".parquet")
# A number of thousands of digits, or brackets in brackets.
_TOO_MUCH = "JSON that Python does not read"
_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_OTHERS = {
    ".xls": "an old workbook; save it as .xlsx",
    ".ods": "a workbook; save it as CSV",
    ".zip": "a packed file; unpack it: unzip",
}


def find_files(at: Path | Mapping[str, Path], is_given: bool = True) -> dict[str, Path]:
    """The files of a table: `all` for a single file; for a folder those of its splits.

    Args:
        at: The file or the folder, or a file for each split.
        is_given: Whether there must be test rows. If not, training rows alone are `all`.

    Raises:
        DataError: There is no such file, or its form is none that we read.
    """
    if isinstance(at, Path) and not at.is_dir():
        if not at.exists():
            raise DataError(at, "no such file")
        if ending(at) not in READ:
            what = _OTHERS.get(ending(at), "a form that we do not read")
            raise DataError(at, f"this is {what}; we read {', '.join(READ)}, also packed as .gz")
        return {"all": at}
    if isinstance(at, Path):
        names = {split: [f"{name}{form}" for name in _NAMES[split] for form in READ] for split in SPLITS}
        files = {split: [at / f"{name}{gz}" for name in of for gz in ("", ".gz")] for split, of in names.items()}
        found = {split: there[0] for split, of in files.items() if (there := [path for path in of if path.is_file()])}
    else:
        found = dict(at)
    if set(found) == {"train"} and not is_given:
        return {"all": found["train"]}
    for split in ("train", "test"):
        path = found.get(split, at / f"{split}.csv" if isinstance(at, Path) else Path(f"at.{split}"))
        if not path.is_file():
            raise DataError(path, "no such file; there must be training and test rows, or training rows alone to split")
    return found


def read(path: Path, wanted: Wanted, encoding: str | None = None) -> Iterator[TextRow]:
    """The rows of a file that is not CSV.

    Raises:
        DataError: It is not what its ending says, or a row lacks a column; with its line or row.
    """
    for number, record in records(path, encoding):
        if lacking := [name for name in wanted.names if name not in record]:
            there = some(list(map(str, record)))
            raise DataError(path, f"no column {' and no column '.join(lacking)}; there are: {there}", number)
        yield wanted.row(number, [cell(path, number, name, record[name]) for name in wanted.names])


def records(path: Path, encoding: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its line, or where a file has no lines its number from 1."""
    if ending(path) == ".parquet":
        return _parquet(path)
    return _json(path, encoding) if ending(path) == ".json" else _json_lines(path, encoding)


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Imported here: the other forms do not need it.
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches(1000)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(rows, start=1)
    except FileNotFoundError as error:
        raise DataError(path, "no such file") from error
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"not Parquet ({' '.join(str(error).split())}); is the file cut short?") from error


def _json(path: Path, encoding: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    text = "".join(decoded_lines(path, encoding))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path, encoding)
            return
        raise DataError(path, f"not valid JSON ({error.msg}); is the file cut short?", error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise DataError(path, f"{_TOO_MUCH} ({error})") from error
    if not isinstance(content, list):
        raise DataError(path, "not a list of objects; write one object a row: [{...}, {...}]")
    for number, record in enumerate(content, start=1):
        yield number, _checked(path, number, record)


def _json_lines(path: Path, encoding: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(decoded_lines(path, encoding), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            reason = (
                f"not valid JSON ({error.msg}); is the file cut short?" if line.strip() else "an empty line; delete it"
            )
            raise DataError(path, reason, number) from error
        except (ValueError, RecursionError) as error:
            raise DataError(path, f"{_TOO_MUCH} ({error})", number) from error
        yield number, _checked(path, number, record)


def _checked(path: Path, number: int, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(path, 'not an object; a row is written as {"text": "...", "label": "..."}', number)
    return record
