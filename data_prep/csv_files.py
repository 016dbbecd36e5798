"""CSV files as people and programs write them: what is recognised is said, what is not is refused with its line."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import DataError
from data_prep.rows import some
from data_prep.text_files import decoded_lines

# Python's own limit is 131,072 characters, and an article may be longer.
csv.field_size_limit(2**31 - 1)

# The first is taken where several fit alike.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# A delimiter and the columns show in so many rows.
SAMPLE_ROWS = 100

_SEP_LINE = re.compile(r'"?sep=(.)"?')


class TextRow(NamedTuple):
    """A row as it is written: the line that it begins on, its label, its texts, and the value that it is split by."""

    line: int
    label: str
    texts: list[str]
    key: str = ""


class Wanted(NamedTuple):
    """The columns to read: the label's, the texts', and perhaps the one that rows are split by."""

    label: str
    texts: tuple[str, ...]
    key: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.label, *self.texts, *([self.key] if self.key else []))

    def row(self, line: int, cells: Sequence[str]) -> TextRow:
        """A row from its cells in the order of the names."""
        label, *texts = cells
        return TextRow(line, label, texts[:-1], texts[-1]) if self.key else TextRow(line, label, texts)


@dataclass(frozen=True)
class CsvForm:
    """How a CSV file is written.

    Attributes:
        delimiter: Between two columns.
        is_marked: Whether the first line is Excel's `sep=;`.
        header: The names of the columns, if a line holds them.
        wanted: The columns that the header names; without a header those to look for.
        places: Where these are in a row.
        width: How many columns each row has.
        fit: How many rows of a sample have this form.
        encoding: The file's, if it is neither UTF-8 nor marked.
    """

    delimiter: str
    is_marked: bool
    header: tuple[str, ...]
    wanted: Wanted
    places: tuple[int, ...]
    width: int
    fit: int
    encoding: str | None = None

    def __str__(self) -> str:
        """What is remarkable of it; empty where it is the task's own form."""
        said = (
            [] if self.delimiter == "," else [f"columns separated by {DELIMITERS.get(self.delimiter, self.delimiter)}"]
        )
        if self.is_marked:
            said = [f"Excel's line sep={self.delimiter}"]
        if self.header:
            names = [self.header[place].strip() for place in self.places]
            label, texts = names[0], names[1 : 1 + len(self.wanted.texts)]
            said.append(f"a header, with {label} as the label and {' + '.join(texts)} as the text")
            ignored = [name.strip() or "a column without a name" for name in self.header]
            if ignored := [name for place, name in enumerate(ignored) if place not in self.places]:
                said.append(f"not read: {', '.join(ignored)}")
        return ", ".join(said)


def recognise(
    path: Path,
    wanted: Sequence[Wanted],
    names: Sequence[str],
    labels: Collection[str],
    encoding: str | None = None,
) -> CsvForm:
    """How a file is written: its delimiter, and which columns are the label and the texts.

    Args:
        path: The file.
        wanted: The columns to look for; where a header lacks one of the first, the next ones are tried.
        names: The columns of a file without a header, in their order; empty where there must be one.
        labels: How labels may be written, in lower case.
        encoding: The file's, if it is neither UTF-8 nor marked.

    Raises:
        DataError: No line holds the columns' names, and without a header nobody knows which they are.
    """
    forms = []
    for delimiter, is_marked, rows in sampled(path, encoding):
        found = _named_columns(rows[0], wanted) if rows else None
        columns, places = found or (wanted[0], tuple(map(names.index, wanted[0].names)) if names else ())
        header = tuple(rows[0]) if found else ()
        width = len(header) or len(names)
        right = [row for row in rows[bool(found) :] if len(row) == width]
        fit = len(right) + sum(row[places[0]].strip().lower() in labels for row in right if places) + bool(found)
        forms.append(CsvForm(delimiter, is_marked, header, columns, places, width, fit, encoding))
    best = max(forms, key=lambda form: form.fit)
    if not best.places:
        _, _, rows = max(sampled(path, encoding), key=lambda sample: len(sample[2][0]) if sample[2] else 0)
        if not rows:
            # Its fault is in its first row.
            next(read_rows(path, best, labels))
        there = some([name.strip() for name in rows[0]])
        lacking = [name for name in wanted[0].names if name not in rows[0]]
        raise DataError(path, f"no column {' and no column '.join(lacking)} in the first line, which has: {there}", 1)
    return best


def sampled(path: Path, encoding: str | None = None) -> Iterator[tuple[str, bool, list[list[str]]]]:
    """The first rows of a file by each delimiter that it may have, and whether its first line is Excel's mark."""
    marked = _SEP_LINE.fullmatch(next(decoded_lines(path, encoding)).rstrip("\r\n"))
    for delimiter in marked[1] if marked else DELIMITERS:
        rows: list[list[str]] = []
        # The file's first fault shows when it is read.
        with suppress(csv.Error):
            rows.extend(
                islice(csv.reader(decoded_lines(path, encoding), delimiter=delimiter, strict=True), SAMPLE_ROWS)
            )
        yield delimiter, bool(marked), rows[1:] if marked else rows


def read_rows(path: Path, form: CsvForm, labels: Collection[str]) -> Iterator[TextRow]:
    """The rows of a file.

    Raises:
        DataError: It is not CSV, not UTF-8, or a row has other columns; with the line that the row begins on.
    """
    reader = csv.reader(decoded_lines(path, form.encoding), delimiter=form.delimiter, strict=True)
    # A row may span lines: it is reported by the one that it begins on.
    begin = 1
    try:
        for number, row in enumerate(reader):
            if number >= form.is_marked + bool(form.header):
                if len(row) != form.width:
                    raise DataError(path, _other_width(row, form, begin), begin)
                if reader.line_num > begin:
                    _refuse_swallowed_rows(path, row, form, labels, begin)
                yield form.wanted.row(begin, [row[place] for place in form.places])
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(path, _not_csv(path, str(error)), begin) from error


def _named_columns(row: Sequence[str], wanted: Sequence[Wanted]) -> tuple[Wanted, tuple[int, ...]] | None:
    """The first columns that a header names, and their places; None where the row is no header."""
    for spelled in (str.strip, _folded):
        there = [spelled(name) for name in row]
        for columns in wanted:
            names = [spelled(name) for name in columns.names]
            if all(there.count(name) == 1 for name in names):
                return columns, tuple(map(there.index, names))
    return None


def _folded(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).lower()


def _other_width(row: list[str], form: CsvForm, line: int) -> str:
    if not row:
        return "an empty line; delete it"
    names = form.header or form.wanted.names
    what = f"{len(row)} columns instead of {form.width} ({some(names)})"
    what += f", separated by {DELIMITERS.get(form.delimiter, form.delimiter)}"
    if not form.header and len(row) == form.width + 1 and row[0].strip() in ("", "0", str(line), str(line - 1)):
        what += "; is the first a pandas index? Write the file with index=False, or with a header"
    return what


def _refuse_swallowed_rows(path: Path, row: list[str], form: CsvForm, labels: Collection[str], begin: int) -> None:
    """A quote that is not closed takes the next rows into its field, up to the next quote."""
    for field in row:
        for line in field.split("\n")[1:]:
            inner = line.strip().split(form.delimiter)
            # In prose, a blank follows a comma.
            is_row = len(inner) >= form.width and not any(cell.startswith(" ") for cell in inner[1:])
            if is_row and inner[form.places[0]].strip('"').lower() in labels:
                reason = f"a field of this row has a line that looks like a row ({line.strip()[:40]!r})"
                raise DataError(path, f"{reason}; is a closing quote missing?", begin)


def _not_csv(path: Path, error: str) -> str:
    if error.startswith("new-line character"):
        if b"\n" in path.read_bytes().rstrip():
            return "not valid CSV: a carriage return alone ends a line here; write all line ends alike"
        return (
            "not valid CSV: the lines end with a carriage return alone, as on an old Mac; convert it: "
            rf"tr '\r' '\n' < {path.name} > converted.csv"
        )
    if error.startswith("unexpected end"):
        return "not valid CSV: a quote of this row is never closed; is a quote missing, or the file cut short?"
    return f"not valid CSV ({error}); within a quoted field, a quote must be doubled"
