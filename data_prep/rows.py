"""Rows as sources give them, and labels as people spell them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_prep.files import Split
from data_prep.task import Task

_WHOLE = re.compile(r"^(-?\d+)\.0+$")


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

    def place(self, split: Split) -> str:
        """Where a split's rows are, for messages."""
        ...

    def recognised(self) -> list[str]:
        """What is remarkable of how the rows are written, and how it was read."""
        ...


def spelling(label: str) -> str:
    """A label without what people and programs vary: case, blanks around it, and `.0` behind a whole number."""
    return _WHOLE.sub(r"\1", label.strip().lower())


def spelled(labels: Mapping[str, str]) -> dict[str, str]:
    """What labels stand for, by their spelling; one whose spelling is another's too is left out."""
    counts = Counter(map(spelling, labels))
    return {spelling(label): of for label, of in labels.items() if counts[spelling(label)] == 1}


# What to do about a row without its text or label.
LEAVE_OUT = "complete the row, or leave all such rows out: --skip-incomplete of `new`, or skip_incomplete: true"


def some(parts: Sequence[str]) -> str:
    """The first ten of a list."""
    return ", ".join(parts[:10]) + (f" and {len(parts) - 10} more" if len(parts) > 10 else "")
