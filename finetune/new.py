"""A new task: look at a table, choose its columns, write `tasks/NAME.yaml`, and say what is in it."""

from __future__ import annotations

import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from data_prep import Example, UserError, find_task, known_tasks, prepare, read_examples
from data_prep.files import SPLITS, Manifest, replacing
from data_prep.look import Look, choose, describe, look
from data_prep.rows import some, spelling
from data_prep.sources import open_source
from data_prep.task import NAME, Task, own_folder, parse_task
from data_prep.text_files import EncodingError
from finetune.data import findings, lengths

# Shown of a table: so many rows, and so many characters of a cell.
ROWS, CHARACTERS = 3, 70
# How programs write that there is no value.
_GAPS = ("nan", "null", "none", "n/a", "na", "<na>", "-", "?")


def new(
    at: str,
    name: str | None = None,
    text: Sequence[str] = (),
    label: str | None = None,
    by: str | None = None,
    column: str | None = None,
    merge_spellings: bool = False,
    skip_incomplete: bool = False,
    encoding: str | None = None,
) -> Path:
    """Describe a table as a task. In a terminal, what is not given is asked for.

    Args:
        at: A file, a folder with train and test files, or a data set of the hub.
        name: The task's name; the file's if not given.
        text: The text columns.
        label: The label's column.
        by: How to split, if not as the files are given or at random.
        column: The column of the group or time.
        merge_spellings: Whether labels that differ in case or blanks are one.
        skip_incomplete: Whether rows without a text or a label are left out.
        encoding: Of files that are not UTF-8.

    Returns:
        The file that was written.

    Raises:
        UserError: A column cannot be guessed, a row cannot be read, or the name is taken. Then nothing is written.
    """
    name = name or re.sub(r"[^a-z0-9_-]+", "-", Path(at.removesuffix(".gz")).absolute().stem.lower()).strip("-_")
    if not NAME.fullmatch(name) or name in known_tasks():
        what = "is there already" if name in known_tasks() else "is no name of lower-case letters, digits, - and _"
        raise UserError(f"task '{name}' {what}; give another: --name my-{name or 'task'}")
    try:
        seen = look(at, encoding)
    except EncodingError as error:
        if not sys.stdin.isatty():
            raise
        print(error)
        seen = look(at, _answer("Encoding", error.encoding))
    _show_rows(seen)
    asking = sys.stdin.isatty() and not (text and label)
    texts, label = _asked(seen, text, label) if asking else choose(seen, text, label)
    path = own_folder() / f"{name}.yaml"
    written = describe(seen, name, texts, label, _place(seen, path), merge_spellings, skip_incomplete, by, column)
    task = parse_task(written, path)
    _show_odd_labels(task.labels)
    # Everything that `run` would refuse is refused here, before a file is written.
    with tempfile.TemporaryDirectory() as scratch:
        manifest, _ = prepare(open_source(seen.kind, task), Path(scratch), prompt="lean")
        examples = [row for split in SPLITS for row in read_examples(Path(scratch), split)]
    with replacing(path) as file:
        file.write(written)
    assert find_task(name) == task
    _show_task(task, manifest, examples)
    print(f"\nWritten: {path}\nEdit it: say what a label means, or split otherwise. Then:\n")
    print(f"  python -m finetune run --task {name}")
    return path


def _place(seen: Look, path: Path) -> str:
    """Where the table is, as the task's file says it: relative if it lies beside the folder of tasks."""
    if seen.kind == "hub":
        return seen.at
    table, folder = Path(seen.at).expanduser().resolve(), path.parent.parent.resolve()
    return str(table.relative_to(folder) if table.is_relative_to(folder) else table)


def _asked(seen: Look, text: Sequence[str], label: str | None) -> tuple[tuple[str, ...], str]:
    """The columns that the user chooses; Enter takes those that are proposed."""
    if label is None:
        label = _answer("Label column", (seen.label_candidates() or [""])[0]) or None
    if not text:
        proposed = ", ".join(seen.text_candidates(label))
        text = [name.strip() for name in _answer("Text columns, with commas", proposed).split(",") if name.strip()]
    return choose(seen, text, label)


def _answer(question: str, proposed: str) -> str:
    try:
        return input(f"{question} [{proposed}]: ").strip() or proposed
    except EOFError as error:
        raise UserError("no answer; nothing was written") from error


def _show_rows(seen: Look) -> None:
    print(f"{seen.at}: {len(seen.rows):,} rows. The first are:\n")
    for row in seen.rows[:ROWS]:
        for name in seen.columns:
            value = " ".join(row[name].split())
            print(f"  {name}: {value[:CHARACTERS]}{'...' if len(value) > CHARACTERS else ''}")
        print()


def _show_odd_labels(labels: Sequence[str]) -> None:
    alike = defaultdict(list)
    for value in labels:
        alike[spelling(value)].append(repr(value))
    if several := [" and ".join(values) for values in alike.values() if len(values) > 1]:
        print(
            f"Labels of nearly one spelling are classes of their own: {some(several)}. Are they one? --merge-spellings"
        )
    if gaps := [value for value in labels if spelling(value) in _GAPS]:
        print(f"The label {some(gaps)} may mean that there is none; then delete its rows")


def _show_task(task: Task, manifest: Manifest, examples: list[Example]) -> None:
    columns = task.sources[manifest.source["kind"]]
    print(f"Text: {' + '.join(columns.texts)}. Label: {columns.label}, {len(task.labels)} classes.\n")
    print(pd.DataFrame({split: manifest.rows[split] for split in SPLITS}).to_string())
    print()
    if manifest.recognised:
        print(f"Recognised: {'; '.join(manifest.recognised)}")
    if task.splits.by != "given":
        print(
            f"We split the rows: {task.splits.by}, {task.splits.validation:.0%} validation, {task.splits.test:.0%} test"
        )
    for sentence in findings(manifest, examples, manifest.total("test")):
        print(sentence)
    print(*lengths(examples), sep="\n")
