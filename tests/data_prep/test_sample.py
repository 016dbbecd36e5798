"""The built-in sample: balanced, plain, and with nothing in two splits."""

from collections import Counter
from itertools import combinations

import pytest

from data_prep.clean import repaired
from data_prep.sources import sample
from data_prep.task import AG_NEWS

LABELS = AG_NEWS.labels
SPLITS = {"train": 288, "validation": 64, "test": 128}


@pytest.fixture(scope="module")
def splits():
    return {split: list(sample(AG_NEWS).rows(split)) for split in SPLITS}


def runs_of_eight(articles) -> set[str]:
    words = [article.text.lower().split() for article in articles]
    return {" ".join(row[start : start + 8]) for row in words for start in range(len(row) - 7)}


@pytest.mark.parametrize(("split", "rows"), SPLITS.items())
def test_each_split_is_balanced(splits, split, rows):
    assert Counter(article.label for article in splits[split]) == dict.fromkeys(LABELS, rows // 4)


def test_no_item_repeats(splits):
    articles = [article for rows in splits.values() for article in rows]
    for column in (0, 1):
        texts = Counter(article.texts[column].lower() for article in articles)
        assert [text for text, count in texts.items() if count > 1] == []


@pytest.mark.parametrize(("first", "second"), combinations(SPLITS, 2))
def test_no_run_of_eight_words_is_in_two_splits(splits, first, second):
    assert runs_of_eight(splits[first]) & runs_of_eight(splits[second]) == set()


def test_text_is_ascii_and_has_no_artefacts(splits):
    for article in (article for rows in splits.values() for article in rows):
        assert article.text.isascii(), article
        assert all(article.texts)
        assert repaired(article.texts[1], AG_NEWS.repairs) == article.texts[1]


def test_classes_are_mixed_within_each_split(splits):
    """A run of one class would train on it alone for many steps where rows are not shuffled."""
    for rows in splits.values():
        labels = "".join(str(LABELS.index(article.label)) for article in rows)
        assert not any(str(index) * 12 in labels for index in range(4))
