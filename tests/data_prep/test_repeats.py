"""Repeats against a brute-force search that shares no code with the finders."""

import random
import re

import pytest

from data_prep import LABELS, Article, prepare, read_examples
from data_prep.prompts import LEAN
from data_prep.repeats import RepeatCounter

VOCABULARY = ["oil", "goal", "war", "chip", "bank", "vote"]


def words_of(article: Article) -> tuple[str, ...]:
    return tuple(re.findall("[a-z0-9]+", f"{article.title} {article.description}".lower()))


def shingles_of(article: Article) -> set[tuple[str, ...]]:
    words = words_of(article)
    return {words[start : start + 5] for start in range(max(1, len(words) - 4))}


def random_article(generator: random.Random) -> Article:
    words = [generator.choice([word, word.upper(), word + ","]) for word in generator.choices(VOCABULARY, k=7)]
    words = words[: generator.randint(2, 7)]
    return Article(words[0], " ".join(words[1:]), generator.choice(LABELS))


def copies(articles: list[Article], generator: random.Random) -> list[Article]:
    """The articles with some words dropped at the end, and perhaps other labels."""
    kept = [(a, a.description.split()) for a in articles]
    return [
        Article(a.title, " ".join(words[: len(words) - generator.randint(0, 2)]), generator.choice(LABELS))
        for a, words in kept
    ]


def corpora(seed: int) -> tuple[list[Article], list[Article]]:
    generator = random.Random(seed)
    train = [random_article(generator) for _ in range(150)]
    test = [random_article(generator) for _ in range(60)] + copies(generator.sample(train, 20), generator)
    return train + copies(generator.sample(train, 20), generator), test


def count(train: list[Article], test: list[Article]) -> RepeatCounter:
    repeats = RepeatCounter(test)
    for article in train:
        repeats.see(article)
    return repeats


@pytest.mark.parametrize("seed", range(8))
def test_twins_are_those_of_brute_force(seed):
    train, test = corpora(seed)
    exact = {row for row, article in enumerate(test) if any(words_of(article) == words_of(other) for other in train)}
    near = {
        row
        for row, article in enumerate(test)
        if any(2 * len(shingles_of(article) & shingles_of(other)) >= len(shingles_of(article)) for other in train)
    }
    twins = count(train, test).twins
    assert twins.exact == exact
    assert twins.near | twins.exact == near | exact
    assert 0 < len(exact) < len(near) < len(test), "the corpus must hold every kind of row"
    assert [twins.has_twin(row) for row in range(len(test))] == [row in near | exact for row in range(len(test))]


@pytest.mark.parametrize("seed", range(8))
def test_contradictions_are_those_of_brute_force(seed):
    """Near contradictions are estimated: all rows of equal shingles, and none that share no shingle."""
    train, _ = corpora(seed)
    others = [[other for other in train if other.label != article.label] for article in train]
    exact = sum(any(words_of(a) == words_of(b) for b in rest) for a, rest in zip(train, others, strict=True))
    surely = sum(any(shingles_of(a) == shingles_of(b) for b in rest) for a, rest in zip(train, others, strict=True))
    possibly = sum(any(shingles_of(a) & shingles_of(b) for b in rest) for a, rest in zip(train, others, strict=True))
    contradictions = count(train, []).contradictions
    assert contradictions.exact() == exact > 0
    assert surely <= contradictions.near() <= possibly


@pytest.mark.parametrize(("changed_words", "expected"), [(5, 0.953), (15, 0.578)], ids=["J = 0.8", "J = 0.5"])
def test_near_contradictions_are_found_as_often_as_documented(changed_words, expected):
    pairs, train = 400, []
    for pair in range(pairs):
        words = [f"w{pair}x{position}" for position in range(49)]
        changed = words[:-changed_words] + [f"{word}y" for word in words[-changed_words:]]
        train += [Article("", " ".join(words), "World"), Article("", " ".join(changed), "Business")]
    found = count(train, []).contradictions.near() / (2 * pairs)
    # Four standard errors of a share of 400 pairs.
    assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / pairs) ** 0.5)


def test_rows_repeated_under_the_same_label_do_not_contradict():
    article = Article("Oil rises", "Prices rose on Monday after the minister spoke.", "Business")
    contradictions = count([article] * 3, []).contradictions
    assert (contradictions.exact(), contradictions.near()) == (0, 0)


def test_articles_without_latin_letters_are_told_apart():
    train = [Article("", "東京で株価が上昇した", "Business"), Article("", "선수가 금메달을 땄다", "Sports")]
    test = [Article("", "Выборы прошли в воскресенье", "World")]
    repeats = count(train, test)
    assert not repeats.twins.has_twin(0)
    assert repeats.contradictions.exact() == 0


def rows_of(kind: str, count: int) -> list[tuple[str, str, str]]:
    """CSV rows that share no word."""
    words = ("alpha", "beta", "gamma", "delta", "epsilon")
    return [
        (str(1 + row % 4), f"{kind}title{row}", " ".join(f"{kind}{word}{row}" for word in words))
        for row in range(count)
    ]


def test_prepare_counts_and_marks_twins(make_source, tmp_path):
    train, test = rows_of("train", 40), rows_of("test", 8)
    test[2] = (test[2][0], train[20][1].upper(), train[20][2] + ".")
    test[5] = (test[5][0], "", f"{train[21][2]} later")
    source = make_source(train, test, validation=8)
    manifest, _ = prepare(source, tmp_path / "out", prompt=LEAN)
    twins = [row.id for row in read_examples(tmp_path / "out", "test") if row.has_twin]
    assert twins == ["test-2", "test-5"]
    assert (manifest.repeats.test_exact_in_train, manifest.repeats.test_near_in_train) == (1, 1)


def test_a_twin_in_validation_is_no_twin_in_train(make_source, tmp_path):
    rows, folder = rows_of("row", 40), tmp_path / "out"
    manifest, _ = prepare(make_source(rows, rows), folder, prompt=LEAN, validation_rows=8)
    in_validation = {row.id.removeprefix("train-") for row in read_examples(folder, "validation")}
    without = {row.id.removeprefix("test-") for row in read_examples(folder, "test") if not row.has_twin}
    assert without == in_validation
    assert manifest.repeats.test_exact_in_train == 32
