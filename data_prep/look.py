"""A table that nobody has described yet: its columns, which of them may be text and label, and a task file from it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, mode

import yaml

from data_prep import csv_files, tables
from data_prep.csv_files import Wanted
from data_prep.errors import DataError, UserError
from data_prep.files import SPLITS
from data_prep.hub import load_set
from data_prep.rows import some, spelling
from data_prep.sources import LABEL_NAMES
from data_prep.text_files import cell, ending

# A label column's usual names, and how many values it may have.
_LABELS = (*LABEL_NAMES, "target", "topic", "intent", "queue", "sentiment")
MOST_LABELS = 500
# A text has this many words or more on average, and seldom comes back.
_WORDS, _DISTINCT = 2.5, 0.5
# A header's cell is short.
_HEADER = 60
_NEEDS = "a task needs a text and a label"


@dataclass(frozen=True)
class Look:
    """What a table holds.

    Attributes:
        at: The file, the folder, or the name on the hub.
        kind: `files` or `hub`.
        parts: The splits that are there; `all` where there are training rows alone.
        columns: Their names; those that are there twice are left out.
        has_header: Whether a line of the file names the columns.
        rows: All rows as text, by column.
        encoding: Of files that are neither UTF-8 nor marked.
    """

    at: str
    kind: str
    parts: tuple[str, ...]
    columns: tuple[str, ...]
    has_header: bool
    rows: list[dict[str, str]]
    encoding: str | None = None

    def values(self, column: str) -> list[str]:
        return [row[column] for row in self.rows]

    def label_candidates(self) -> list[str]:
        """Columns with few values that come back; those with a usual name alone, if there are any."""
        counts = {name: Counter(self.values(name)) for name in self.columns}
        found = [
            name
            for name, of in counts.items()
            if 2 <= len(of) <= min(MOST_LABELS, len(self.rows) / 2) and mean(map(len, of)) < _HEADER
        ]
        return [name for name in found if name.strip().lower() in _LABELS] or found

    def text_candidates(self, label: str) -> list[str]:
        """Columns of several words a row, of which few come back."""
        return [
            name
            for name in self.columns
            if name != label
            and mean(len(value.split()) for value in self.values(name)) >= _WORDS
            and len(set(self.values(name))) >= _DISTINCT * len(self.rows)
        ]


def look(at: str, encoding: str | None = None) -> Look:
    """Look at a file, a folder with train and test files, or a data set of the hub.

    Raises:
        DataError: It is not there, cannot be read, or has no rows or fewer than two columns.
    """
    path = Path(os.path.expanduser(at))
    if not path.exists() and not path.suffix and at.count("/") <= 1:
        return _look_at_hub(at)
    parts = tables.find_files(path, is_given=False)
    columns: tuple[str, ...] = ()
    has_header, rows = True, []
    for file in parts.values():
        there, has_header, found = (_csv if ending(file) in tables.CSV else _records)(file, encoding)
        columns = tuple(name for name in columns if name in there) if columns else there
        rows += found
    if not rows:
        raise DataError(path, "the file holds no row")
    if len(columns) < 2:
        raise DataError(path, f"these columns in all files: {', '.join(columns) or 'none'}; {_NEEDS}")
    return Look(at, "files", tuple(parts), columns, has_header, rows, encoding)


def _csv(path: Path, encoding: str | None) -> tuple[tuple[str, ...], bool, list[dict[str, str]]]:
    """The columns that all rows have, whether a line names them, and the rows."""
    best: tuple[int, int, list[list[str]]] = (0, 0, [])
    for _, _, rows in csv_files.sampled(path, encoding):
        width = mode(map(len, rows)) if rows else 0
        fit = sum(len(row) == width for row in rows)
        if width > 1 and fit > best[0]:
            best = fit, width, rows
    _, width, rows = best
    if not rows:
        # Its first fault, if it has one.
        if not any(found for _, _, found in csv_files.sampled(path, encoding)):
            csv_files.recognise(path, [Wanted("text", ("label",))], (), (), encoding)
        raise DataError(path, f"one column; {_NEEDS}", 1)
    has_header = len(rows[0]) == width and _is_header(rows)
    numbered = tuple(f"column {number}" for number in range(1, width + 1))
    names = tuple(name.strip() for name in rows[0]) if has_header else numbered
    once = tuple(name for name in names if names.count(name) == 1 and name)
    if len(once) < 2:
        raise DataError(path, f"the columns {some(names)} need a name each", 1)
    wanted = Wanted(once[0], once[1:])
    form = csv_files.recognise(path, [wanted], () if has_header else names, (), encoding)
    read = csv_files.read_rows(path, form, ())
    return once, has_header, [dict(zip(once, (row.label, *row.texts), strict=True)) for row in read]


def _is_header(rows: Sequence[Sequence[str]]) -> bool:
    """A header's cells are short, are no numbers, and do not come back below."""
    first, *others = rows
    named = [name.strip() for name in first if name.strip()]
    if not named or len(set(named)) < len(named) or any(len(name) > _HEADER or _is_number(name) for name in named):
        return False
    below = [{row[place] for row in others if place < len(row)} for place in range(len(first))]
    return not any(name and name in values for name, values in zip(first, below, strict=True))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _records(path: Path, encoding: str | None) -> tuple[tuple[str, ...], bool, list[dict[str, str]]]:
    columns: dict[str, None] = {}
    found, lists = [], set()
    for _, record in tables.records(path, encoding):
        columns |= dict.fromkeys(record)
        # Lists are no texts; whether they are needed is not known yet.
        lists |= {name for name, value in record.items() if isinstance(value, list | dict | bytes)}
        found.append(record)
    kept = tuple(name for name in columns if name not in lists)
    rows = [{name: cell(path, 0, name, record.get(name)) for name in kept} for record in found]
    return kept, True, rows


def _look_at_hub(name: str) -> Look:
    loaded = load_set(name)
    rows: list[dict[str, str]] = []
    parts = tuple(split for split in SPLITS if split in loaded)
    for split in map(loaded.__getitem__, parts):
        # A class is shown by its name.
        classes = {key: kind.names for key, kind in split.features.items() if hasattr(kind, "names")}
        for record in split:
            named = {
                key: classes[key][of] if key in classes and of not in (None, -1) else of for key, of in record.items()
            }
            texts = {key: of for key, of in named.items() if not isinstance(of, list | dict | bytes)}
            rows.append({key: cell(name, 0, key, of) for key, of in texts.items()})
    columns = tuple(rows[0]) if rows else ()
    return Look(name, "hub", ("all",) if parts == ("train",) else parts, columns, True, rows)


def choose(seen: Look, text: Sequence[str] = (), label: str | None = None) -> tuple[tuple[str, ...], str]:
    """The text columns and the label's column: those that are given, else those that no doubt is about.

    Raises:
        UserError: A column is not there, or cannot be guessed; the message says what to type.
    """
    for name in (*text, *([label] if label else [])):
        if name not in seen.columns:
            raise UserError(f"{seen.at} has no column '{name}'; its columns are: {some(seen.columns)}")
    if label is None:
        candidates = [name for name in seen.label_candidates() if name not in text]
        if len(candidates) != 1:
            what = f"one of {some(candidates)}" if candidates else f"a column of {some(seen.columns)}"
            raise UserError(f"which column is the label? Name {what}: --label '{(candidates or seen.columns)[0]}'")
        [label] = candidates
    found = tuple(text) or tuple(seen.text_candidates(label))
    if not found:
        others = [name for name in seen.columns if name != label]
        raise UserError(f"which column is the text? Name one or more of {some(others)}: --text '{others[0]}'")
    return found, label


def describe(
    seen: Look,
    name: str,
    texts: Sequence[str],
    label: str,
    at: str,
    merge_spellings: bool = False,
    skip_incomplete: bool = False,
    by: str | None = None,
    column: str | None = None,
) -> str:
    """The task's file, with comments: what `new` writes, and people edit."""
    counts = Counter(seen.values(label))
    if not 2 <= len([value for value in counts if value.strip()]) <= MOST_LABELS:
        raise DataError(
            seen.at, f"the column '{label}' has {len(counts)} different values; a label has 2 to {MOST_LABELS}"
        )
    by = by or ("stratified" if seen.parts == ("all",) else "given")
    spelled: dict[str, str] = {}
    for value, _ in counts.most_common():
        # The most frequent spelling is the label's.
        spelled.setdefault(spelling(value) if merge_spellings else value, value)
    labels = sorted((value for value in spelled.values() if value.strip()), key=_in_order)
    lines = [
        f"# A task: python -m finetune run --task {name}",
        f"title: {_quoted(name)}",
        "# What the data is, and what it may be used for. A model card says both.",
        'description: ""',
        'licence: ""',
        "",
        "# The labels as they are answered. Write behind a colon what a label means: prompt=verbose tells the model.",
        "labels:",
        *(f"  {_quoted(value)}:  # {counts[value]:,} rows" for value in labels),
        "",
        "sources:",
        f"  {seen.kind}:",
        "    # Relative to the folder that holds tasks/." if seen.kind == "files" else "    # On the Hugging Face hub.",
        f"    at: {_quoted(at)}",
        "    # Joined by a space, they are the text.",
        f"    texts: [{', '.join(map(_quoted, texts))}]",
        f"    label: {_quoted(label)}",
    ]
    if not seen.has_header:
        lines += ["    # The file has no line with names.", f"    names: [{', '.join(map(_quoted, seen.columns))}]"]
    if seen.encoding:
        lines += [f"    encoding: {_quoted(seen.encoding)}"]
    lines += [
        "    # Whether `sports ` and `Sports` are one label.",
        f"    merge_spellings: {str(merge_spellings).lower()}",
        "    # Whether rows without a text or a label are left out.",
        f"    skip_incomplete: {str(skip_incomplete).lower()}",
        "",
        "# given: by files; stratified: at random, the same share of each class; group: rows with the same value of",
        "# a column stay together; time: the latest rows are the test. The last two need `column`.",
        "splits:",
        f"  by: {by}",
        *([f"  column: {_quoted(column)}"] if column else []),
        "  validation: 0.1",
        *(["  test: 0.2"] if by != "given" else []),
        "",
        "# What precedes each text, and the key of the JSON answer.",
        'request: "Classify the following text:"',
        "answer_key: category",
        "",
        "# Repairs of web texts, of: entities, tags, backslashes, spaces.",
        "repairs: []",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Text as YAML on one line, whatever it is."""
    return yaml.dump(text, default_style='"', allow_unicode=True, width=float("inf")).strip()


def _in_order(label: str) -> tuple[bool, float, str]:
    """Numbers by their value, before names."""
    return (False, float(label), "") if _is_number(label) else (True, 0.0, label)
