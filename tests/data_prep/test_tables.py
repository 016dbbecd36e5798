"""Tables as people have them, under a user's description: read as pandas reads them, or refused in a sentence."""

import gzip
import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from data_prep import DataError, UserError, prepare, read_examples
from data_prep.files import SPLITS
from data_prep.sources import open_source
from data_prep.task import parse_task

TEXTS = [f"Line {row}; it has, 'all' sorts of \"words\" \U0001f600 {row * 7 % 10}" for row in range(30)]
LABELS = ["spam" if row % 3 else "ham, really" for row in range(30)]
FRAME = pd.DataFrame({"id": range(100, 130), "Text ": TEXTS, "label": LABELS})
LONG = FRAME.assign(**{"Text ": ["x" * 100_000, *TEXTS[1:]]})


def task_of(folder, at="table.csv", labels=("spam", "ham, really"), texts="Text", label="label", more="", **source):
    """A task on a file in `folder`, split at random."""
    columns = {"at": at, "texts": texts, "label": label, **source}
    (folder / "tasks").mkdir(exist_ok=True)
    text = f"labels: {json.dumps(list(labels))}\nsources: {{files: {json.dumps(columns)}}}\n"
    return parse_task(text + (more or "splits: {by: stratified}"), folder / "tasks" / "own.yaml")


def rows_of(task):
    source = open_source("files", task)
    return [(row.text, row.label) for split in source.splits() for row in source.rows(split)]


READ = {
    "commas": ("a.csv", FRAME.to_csv(index=False).encode()),
    "an index": ("a.csv", FRAME.to_csv().encode()),
    "semicolons": ("a.csv", FRAME.to_csv(index=False, sep=";").encode()),
    "tabs": ("a.tsv", FRAME.to_csv(index=False, sep="\t").encode()),
    "Windows": ("a.csv", FRAME.to_csv(index=False, lineterminator="\r\n").encode("utf-8-sig")),
    "long rows": ("a.csv", LONG.to_csv(index=False).encode()),
    "JSON lines": ("a.jsonl", FRAME.to_json(orient="records", lines=True).encode()),
    "JSON lines with a mark": ("a.jsonl", FRAME.to_json(orient="records", lines=True).encode("utf-8-sig")),
    "JSON lines by another name": ("a.json", FRAME.to_json(orient="records", lines=True).encode()),
    "JSON": ("a.json", FRAME.to_json(orient="records", indent=1).encode()),
    "JSON lines in UTF-16": ("a.jsonl", FRAME.to_json(orient="records", lines=True).encode("utf-16")),
    "packed": ("a.csv.gz", gzip.compress(FRAME.to_csv(index=False).encode())),
    "packed, by another name": ("a.csv", gzip.compress(FRAME.to_csv(index=False).encode())),
    "packed JSON lines": ("a.jsonl.gz", gzip.compress(FRAME.to_json(orient="records", lines=True).encode())),
    "Parquet": ("a.parquet", FRAME.to_parquet()),
}


@pytest.mark.parametrize(("name", "content"), READ.values(), ids=READ)
def test_the_rows_are_those_of_the_frame(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    # JSON and Parquet name their columns exactly.
    texts = "Text" if "sv" in name else "Text "
    frame = LONG if len(content) > 100_000 else FRAME
    found = rows_of(task_of(tmp_path, name, texts=texts))
    assert sorted(found) == sorted(zip(frame["Text "].str.strip(), frame["label"], strict=True))


def test_an_encoding_is_read_where_the_task_names_it(tmp_path):
    rows = [("Café", "spam"), ("It’s", "ham, really")] * 6
    pd.DataFrame(rows, columns=["Text", "label"]).to_csv(tmp_path / "table.csv", index=False, encoding="cp1252")
    source = open_source("files", task_of(tmp_path, encoding="cp1252"))
    assert {(row.text, row.label) for row in source.rows("train")} == set(rows)
    assert source.recognised()[0].startswith("in table.csv cp1252, ")


def test_a_workbook_is_read_as_its_sheet(tmp_path):
    pytest.importorskip("openpyxl")
    frame = FRAME.assign(n=[row / 2 for row in range(30)], Long="two\nlines", label=[row % 3 for row in range(30)])
    with pd.ExcelWriter(tmp_path / "a.xlsx") as book:
        frame.to_excel(book, sheet_name="Data", index=False)
        FRAME.to_excel(book, sheet_name="Notes")
    task = task_of(tmp_path, "a.xlsx", ("0", "1", "2"), texts=["Text", "n", "Long"])
    expected = [(f"{row[1].strip()} {row[3]:g} two\nlines", str(row[2])) for row in frame.itertuples(index=False)]
    assert sorted(rows_of(task)) == sorted(expected)
    assert open_source("files", task).recognised()[0].startswith("in a.xlsx the first of 2 sheets, Data, a header")


def test_a_workbook_without_its_library_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"a\.xlsx: a workbook is read by openpyxl: pip install openpyxl"):
        rows_of(task_of(tmp_path, "a.xlsx"))


VALUES = {
    "booleans in Parquet": ("a.parquet", [row % 2 == 0 for row in range(30)], ("true", "false"), str.lower),
    "booleans in CSV": ("a.csv", [row % 2 == 0 for row in range(30)], ("true", "false"), str.lower),
    "numbers from 0": ("a.jsonl", [row % 4 for row in range(30)], ("0", "1", "2", "3"), str),
    "numbers from 1": ("a.csv", [1 + row % 4 for row in range(30)], ("1", "2", "3", "4"), str),
    "whole floats": ("a.parquet", [float(row % 2) for row in range(30)], ("0", "1"), lambda text: text[:-2]),
    "ids with zeros": ("a.csv", [f"00{row % 3}" for row in range(30)], ("000", "001", "002"), str),
    "prefixes": ("a.csv", ["Other", "Other issue"] * 15, ("Other", "Other issue"), str),
}


@pytest.mark.parametrize(("name", "values", "labels", "spelled"), VALUES.values(), ids=VALUES)
def test_a_label_may_be_a_name_a_number_or_a_truth_value(tmp_path, name, values, labels, spelled):
    frame = FRAME.assign(label=values)
    write = {"csv": lambda: frame.to_csv(index=False).encode(), "parquet": frame.to_parquet}
    write["jsonl"] = lambda: frame.to_json(orient="records", lines=True).encode()
    (tmp_path / name).write_bytes(write[name.partition(".")[2]]())
    found = dict(rows_of(task_of(tmp_path, name, labels, texts="Text" if name.endswith("csv") else "Text ")))
    assert found == {text: spelled(str(value)) for text, value in zip(TEXTS, values, strict=True)}


def lines(*records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


ROW = {"Text": "A text", "label": "spam"}
CSV = b"Text,label\nA text,spam\nAnother,spam\n"
NAN = b'{"Text": "A", "label": NaN}\n'
REFUSED = {
    "no such file": ("b.csv", None, r"b\.csv: no such file"),
    "an old workbook": ("a.xls", b"\xd0\xcf\x11\xe0", r"a\.xls: this is an old workbook; save it as \.xlsx"),
    "a workbook by another name": ("a.csv", b"PK\x03\x04", r"a\.csv:1: .*give it the ending \.xlsx"),
    "a workbook that is none": ("a.xlsx", b"PK\x03\x04", r"a\.xlsx: (not a workbook|.*pip install openpyxl)"),
    "packed and cut": ("a.csv.gz", gzip.compress(CSV)[:-9], r"a\.csv\.gz: not gzip to its end .*cut short"),
    "a number of 5,000 digits": (
        "a.jsonl",
        b'{"Text": ' + b"1" * 5000 + b"}",
        r"a\.jsonl:1: JSON that Python does not",
    ),
    "50,000 brackets": ("a.json", b"[" * 50_000, r"a\.json: JSON that Python does not read"),
    "half a character": ("a.jsonl", lines({"Text": "A\ud83d", "label": "spam"}), r"a\.jsonl:1: Text holds half a char"),
    "another form": ("a.docx", b"", r"a\.docx: this is a form that we do not read; we read \.csv, \.tsv"),
    "no such column": ("a.csv", b"Body,label\nA,spam\n", r"a\.csv:1: no column Text in .*, which has: Body, label"),
    "two without names": (
        "a.csv",
        b"A text,spam\nOne more,spam\n",
        r"a\.csv:1: no column label and no column Text .*has: A text, spam",
    ),
    "NaN for a label": ("a.jsonl", lines(ROW) + NAN, r"a\.jsonl:2: no label: nothing in label"),
    "an empty label": ("a.csv", CSV + b"One more,\n", r"a\.csv:4: no label: nothing in label"),
    "another label": ("a.csv", CSV + b"One more,egg\n", r"a\.csv:4: unknown label 'egg'; known are: spam, ham, really"),
    "an empty text": ("a.csv", CSV + b" ,spam\n", r"a\.csv:4: empty text"),
    "cp1252": ("a.csv", CSV + "Café,spam\n".encode("cp1252"), r"a\.csv:4: not UTF-8.*cp1252.*iconv -f CP1252"),
    "a NUL": ("a.csv", CSV + b"A\0,spam\n", r"a\.csv:4: a NUL character"),
    "carriage returns": ("a.csv", CSV.replace(b"\n", b"\r"), r"a\.csv:1: .*carriage return alone"),
    "an unbalanced quote": ("a.csv", CSV + b'"One,spam\n', r"a\.csv:4: .*a quote of this row is never closed"),
    "cut JSON lines": ("a.jsonl", lines(ROW) + b'{"Text": "A', r"a\.jsonl:2: not valid JSON .*cut short"),
    "an empty line": ("a.jsonl", lines(ROW) + b"\n" + lines(ROW), r"a\.jsonl:2: an empty line; delete it"),
    "no object": ("a.jsonl", b"[1, 2]\n", r"a\.jsonl:1: not an object"),
    "a key that a row lacks": ("a.jsonl", lines(ROW, {"Text": "A"}), r"a\.jsonl:2: no column label; there are: Text"),
    "a list for a text": ("a.jsonl", lines(ROW | {"Text": ["A"]}), r"a\.jsonl:1: Text holds a list"),
    "JSON of columns": ("a.json", b'{"Text": {"0": "A"}}', r"a\.json: not a list of objects"),
    "cut JSON": ("a.json", b'[{"Text": "A"},\n', r"a\.json:\d: not valid JSON"),
    "no Parquet": ("a.parquet", CSV, r"a\.parquet: not Parquet"),
    "no rows": ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
    "two rows of a class": (
        "a.csv",
        CSV + b'A,"ham, really"\nB,"ham, really"\nC,spam\n',
        r"a\.csv: the class 'ham, really' has too few rows for three splits, 2;",
    ),
}


@pytest.mark.parametrize(("name", "content", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_a_sentence_and_nothing_is_written(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}.*{reason}") as refused:
        prepare(open_source("files", task_of(tmp_path, name)), tmp_path / "out", prompt="lean")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_rows_without_text_or_label_are_left_out_on_request(tmp_path):
    gaps = FRAME.assign(label=[None, *LABELS[1:]])
    gaps.loc[3, "Text "] = " "
    for name, texts in (("a.csv", "Text"), ("a.parquet", "Text ")):
        gaps.to_csv(tmp_path / name, index=False) if name == "a.csv" else gaps.to_parquet(tmp_path / name)
        with pytest.raises(DataError, match="skip_incomplete: true"):
            rows_of(task_of(tmp_path, name, texts=texts))
        task = task_of(tmp_path, name, texts=texts, skip_incomplete="true")
        assert {text for text, _ in rows_of(task)} == {text for row, text in enumerate(TEXTS) if row not in (0, 3)}
        assert open_source("files", task).recognised()[-1] == "rows without text or label, left out: 2"


class TestSpellings:
    @pytest.fixture
    def table(self, tmp_path):
        labels = ["Sports", "sports ", "Arts"] * 10
        FRAME.assign(label=labels).to_csv(tmp_path / "table.csv", index=False)
        return labels

    def test_two_of_a_label_are_refused_until_the_task_says_what_they_are(self, tmp_path, table):
        with pytest.raises(DataError, match=r"table\.csv:3: the label is 'sports ' here, and 'Sports' in table\.csv:2"):
            rows_of(task_of(tmp_path, labels=("Sports", "Arts")))

    def test_they_are_one_on_request(self, tmp_path, table):
        found = dict(rows_of(task_of(tmp_path, labels=("Sports", "Arts"), merge_spellings="true")))
        assert [found[text] for text in TEXTS] == [label.strip().title() for label in table]

    def test_they_are_two_where_both_are_listed(self, tmp_path, table):
        found = dict(rows_of(task_of(tmp_path, labels=("Sports", "sports ", "Arts"))))
        assert [found[text] for text in TEXTS] == table

    def test_one_spelling_alone_is_the_label_s(self, tmp_path):
        FRAME.assign(label=[" SPAM", "Ham"] * 15).to_csv(tmp_path / "table.csv", index=False)
        assert {label for _, label in rows_of(task_of(tmp_path, labels=("spam", "ham")))} == {"spam", "ham"}


class TestSplits:
    @pytest.fixture
    def prepared(self, tmp_path):
        """Prepares 300 rows of three classes, customers and days, and returns the rows of each split by their ids."""
        generator = np.random.default_rng(0)
        frame = pd.DataFrame(
            {
                "text": [f"row {row}" for row in range(300)],
                "label": ["common"] * 230 + ["rare"] * 45 + ["rarest"] * 25,
                "customer": [f"c{number}" for number in generator.integers(0, 40, 300)],
                "day": [f"2024-{1 + number // 28:02}-{1 + number % 28:02}" for number in generator.permutation(300)],
            }
        )
        frame.to_csv(tmp_path / "table.csv", index=False)

        def prepared(more: str):
            task = task_of(tmp_path, labels=("common", "rare", "rarest"), texts="text", more=more)
            prepare(open_source("files", task), tmp_path / "out", prompt="lean")
            texts = {split: [row.text for row in read_examples(tmp_path / "out", split)] for split in SPLITS}
            assert sorted(text for rows in texts.values() for text in rows) == sorted(frame["text"])
            return {split: frame.set_index("text").loc[rows] for split, rows in texts.items()}

        return prepared

    def test_at_random_each_class_keeps_its_share_and_a_rare_one_is_everywhere(self, prepared):
        parts = prepared("splits: {by: stratified, validation: 0.1, test: 0.2}")
        counts = pd.DataFrame({split: part["label"].value_counts() for split, part in parts.items()})
        shares = pd.Series({"train": 0.7, "validation": 0.1, "test": 0.2})
        for label, rows in {"common": 230, "rare": 45, "rarest": 25}.items():
            assert ((counts.loc[label] - shares * rows).abs() < 1).all()
        again = prepared("splits: {by: stratified, seed: 7}")
        assert list(again["test"].index) != list(parts["test"].index)

    def test_no_group_is_in_two_splits(self, prepared):
        parts = prepared("splits: {by: group, column: customer}")
        customers = [set(part["customer"]) for part in parts.values()]
        assert not (customers[0] & customers[1] or customers[0] & customers[2] or customers[1] & customers[2])
        assert 50 <= len(parts["test"]) <= 70 and 20 <= len(parts["validation"]) <= 40

    def test_the_latest_rows_are_the_test(self, prepared):
        parts = prepared("splits: {by: time, column: day, validation: 0.2, test: 0.3}")
        assert parts["train"]["day"].max() < parts["validation"]["day"].min()
        assert parts["validation"]["day"].max() < parts["test"]["day"].min()
        assert [len(part) for part in parts.values()] == [150, 60, 90]

    def test_what_is_no_time_is_told_with_its_row(self, prepared):
        with pytest.raises(DataError, match=r"table\.csv: row 1: 'c\d+' is no time; write it as 2024-05-31"):
            prepared("splits: {by: time, column: customer}")

    def test_a_column_that_is_not_there_is_told(self, prepared):
        with pytest.raises(DataError, match=r"table\.csv:1: no column weather in the first line"):
            prepared("splits: {by: group, column: weather}")

    def test_training_rows_of_one_class_are_refused(self, prepared):
        with pytest.raises(DataError, match=r"table\.csv, split train: (no row|rows of .* alone) for train"):
            prepared("splits: {by: group, column: label}")


class TestGiven:
    def test_a_folder_s_files_may_have_several_forms(self, tmp_path):
        FRAME.to_csv(tmp_path / "train.csv", index=False)
        FRAME[:9].to_csv(tmp_path / "dev.tsv", index=False, sep="\t")
        FRAME[9:18].rename(columns={"Text ": "Text"}).to_parquet(tmp_path / "test.parquet")
        source = open_source("files", task_of(tmp_path, ".", more="splits: {by: given}"))
        found = {split: [row.text for row in source.rows(split)] for split in source.splits()}
        assert found == {"train": TEXTS, "validation": TEXTS[:9], "test": TEXTS[9:18]}

    def test_a_file_for_each_split_and_a_share_for_validation(self, tmp_path):
        FRAME.to_csv(tmp_path / "a.csv", index=False)
        FRAME[:9].to_csv(tmp_path / "b.csv", index=False)
        task = task_of(tmp_path, {"train": "a.csv", "test": "b.csv"}, more="splits: {by: given, validation: 0.3}")
        manifest, _ = prepare(open_source("files", task), tmp_path / "out", prompt="lean")
        assert manifest.rows["validation"] == {"spam": 6, "ham, really": 3} and manifest.total("test") == 9
        assert prepare(open_source("files", task), tmp_path / "out", prompt="lean")[1]

    def test_training_rows_alone_are_split(self, tmp_path):
        FRAME.to_csv(tmp_path / "train.csv", index=False)
        manifest, _ = prepare(open_source("files", task_of(tmp_path, ".")), tmp_path / "out", prompt="lean")
        assert manifest.rows["test"] == {"spam": 4, "ham, really": 2} and manifest.total("train") == 21

    def test_rows_that_are_split_are_not_split_again(self, tmp_path):
        FRAME.to_csv(tmp_path / "train.csv", index=False)
        FRAME.to_csv(tmp_path / "test.csv", index=False)
        with pytest.raises(DataError, match=r"train\.csv: the files are split already: set splits\.by to given"):
            open_source("files", task_of(tmp_path, ".")).splits()

    def test_a_class_with_one_training_row_keeps_it(self, tmp_path):
        FRAME.assign(label=["rare", *LABELS[1:]]).to_csv(tmp_path / "train.csv", index=False)
        FRAME.to_csv(tmp_path / "test.csv", index=False)
        task = task_of(tmp_path, ".", ("spam", "ham, really", "rare"), more="splits: {by: given}")
        manifest, _ = prepare(open_source("files", task), tmp_path / "out", prompt="lean")
        assert manifest.rows["train"]["rare"] == 1 and manifest.missing == {"validation": ["rare"], "test": ["rare"]}

    @pytest.mark.parametrize(
        ("at", "named"), [(".", r"test\.csv"), ({"train": "train.csv"}, r"at\.test"), ({"test": "b.csv"}, "at.train")]
    )
    def test_a_missing_file_is_named(self, tmp_path, at, named):
        FRAME.to_csv(tmp_path / "train.csv", index=False)
        with pytest.raises(DataError, match=f"{named}: no such file"):
            open_source("files", task_of(tmp_path, at, more="splits: {by: given}")).splits()

    def test_one_file_needs_a_way_to_split(self, tmp_path):
        FRAME.to_csv(tmp_path / "table.csv", index=False)
        with pytest.raises(UserError, match=r"table\.csv: one file: set splits\.by"):
            rows_of(task_of(tmp_path, more="splits: {by: given}"))


@pytest.mark.parametrize(
    ("kind", "values", "labels"),
    [
        (ClassLabel(names=["neg", "pos"]), [row % 2 for row in range(30)], ("neg", "pos")),
        (Value("bool"), [row % 2 == 1 for row in range(30)], ("false", "true")),
        (Value("int64"), [row % 2 for row in range(30)], ("0", "1")),
    ],
    ids=["classes", "booleans", "numbers"],
)
def test_a_set_of_the_hub_has_a_task_of_its_own(tmp_path, monkeypatch, kind, values, labels):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = Dataset.from_dict({"body": TEXTS, "y": values}, features=Features(body=Value("string"), y=kind))
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    columns = {"at": str(tmp_path / "set"), "texts": "body", "label": "y"}
    text = f"labels: {json.dumps(labels)}\nsources: {{hub: {json.dumps(columns)}}}\nsplits: {{by: given}}"
    task = parse_task(text, tmp_path / "tasks" / "own.yaml")
    manifest, _ = prepare(open_source("hub", task), tmp_path / "out", prompt="lean")
    assert manifest.rows["test"] == dict.fromkeys(labels, 15) and manifest.total("validation") == 3
    split = parse_task(text.replace("given", "stratified"), tmp_path / "tasks" / "own.yaml")
    with pytest.raises(UserError, match=r"has the splits train, test: set splits\.by to given"):
        prepare(open_source("hub", split), tmp_path / "out-2", prompt="lean")
    # Training rows alone are split.
    (tmp_path / "set" / "data" / "test-00000-of-00001.parquet").unlink()
    manifest, _ = prepare(open_source("hub", split), tmp_path / "out-2", prompt="lean")
    assert [manifest.total(part) for part in SPLITS] == [21, 3, 6]
    assert {row.text for part in SPLITS for row in read_examples(tmp_path / "out-2", part)} == set(TEXTS)
