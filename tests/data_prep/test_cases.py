"""Inputs that once failed, each as a folder: read right, or refused in one sentence that says what to do."""

from pathlib import Path

import pandas as pd
import pytest

from data_prep import UserError, prepare, read_examples
from data_prep.sources import open_source
from data_prep.task import AG_NEWS

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"no inputs in {CASES}")

# All hold the same 40 rows.
ALIKE = {
    "semicolon": ["in train.csv columns separated by semicolons"],
    "tab": ["in train.csv columns separated by tabs"],
    "excel_sep": ["in train.csv Excel's line sep=,"],
    "header_label_title_description": [
        "in train.csv a header, with label as the label and title + description as the text"
    ],
    "utf16": ["in train.csv UTF-16"],
    "pandas_index": [
        "in train.csv a header, with Class Index as the label and Title + Description as the text, "
        "not read: a column without a name"
    ],
    "label_names": ["labels by name: World, Sports, Business, Sci/Tech"],
    "hub_alphabetical_classlabel": ["labels by name, not by number"],
    "hub_string_labels": ["labels by name"],
}
REFUSED = {
    "cr_only": r"train\.csv:1: .*carriage return alone.*convert it: tr",
    "empty_file": r"train\.csv: the file is empty",
    "hub_null_text": r"split train, row 1: no text",
    "hub_one_based": r"split train: label holds the numbers 1, 2, 3, 4 without names.*ClassLabel",
    "hub_train_only": r"no test split; it has train",
    "latin1": r"train\.csv:41: not UTF-8.*cp1252 .Latin-1.*Café.*iconv -f CP1252",
    "lfs_pointer": r"train\.csv:1: this is a Git LFS pointer, not the data",
    "rare_class": r"train\.csv: the class Sci/Tech has 2 of 452 rows, of which validation_rows=8",
    "zero_based": r"train\.csv:1: the label is 0 here, and 4 in test\.csv:4",
}
KEPT = {
    "angle_email": "Letters: desk <news@quilby.example> or <http://quilby.example/a>.",
    "less_than_math": "a <b and c> d holds where x<y or y>z.",
}


def prepared(case, folder):
    source = open_source("hub" if case.startswith("hub") else "csv", AG_NEWS, str(CASES / case))
    manifest, _ = prepare(source, folder, prompt="lean", validation_rows=8)
    rows = [row for split in ("train", "validation") for row in read_examples(folder, split)]
    return manifest, sorted(rows, key=lambda row: int(row.id.removeprefix("train-")))


@pytest.mark.parametrize(("case", "said"), ALIKE.items(), ids=ALIKE)
def test_another_form_gives_the_same_rows(case, said, tmp_path):
    manifest, rows = prepared(case, tmp_path)
    plain = pd.read_csv(CASES / "zero_based" / "train.csv", header=None)
    expected = [(f"{title} {text}", AG_NEWS.labels[label]) for label, title, text in plain.itertuples(index=False)]
    assert [(row.text, row.label) for row in rows] == expected
    assert manifest.recognised == said


@pytest.mark.parametrize(("case", "reason"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_read_is_refused(case, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as refused:
        prepared(case, tmp_path / "out")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("case", "text"), KEPT.items(), ids=KEPT)
def test_text_in_angle_brackets_is_kept(case, text, tmp_path):
    assert prepared(case, tmp_path)[1][-1].text.endswith(text)


def test_a_long_field_is_whole(tmp_path):
    plain = pd.read_csv(CASES / "field_140k" / "train.csv", header=None)
    assert max(len(row.text) for row in prepared("field_140k", tmp_path)[1]) > plain[2].str.len().max() > 131_072


def test_test_rows_that_are_training_rows_are_counted(tmp_path):
    found = prepared("test_is_train", tmp_path)[0].duplicates
    assert found.test_exact_in_train + found.test_near_in_train + found.test_in_validation == 48
    assert found.test_exact_in_train == 40
