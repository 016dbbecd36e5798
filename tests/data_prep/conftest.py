"""Small corpora in the sources' own format."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_prep.sources import Files
from data_prep.task import AG_NEWS

Row = tuple[str, str, str]

WORDS = ["minister", "striker", "dividend", "orbit", "verdict", "goal", "merger", "probe", "border", "bond", "chip"]


def random_rows(count: int, seed: int = 0, words: int = 12) -> list[Row]:
    """Rows of random words, the four classes in turn."""
    generator = random.Random(seed)
    return [
        (
            str(1 + number % 4),
            f"{generator.choice(WORDS)} {number}",
            " ".join(generator.choices(WORDS, k=words)),
        )
        for number in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)


@pytest.fixture
def make_source(tmp_path) -> Callable[..., Files]:
    """Writes a CSV folder and opens it; each split is a number of random rows, or the rows themselves."""

    def make(train: int | list[Row] = 80, test: int | list[Row] = 20, validation=None, name: str = "csv") -> Files:
        folder = tmp_path / "sources" / name
        for seed, (split, rows) in enumerate({"train": train, "test": test, "validation": validation}.items()):
            if rows is not None:
                write_rows(folder / f"{split}.csv", random_rows(rows, seed) if isinstance(rows, int) else rows)
        return Files(folder, AG_NEWS)

    return make
