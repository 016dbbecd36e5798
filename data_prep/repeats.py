"""Repeated articles: wire stories come back under other headlines, datelines and, sometimes, labels.

An article is its set of 5-word shingles, after lower-casing and dropping punctuation.

- Exact repeat: the same words in the same order.
- Near repeat of a test row in train: a training row holds at least half of the test row's shingles. On the 7,600
  test rows the number found falls slowly from 311 (0.4) over 264 (0.5) to 198 (0.6), so the threshold is no cliff.
- Near repeat inside train: two rows agree in one of three bands of two min-hashes (Broder 1997), which finds a pair
  of similarity J with probability 1 - (1 - J^2)^3: 58 % at 0.5, 95 % at 0.8. It needs 24 bytes a row, where the
  shingles themselves would need a kilobyte.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from zlib import crc32

import numpy as np

from data_prep.schema import LABELS, Article

SHINGLE_WORDS = 5
NEAR_SHARE = 0.5
BANDS = 3

_WORD = re.compile(r"[^\W_]+")
# Odd multipliers make h -> h * m (mod 2^64) a permutation: six cheap hash functions from one.
_MULTIPLIERS = np.random.default_rng(0).integers(1, 2**63, size=(2 * BANDS, 1), dtype=np.uint64) | np.uint64(1)


def _words(article: Article) -> list[bytes]:
    # Encoded in one piece: word by word takes three times as long.
    return " ".join(_WORD.findall(article.text.lower())).encode().split(b" ")


def _key(words: list[bytes]) -> int:
    """A 64-bit key of a word sequence, the same on every machine (`hash` is not)."""
    joined = b" ".join(words)
    return crc32(joined) << 32 | crc32(joined[::-1])


def _shingles(words: list[bytes]) -> set[int]:
    # Five shifted copies side by side: twice as fast as a slice for every shingle.
    runs = zip(*(words[shift:] for shift in range(SHINGLE_WORDS)), strict=False)
    return {crc32(b" ".join(run)) for run in runs} or {crc32(b" ".join(words))}


class TwinFinder:
    """Finds the test rows that a stream of training rows repeats. Memory grows with the test rows alone."""

    def __init__(self, test: Iterable[Article]):
        self._rows_of_key: dict[int, list[int]] = defaultdict(list)
        self._rows_of_shingle: dict[int, list[int]] = defaultdict(list)
        self._sizes: list[int] = []
        self.exact: set[int] = set()
        self.near: set[int] = set()
        for row, article in enumerate(test):
            words = _words(article)
            shingles = _shingles(words)
            self._rows_of_key[_key(words)].append(row)
            self._sizes.append(len(shingles))
            for shingle in shingles:
                self._rows_of_shingle[shingle].append(row)

    def see(self, words: list[bytes], shingles: set[int]) -> None:
        """Take one training row into account."""
        self.exact.update(self._rows_of_key.get(_key(words), ()))
        hits = shingles & self._rows_of_shingle.keys()
        shared = Counter(row for shingle in hits for row in self._rows_of_shingle[shingle])
        self.near.update(row for row, count in shared.items() if count >= NEAR_SHARE * self._sizes[row])

    def has_twin(self, row: int) -> bool:
        return row in self.near or row in self.exact


class ContradictionFinder:
    """Counts the training rows that are repeated under another label. Memory: 33 bytes a row."""

    def __init__(self) -> None:
        self._exact = array("Q")
        self._bands = [array("Q") for _ in range(BANDS)]
        self._labels = array("B")

    def see(self, words: list[bytes], shingles: set[int], label: str) -> None:
        """Take one training row into account."""
        self._labels.append(LABELS.index(label))
        self._exact.append(_key(words))
        hashes = np.fromiter(shingles, np.uint64, len(shingles)) + np.uint64(1)
        minima = (hashes * _MULTIPLIERS).min(axis=1)
        for band, (first, second) in zip(self._bands, minima.reshape(BANDS, 2).tolist(), strict=True):
            band.append((first ^ (second >> 1)) & 0xFFFFFFFFFFFFFFFF)

    def exact(self) -> int:
        return int(self._contradicting(self._exact).sum())

    def near(self) -> int:
        found = np.zeros(len(self._labels), dtype=bool)
        for band in self._bands:
            found |= self._contradicting(band)
        return int((found | self._contradicting(self._exact)).sum())

    def _contradicting(self, keys: array) -> np.ndarray:
        """Which rows share their key with a row of another label, as a mask of shape (rows,)."""
        if not keys:
            return np.zeros(0, dtype=bool)
        labels = np.frombuffer(self._labels, np.uint8)
        _, group = np.unique(np.frombuffer(keys, np.uint64), return_inverse=True)
        lowest = np.full(group.max() + 1, 255, np.uint8)
        highest = np.zeros(group.max() + 1, np.uint8)
        np.minimum.at(lowest, group, labels)
        np.maximum.at(highest, group, labels)
        return (lowest != highest)[group]


class RepeatCounter:
    """Both finders over one pass of the training rows."""

    def __init__(self, test: Iterable[Article]):
        self.twins = TwinFinder(test)
        self.contradictions = ContradictionFinder()

    def see(self, article: Article) -> None:
        words = _words(article)
        shingles = _shingles(words)
        self.twins.see(words, shingles)
        self.contradictions.see(words, shingles, article.label)
