"""What a user reads when data is prepared, and what becomes of test rows that are training rows."""

import csv
import random

import pytest

from finetune import paths, predictions
from finetune.config.plan import plan
from finetune.data import load_data
from finetune.evaluate import baselines

WORDS = ["oil", "goal", "war", "chip", "bank", "vote", "cup", "moon", "mill", "port"]


def write(path, rows, **dialect) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, **dialect).writerows(rows)


@pytest.fixture
def load(home, tiny_model, tmp_path):
    """Prepares 40 training rows of random words and as many test rows, so many of which are training rows."""

    def load(repeated: int, in_validation: int = 0):
        generator = random.Random(0)
        rows = [(str(1 + row % 4), f"T{row}", " ".join(generator.choices(WORDS, k=9))) for row in range(88)]
        write(tmp_path / "train.csv", rows[:40], delimiter=";")
        write(tmp_path / "validation.csv", rows[80:])
        others = rows[40 + repeated : 80 - in_validation]
        write(tmp_path / "test.csv", rows[:repeated] + others + rows[80 : 80 + in_validation])
        values = {"source": "csv", "data_path": str(tmp_path), "model": str(tiny_model)}
        settings = plan("base", "cpu", values)
        return settings, load_data(settings)

    return load


def test_what_is_remarkable_is_said_each_time(load, capsys):
    settings, data = load(30)
    first = capsys.readouterr().out
    load_data(settings)
    again = capsys.readouterr().out
    for printed in (first, again):
        assert "\nRecognised: in train.csv columns separated by semicolons\n" in printed
        assert "\nDuplicates: 30 test rows repeat a training row, 0 nearly, and 0 more a validation row; 0" in printed
        assert "\nWARNING: 30 of 40 test rows repeat training rows" in printed
    assert first.startswith("Prepared") and again.startswith("Reused")
    assert data.title == data.reference.title == "your own data"


def test_few_duplicates_are_counted_without_a_warning(load, capsys):
    load(1)
    printed = capsys.readouterr().out
    assert "Duplicates: 1 test rows repeat" in printed and "WARNING" not in printed


def test_the_svm_s_accuracy_is_told_without_the_rows_that_it_knows(load):
    settings, data = load(30)
    fitted = baselines.fit_svm(settings, data)
    right = [row.label == answer for row, answer in zip(data.test[30:], answers(data), strict=True)]
    assert fitted.without_duplicates.rows == 10
    assert (
        baselines.table(fitted).loc["TF-IDF + linear SVM", "without duplicates"] == f"{sum(right) / 10:.1%} of 10 rows"
    )


def test_rows_that_are_validation_rows_are_not_among_the_others(load, capsys):
    settings, data = load(20, in_validation=8)
    assert "WARNING: 20 of 40 test rows repeat training rows, exactly or nearly, and 8 more" in capsys.readouterr().out
    fitted = baselines.fit_svm(settings, data)
    rows = predictions.read(paths.results_folder(settings.place) / "baselines" / "svm", fitted.predictions_digest)
    right = [row.label == row.prediction for row in rows[20:32]]
    assert (fitted.without_duplicates.rows, fitted.without_duplicates.accuracy) == (12, sum(right) / 12)
    assert [row.in_validation for row in rows] == [False] * 32 + [True] * 8


def test_where_the_svm_knows_all_test_rows_there_is_no_other_accuracy(load):
    settings, data = load(40)
    assert baselines.without_duplicates(baselines.fit_svm(settings, data)) == "no such row"


def test_the_svm_reads_characters_where_there_are_no_words(home, tiny_model, tmp_path):
    for split, rows in (("train", 40), ("test", 8)):
        write(tmp_path / f"{split}.csv", [(str(1 + row % 4), "", "☀☂☃☄"[row % 4] * (1 + row)) for row in range(rows)])
    values = {"source": "csv", "data_path": str(tmp_path), "model": str(tiny_model), "validation_rows": 8}
    settings = plan("base", "cpu", values)
    fitted = baselines.fit_svm(settings, load_data(settings))
    assert "characters" in fitted.description and fitted.scoring.accuracy == 1


def answers(data):
    """The SVM's on the last ten test rows, from scikit-learn alone."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    words = TfidfVectorizer(sublinear_tf=True, ngram_range=baselines.NGRAMS, min_df=baselines.LEAST_ROWS)
    model = LinearSVC(C=baselines.C).fit(
        words.fit_transform([row.text for row in data.train]), [row.label for row in data.train]
    )
    return model.predict(words.transform([row.text for row in data.test[30:]]))
