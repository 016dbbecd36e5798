"""Damaged files: whole ones made worse, and what data preparation makes of damaged tables."""

from __future__ import annotations

import json
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from pyarrow import parquet

from data_prep import UserError, prepare, read_examples
from data_prep.files import SPLITS
from data_prep.sources import open_source
from data_prep.task import parse_task

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) * 2 // 3],
    "zeroed": lambda content: content[: len(content) // 2] + bytes((len(content) + 1) // 2),
    "a bit flipped": lambda content: flipped(content, len(content) // 2),
}
FRAME = pd.DataFrame({"text": [f'Line {n}, a "row"; {n * 7}' for n in range(40)], "label": ["spam", "ham"] * 20})
TABLES = {
    "csv": FRAME.to_csv(index=False).encode(),
    "jsonl": FRAME.to_json(orient="records", lines=True).encode(),
    "parquet": FRAME.to_parquet(),
}


def read_damaged(kind: str, count: int, folder: Path) -> list[tuple[int, bool, str]]:
    """Prepare the data of so many damaged tables of a kind.

    Returns:
        Of each: 0, or 2 where it was refused, or 1 where it ended in a traceback; whether other rows came out than the
        usual reader of the form finds; and what was said.
    """
    outcomes = []
    columns = json.dumps({"at": f"table.{kind}", "texts": "text", "label": "label"})
    described = f"labels: [spam, ham]\nsources: {{files: {columns}}}\nsplits: {{by: stratified}}"
    for number in range(count):
        place = Path(tempfile.mkdtemp(dir=folder))
        table = place / f"table.{kind}"
        table.write_bytes(mutated(TABLES[kind], random.Random(number)))
        try:
            source = open_source("files", parse_task(described, place / "tasks" / "own.yaml"))
            prepare(source, place / "out", prompt="lean", validation_rows=2)
            read = Counter((row.text, row.label) for split in SPLITS for row in read_examples(place / "out", split))
            outcomes.append((0, read != rows_of(table), ""))
        except UserError as error:
            outcomes.append((2, False, str(error).replace(f"{place}/", "")))
        except Exception:
            outcomes.append((1, False, traceback.format_exc()))
    return outcomes


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] if content else content


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A file with one to three damages: cut, a piece lost or doubled, a bit flipped, zeros, or other signs."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(content) + 1)
        to = min(len(content), at + chance.choice([1, 1, 8, 200]))
        piece = chance.choice(
            [b"", bytes(to - at), content[at:to] * 2, b'"', b",", b"\n", b"\r", b"\xff", b"{", b"\\", b";"]
        )
        kinds = [content[:at], content[:at] + piece + content[to:], flipped(content, min(at, len(content) - 1))]
        content = chance.choices(kinds, [1, 5, 3])[0] or b" "
    return content


def rows_of(path: Path) -> Counter | None:
    """Texts and labels of a table as pandas reads it; None where it does not."""
    try:
        if path.suffix == ".csv":
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        elif path.suffix == ".jsonl":
            frame = pd.read_json(path, lines=True, dtype=str)
        else:
            # Not by pandas, whose own metadata in the file may be what is damaged.
            frame = pd.DataFrame(parquet.read_table(path).to_pylist())
        return Counter((text.strip(), label.strip()) for text, label in zip(frame["text"], frame["label"], strict=True))
    except Exception:
        return None
