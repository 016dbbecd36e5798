"""Training, validation and test rows of one table: at random with each class's share, or by a group or time column."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd

from data_prep.files import SPLITS
from data_prep.task import Splits

TRAIN, VALIDATION, TEST = range(len(SPLITS))


def shares(counts: np.ndarray, rows: int) -> np.ndarray:
    """`rows` divided among the classes by their counts; cumulative rounding makes the sum exact."""
    ends = np.rint(np.cumsum(counts) * rows / counts.sum()).astype(int)
    return np.diff(ends, prepend=0)


def assign(how: Splits, labels: Sequence[str], keys: Sequence[str]) -> np.ndarray:
    """The split of each row, as its place in SPLITS.

    Args:
        how: By what to split, and the shares.
        labels: The rows' labels.
        keys: Their group or time; empty where neither counts.

    Raises:
        ValueError: A class has too few rows for three splits, a time cannot be read, or all rows are of one group.
    """
    if how.by == "stratified":
        return _stratified(how, labels)
    if how.by == "time":
        times = _times(keys)
        _, groups = np.unique(times, return_inverse=True)
        # The latest first.
        order = np.arange(groups.max(), -1, -1)
    else:
        _, groups = np.unique(np.array(keys), return_inverse=True)
        order = np.random.default_rng(how.seed).permutation(groups.max() + 1)
    if len(order) < len(SPLITS):
        raise ValueError(f"{how.column} has {len(order)} values, and three splits need three or more")
    sizes = np.bincount(groups)
    chosen = np.full(len(order), TRAIN)
    filled = {TEST: 0, VALIDATION: 0}
    wanted = {TEST: how.test * len(labels), VALIDATION: how.validation * len(labels)}
    for group in order:
        # A group that would take more than half too much is left to the next split.
        open_splits = [s for s in (TEST, VALIDATION) if filled[s] + sizes[group] / 2 <= wanted[s] or not filled[s]]
        if not open_splits:
            break
        chosen[group] = open_splits[0]
        filled[open_splits[0]] += sizes[group]
    return chosen[groups].astype(np.uint8)


def _stratified(how: Splits, labels: Sequence[str]) -> np.ndarray:
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows_of[label].append(row)
    if few := [label for label, rows in rows_of.items() if len(rows) < len(SPLITS)]:
        raise ValueError(
            f"the class {few[0]!r} has too few rows for three splits, {len(rows_of[few[0]])}; add rows, or take the "
            "class out of the file and the labels"
        )
    generator = np.random.default_rng(how.seed)
    counts = np.array([len(rows) for rows in rows_of.values()])
    chosen = np.full(len(labels), TRAIN, np.uint8)
    # At least one row of a rare class, and at least one is left for training.
    tests = np.clip(shares(counts, round(how.test * len(labels))), 1, counts - 2)
    validations = np.clip(shares(counts, round(how.validation * len(labels))), 1, counts - tests - 1)
    for rows, test, validation in zip(rows_of.values(), tests, validations, strict=True):
        order = generator.permutation(rows)
        chosen[order[:test]] = TEST
        chosen[order[test : test + validation]] = VALIDATION
    return chosen


def _times(keys: Sequence[str]) -> np.ndarray:
    """Times or numbers as numbers."""
    numbers = pd.to_numeric(pd.Series(keys), errors="coerce")
    if numbers.notna().all():
        return numbers.to_numpy()
    times = pd.to_datetime(pd.Series(keys), errors="coerce", format="mixed", utc=True)
    if times.isna().any():
        row = int(np.flatnonzero(times.isna())[0])
        raise ValueError(f"row {row + 1}: '{keys[row]}' is no time; write it as 2024-05-31 or 2024-05-31T12:00")
    return times.astype("int64").to_numpy()
