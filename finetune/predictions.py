"""Predictions: `predictions.parquet` in a run's folder, or one for all runs in the folder of a reference set.

A row has its run, its split (the temperature is fitted on validation rows), its label and what the run says. Logits are
logarithms of the probabilities; each row's highest is 0, and softmax gives the probabilities back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep import DataError
from data_prep.files import replacing
from finetune.files import short_digest

FILE = "predictions.parquet"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row: its label, the label that scoring found, all probabilities if any, the generated answer if any.

    `has_duplicate` and `in_validation` are those of the prepared row; older files do not know the second.
    """

    id: str
    label: str
    prediction: str
    probabilities: dict[str, float]
    generated: str | None
    has_duplicate: bool
    in_validation: bool = False

    @property
    def is_repeated(self) -> bool:
        """Whether a training or a validation row repeats it."""
        return self.has_duplicate or self.in_validation


def write(folder: Path, test: Sequence[Prediction], validation: Sequence[Prediction] = ()) -> str:
    """Write the predictions of a run; returns their digest for the record."""
    rows = [*test, *validation]
    columns = {
        # In a set's file, it is the run's folder in the set.
        "run": ["."] * len(rows),
        "split": ["test"] * len(test) + ["validation"] * len(validation),
        "id": [row.id for row in rows],
        "label": [row.label for row in rows],
        "prediction": [row.prediction for row in rows],
        "generated": pa.array([row.generated for row in rows], pa.string()),
        "has_duplicate": [row.has_duplicate for row in rows],
        # Null and not False: a column of nulls is none, and the digest is that of a file without it.
        "in_validation": pa.array([row.in_validation or None for row in rows], pa.bool_()),
    }
    if classes := list(rows[0].probabilities):
        logits = _logits(np.array([list(row.probabilities.values()) for row in rows]))
        columns |= {f"logit({label})": of for label, of in zip(classes, logits.T, strict=True)}
    _save(pa.table(columns), folder / FILE)
    return short_digest(_load(folder)[1].to_pydict())


def read(folder: Path, digest: str, split: Literal["test", "validation"] = "test") -> list[Prediction]:
    """The predictions of a run, from its folder or, if it was published, from the file of its set.

    Args:
        folder: The run's.
        digest: Of the predictions, from the run's record.
        split: Which rows.

    Raises:
        DataError: They are missing, were changed, or are another record's.
    """
    path, table = _load(folder)
    columns = table.to_pydict()
    if short_digest(columns) != digest:
        raise DataError(path, f"not the predictions of {folder / 'record.json'} (changed, or another run's)")
    classes = _classes(table)
    odds = np.exp(np.array([columns[name] for name in classes.values()]).reshape(len(classes), len(table)))
    # Nine digits: rows that are as sure as each other stay so, whatever the order of the sum.
    probabilities = (odds / odds.sum(axis=0)).round(9).T.tolist()
    columns["probabilities"] = [dict(zip(classes, of, strict=True)) for of in probabilities]
    columns.setdefault("generated", [None] * len(table))
    columns["in_validation"] = [bool(mark) for mark in columns.get("in_validation", [None] * len(table))]
    rows = zip(columns["split"], *(columns[name] for name in Prediction.__slots__), strict=True)
    return [Prediction(*row) for of, *row in rows if of == split]


def join(folders: Mapping[str, Path], target: Path) -> None:
    """Write the predictions of several runs, from their folders, to one file in `target`.

    Raises:
        DataError: A run has none.
    """
    tables = {run: _load(folder)[1] for run, folder in folders.items()}
    named = [table.append_column("run", pa.array([run] * len(table))) for run, table in tables.items()]
    _save(pa.concat_tables(named, promote_options="default"), target / FILE)


def _load(folder: Path) -> tuple[Path, pa.Table]:
    """The file with a run's predictions, and these, without the columns that other runs alone use."""
    # A published run is up to three folders below its set: baselines/svm/rows-250.
    holder = next((place for place in (folder, *folder.parents[:3]) if (place / FILE).is_file()), None)
    if holder is None:
        raise DataError(folder / FILE, "no such file; run the performance notebook again")
    path, run = holder / FILE, folder.relative_to(holder).as_posix()
    try:
        table = pq.read_table(path, filters=pc.field("run") == run)
    except (pa.ArrowException, OSError) as error:
        raise DataError(path, f"cannot be read ({str(error).splitlines()[0]}); is the file cut short?") from error
    if not len(table):
        raise DataError(path, f"has no predictions of {folder}; run the performance notebook again")
    used = [name for name in table.column_names if name != "run" and table[name].null_count < len(table)]
    return path, table.select(used)


def _save(table: pa.Table, path: Path) -> None:
    logits = list(_classes(table).values())
    with replacing(path, "wb") as file:
        pq.write_table(
            table,
            file,
            compression="zstd",
            compression_level=19,
            # Ids count up, and few logits come twice: a dictionary would make both larger.
            use_dictionary=[name for name in table.column_names if name not in ("id", *logits)],
            column_encoding={"id": "DELTA_BYTE_ARRAY"},
            use_byte_stream_split=logits,
            # About two runs of 7,600 test rows: who reads one skips the others.
            row_group_size=16_384,
        )


def _classes(table: pa.Table) -> dict[str, str]:
    """The labels that have probabilities, each with its column."""
    return {name[len("logit(") : -1]: name for name in table.column_names if name.startswith("logit(")}


def _logits(probabilities: np.ndarray) -> np.ndarray:
    """Logits of probabilities, shape (rows, labels).

    The last 8 of their 32 bits are zeros ("bit rounding", doi:10.1038/s43588-021-00156-2): files are a third smaller,
    and no printed figure of AG News changes. With 16 bits, ends of intervals do.
    """
    with np.errstate(divide="ignore"):
        exact = np.log(probabilities / probabilities.max(axis=1, keepdims=True)).astype(np.float32)
    return ((exact.view(np.uint32) + 0x80) & np.uint32(0xFFFFFF00)).view(np.float32)
