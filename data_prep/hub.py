"""Data sets of the Hugging Face hub, or folders that `datasets` loads."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import splits
from data_prep.errors import DataError, UserError
from data_prep.files import SPLITS, Split
from data_prep.rows import LEAVE_OUT, Row, some, spelled, spelling
from data_prep.task import Columns, Task
from data_prep.text_files import cell


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
        return self._parts if self.task.is_split else SPLITS

    def rows(self, split: Split) -> Iterator[Row]:
        for number, (texts, label) in enumerate(self._values(split if self.task.is_split else "train")):
            if self.task.is_split or self._assigned[number] == SPLITS.index(split):
                yield Row(tuple(text.strip() for text in texts), self._labels[label])

    def provenance(self) -> dict[str, Any]:
        digests = {}
        for split in self._parts:
            digest = hashlib.sha256()
            for texts, label in self._values(split):
                digest.update(f"{json.dumps([*texts, label])}\n".encode())
            digests[split] = digest.hexdigest()
        return {"kind": self.name, "dataset": self.dataset, "revision": self.revision, "sha256": digests}

    def place(self, split: Split) -> str:
        return f"{self.dataset}, split {split}"

    def recognised(self) -> list[str]:
        classes = getattr(self._loaded["train"].features[self._table.label], "names", None)
        said = (
            []
            if classes == list(self.task.labels)
            else ["labels by name, not by number" if classes else "labels by name"]
        )
        other = [f"'{label}' is {name}" for label, name in self._labels.items() if label != name]
        if self._table.skip_incomplete:
            kept = sum(1 for split in self._parts for _ in self._values(split))
            left_out = sum(len(self._loaded[split]) for split in self._parts) - kept
            said.append(f"rows without text or label, left out: {left_out:,}")
        return said + ([some(other)] if other else [])

    @cached_property
    def _table(self) -> Columns:
        return self.task.sources["hub"]

    @property
    def _parts(self) -> tuple[Split, ...]:
        """The splits that are there."""
        return tuple(split for split in SPLITS if split in self._loaded)

    @cached_property
    def _assigned(self) -> np.ndarray:
        """The split of each row, where there are training rows alone."""
        labels = [self._labels[label] for _, label in self._values("train")]
        keys = self._loaded["train"][self.task.splits.column] if self.task.splits.column else ()
        named = [cell(self.place("train"), row, self.task.splits.column, key) for row, key in enumerate(keys, start=1)]
        try:
            return splits.assign(self.task.splits, labels, named)
        except ValueError as error:
            raise DataError(self.dataset, str(error)) from error

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        """The splits by name, with the task's columns."""
        loaded = load_set(self.dataset, self.revision)
        if missing := [split for split in ("train", "test") if split not in loaded and self.task.is_split]:
            raise UserError(
                f"the data set {self.dataset} has no {' and no '.join(missing)} split; it has {', '.join(loaded)}; "
                "divide its rows into splits named train and test"
            )
        if not self.task.is_split and set(loaded) & set(SPLITS) != {"train"}:
            raise UserError(
                f"the data set {self.dataset} has the splits {', '.join(loaded)}: set splits.by to given in task "
                f"{self.task.name}; we split training rows alone"
            )
        needed = [*self._table.texts, self._table.label]
        if not self.task.is_split and self.task.splits.column not in (None, *needed):
            needed.append(self.task.splits.column)
        for split, rows in loaded.items():
            if split in SPLITS and not set(needed) <= set(rows.column_names):
                raise UserError(
                    f"the data set {self.dataset}, split {split}, has the columns {sorted(rows.column_names)}; "
                    f"{sorted(needed)} are needed"
                )
        return {split: rows.select_columns(needed) for split, rows in loaded.items()}

    def _values(self, split: Split) -> Iterator[tuple[list[str], str]]:
        """The texts and the label of each row as they are there, a class by its name."""
        columns, rows = self._table, self._loaded[split]
        classes = getattr(rows.features[columns.label], "names", None)
        # In batches: row by row takes ten times as long.
        names = [*columns.texts, columns.label]
        batches = (zip(*(batch[name] for name in names), strict=True) for batch in rows.iter(1000))
        for number, (*texts, label) in enumerate(chain.from_iterable(batches), start=1):
            where = f"{self.place(split)}, row {number}"
            has_text = all(isinstance(text, str) for text in texts) and any(text.strip() for text in texts)
            has_label = label is not None and not (classes and label == -1)
            if columns.skip_incomplete and not (has_text and has_label):
                continue
            if not has_text:
                raise DataError(where, f"no text in {' and '.join(columns.texts)}; {LEAVE_OUT}")
            if not has_label:
                raise DataError(where, f"no {columns.label}; {LEAVE_OUT}")
            yield texts, classes[label] if classes else cell(where, number, columns.label, label)

    @cached_property
    def _labels(self) -> dict[str, str]:
        """What each label of all splits stands for."""
        column = self._table.label
        known = spelled({label: label for label in self.task.labels}) | spelled(self._table.values)
        found = dict.fromkeys(label for split in self._parts for _, label in self._values(split))
        if unknown := [label for label in found if spelling(label) not in known]:
            split = next(split for split in self._parts if unknown[0] in {label for _, label in self._values(split)})
            named = some(self.task.labels)
            if all(label.lstrip("-").isdecimal() for label in found):
                raise DataError(
                    self.place(split),
                    f"{column} holds the numbers {some(sorted(found, key=int))} without names, and numbers alone do "
                    f"not say which class is which; write the names {named} instead, or make the column a ClassLabel "
                    "with these names in the order of the numbers",
                )
            raise DataError(
                self.place(split),
                f"{column} has {some(sorted(found))}, and task {self.task.name} has {some(self.task.labels)}; rename "
                "the labels, or describe a task with these",
            )
        return {label: known[spelling(label)] for label in found}


def load_set(dataset: str, revision: str | None = None) -> Mapping[str, Any]:
    """The splits of a data set of the hub, or of a folder that `datasets` loads.

    Raises:
        UserError: It cannot be loaded.
    """
    # Imported here: it takes seconds, and the other sources do not need it.
    from datasets import load_dataset, load_from_disk

    is_saved = Path(dataset, "dataset_dict.json").is_file()
    print(f"Loading the data set {dataset}")
    # Without a network it tries for half a minute; what it says of each try helps nobody.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return load_from_disk(dataset) if is_saved else load_dataset(dataset, revision=revision)
    except Exception as error:
        # The library raises a dozen unrelated types for "no network"; the remedy is the same for all.
        raise UserError(
            f"the data set {dataset} could not be loaded from the hub ({type(error).__name__}: {error}); "
            "check the network, or use files of your own, or source=sample"
        ) from error
