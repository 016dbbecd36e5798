"""Tables in files of other forms than CSV: JSON, JSON lines and Parquet; and the files of a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.csv_files import TextRow, Wanted, decoded_lines
from data_prep.errors import DataError
from data_prep.files import SPLITS

CSV = (".csv", ".tsv", ".txt")
# In a folder, the first of these is taken.
READ = (*CSV, ".jsonl", ".ndjson", ".json", ".parquet")
_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_AS_CSV = {
    ".xlsx": "a workbook; save it as CSV (in Excel: Save as, CSV UTF-8)",
    ".xls": "a workbook; save it as CSV (in Excel: Save as, CSV UTF-8)",
    ".ods": "a workbook; save it as CSV",
    ".gz": "a packed file; unpack it: gunzip",
    ".zip": "a packed file; unpack it: unzip",
}


def find_files(at: Path) -> dict[str, Path]:
    """The files of a table: `all` for a single file; for a folder those of its splits.

    Raises:
        DataError: There is no such file, or its form is none that we read.
    """
    if at.is_dir():
        found = {}
        for split in SPLITS:
            files = [at / f"{name}{ending}" for name in _NAMES[split] for ending in READ]
            there = [path for path in files if path.is_file()]
            if there or split != "validation":
                # What is missing is named as CSV.
                found[split] = (there or files)[0]
        return found
    if not at.exists():
        raise DataError(at, "no such file")
    if at.suffix.lower() not in READ:
        what = _AS_CSV.get(at.suffix.lower(), "a form that we do not read")
        raise DataError(at, f"this is {what}; we read {', '.join(READ)}")
    return {"all": at}


def read(path: Path, wanted: Wanted) -> Iterator[TextRow]:
    """The rows of a file that is not CSV.

    Raises:
        DataError: It is not what its ending says, or a row lacks a column; with its line or row.
    """
    for number, record in records(path):
        if lacking := [name for name in wanted.names if name not in record]:
            there = ", ".join(map(str, record))
            raise DataError(path, f"no column {' and no column '.join(lacking)}; there are: {there}", number)
        yield wanted.row(number, [cell(path, number, name, record[name]) for name in wanted.names])


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its line, or where a file has no lines its number from 1."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _parquet(path)
    return _json(path) if ending == ".json" else _json_lines(path)


def cell(path: Path | str, number: int, name: str, value: Any) -> str:
    """A cell as text: `true`, `1` for 1.0, and nothing for a missing value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        # A column of whole numbers with a gap is one of floats.
        return str(int(value))
    if isinstance(value, list | dict | bytes):
        raise DataError(path, f"{name} holds a {type(value).__name__}, and a text or a label is needed", number)
    return str(value)


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
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, f"not Parquet ({str(error).splitlines()[0]}); is the file cut short?") from error


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = "".join(decoded_lines(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path)
            return
        raise DataError(path, f"not valid JSON ({error.msg}); is the file cut short?", error.lineno) from error
    if not isinstance(content, list):
        raise DataError(path, "not a list of objects; write one object a row: [{...}, {...}]")
    for number, record in enumerate(content, start=1):
        yield number, _checked(path, number, record)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(decoded_lines(path), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            reason = (
                f"not valid JSON ({error.msg}); is the file cut short?" if line.strip() else "an empty line; delete it"
            )
            raise DataError(path, reason, number) from error
        yield number, _checked(path, number, record)


def _checked(path: Path, number: int, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(path, 'not an object; a row is written as {"text": "...", "label": "..."}', number)
    return record
