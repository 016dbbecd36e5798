"""Duplicates against a brute-force search that shares no code with the finder."""

import random
import re
from dataclasses import replace

import pytest

from data_prep import prepare, read_examples
from data_prep.duplicates import DuplicateFinder

VOCABULARY = ["oil", "goal", "war", "chip", "bank", "vote"]


LABELS = 300
Row = tuple[str, int]


def words_of(row: Row) -> tuple[str, ...]:
    return tuple(re.findall("[a-z0-9]+", row[0].lower()))


def shingles_of(row: Row) -> set[tuple[str, ...]]:
    words = words_of(row)
    return {words[start : start + 5] for start in range(max(1, len(words) - 4))}


def random_row(generator: random.Random) -> Row:
    words = [generator.choice([word, word.upper(), word + ","]) for word in generator.choices(VOCABULARY, k=7)]
    return " ".join(words[: generator.randint(2, 7)]), generator.choice([0, LABELS - 1])


def copies(rows: list[Row], generator: random.Random) -> list[Row]:
    """The rows with some words dropped at the end, and perhaps other labels."""
    split = [text.split() for text, _ in rows]
    return [
        (" ".join(words[: max(1, len(words) - generator.randint(0, 2))]), generator.choice([0, LABELS - 1]))
        for words in split
    ]


def corpora(seed: int) -> tuple[list[Row], list[Row]]:
    generator = random.Random(seed)
    train = [random_row(generator) for _ in range(150)]
    test = [random_row(generator) for _ in range(60)] + copies(generator.sample(train, 20), generator)
    return train + copies(generator.sample(train, 20), generator), test


def found(train: list[Row], test: list[Row]) -> DuplicateFinder:
    finder = DuplicateFinder(text for text, _ in test)
    for text, label in train:
        finder.see(text, label)
    return finder


@pytest.mark.parametrize("seed", range(8))
def test_duplicates_are_those_of_brute_force(seed):
    train, test = corpora(seed)
    exact = {row for row, one in enumerate(test) if any(words_of(one) == words_of(other) for other in train)}
    near = {
        row
        for row, one in enumerate(test)
        if any(2 * len(shingles_of(one) & shingles_of(other)) >= len(shingles_of(one)) for other in train)
    }
    finder = found(train, test)
    assert finder.exact == exact
    assert finder.near | finder.exact == near | exact
    assert 0 < len(exact) < len(near) < len(test), "the corpus must hold every kind of row"
    assert finder.in_train == near | exact


@pytest.mark.parametrize("seed", range(8))
def test_contradictions_are_those_of_brute_force(seed):
    train, _ = corpora(seed)
    contradicting = sum(any(words_of(a) == words_of(b) and a[1] != b[1] for b in train) for a in train)
    assert found(train, []).contradicting() == contradicting > 0


def test_rows_repeated_under_the_same_label_do_not_contradict():
    assert found([("Prices rose on Monday after the minister spoke.", 2)] * 3, []).contradicting() == 0
    assert found([], []).contradicting() == 0


def test_texts_without_latin_letters_are_told_apart():
    finder = found([("東京で株価が上昇した", 2), ("선수가 금메달을 땄다", 1)], [("Выборы прошли в воскресенье", 0)])
    assert not finder.in_train
    assert finder.contradicting() == 0


def rows_of(kind: str, count: int) -> list[tuple[str, str, str]]:
    """CSV rows that share no word."""
    words = ("alpha", "beta", "gamma", "delta", "epsilon")
    return [
        (str(1 + row % 4), f"{kind}title{row}", " ".join(f"{kind}{word}{row}" for word in words))
        for row in range(count)
    ]


def test_prepare_counts_and_marks_duplicates(make_source, tmp_path):
    train, test = rows_of("train", 40), rows_of("test", 8)
    test[2] = (test[2][0], train[20][1].upper(), train[20][2] + ".")
    test[5] = (test[5][0], "", f"{train[21][2]} later")
    source = make_source(train, test, validation=8)
    manifest, _ = prepare(source, tmp_path / "out", prompt="lean")
    marked = [row.id for row in read_examples(tmp_path / "out", "test") if row.has_duplicate]
    assert marked == ["test-2", "test-5"]
    assert (manifest.duplicates.test_exact_in_train, manifest.duplicates.test_near_in_train) == (1, 1)


def test_a_duplicate_in_validation_is_none_in_train(make_source, tmp_path):
    rows, folder = rows_of("row", 40), tmp_path / "out"
    manifest, _ = prepare(make_source(rows, rows), folder, prompt="lean", validation_rows=8)
    in_validation = {row.id.removeprefix("train-") for row in read_examples(folder, "validation")}
    test = list(read_examples(folder, "test"))
    assert {row.id.removeprefix("test-") for row in test if not row.has_duplicate} == in_validation
    assert {row.id.removeprefix("test-") for row in test if row.in_validation} == in_validation
    # The mark is younger than published fingerprints, and no part of them.
    assert all(replace(row, in_validation=False).identity() == row.identity() for row in test)
    assert manifest.duplicates.test_exact_in_train == 32
    assert manifest.duplicates.test_in_validation == 8
