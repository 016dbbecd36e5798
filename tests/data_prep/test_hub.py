"""Sets that `datasets` loads, here from a folder: labels by their names, and one sentence for what is not there."""

from dataclasses import replace

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from data_prep import DataError, UserError, prepare
from data_prep.sources import Hub
from data_prep.task import AG_NEWS

LABELS = AG_NEWS.labels
NAMES = [LABELS[row % 4] for row in range(24)]
TEXTS = [f"Text {row} of {name}" for row, name in enumerate(NAMES)]


def column(labels, kind) -> Dataset:
    return Dataset.from_dict({"text": TEXTS, "label": labels}, features=Features(text=Value("string"), label=kind))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes splits as Parquet files, as the hub has them, and opens the folder."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(train: Dataset, name: str = "set", **others: Dataset) -> Hub:
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in ({"train": train, "test": train} | others).items():
            if rows is not None:
                rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        return Hub(str(tmp_path / name), AG_NEWS)

    return write


SETS = {
    "in the task's order": (ClassLabel(names=list(LABELS)), [LABELS.index(name) for name in NAMES], []),
    "in the alphabet's": (
        ClassLabel(names=sorted(LABELS)),
        [sorted(LABELS).index(name) for name in NAMES],
        ["labels by name, not by number"],
    ),
    "as text": (Value("string"), NAMES, ["labels by name"]),
    "spelled otherwise": (
        Value("string"),
        [f" {name.lower()}" for name in NAMES],
        ["labels by name", "' world' is World, ' sports' is Sports, ' business' is Business, ' sci/tech' is Sci/Tech"],
    ),
}


@pytest.mark.parametrize(("kind", "labels", "said"), SETS.values(), ids=SETS)
def test_labels_are_read_by_their_names(hub, kind, labels, said):
    source = hub(column(labels, kind))
    assert [(row.text, row.label) for row in source.rows("train")] == list(zip(TEXTS, NAMES, strict=True))
    assert source.recognised() == said


def test_a_set_that_was_saved_to_disk_is_loaded(tmp_path):
    rows = column(NAMES, Value("string"))
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path)
    assert [row.label for row in Hub(str(tmp_path), AG_NEWS).rows("test")] == NAMES


def without(values, row, value=None):
    return [*values[:row], value, *values[row + 1 :]]


NUMBERS = [LABELS.index(name) for name in NAMES]
CLASSES = ClassLabel(names=list(LABELS))
OTHERS = ClassLabel(names=["Politics", *LABELS[1:]])
REFUSED = {
    "counted from 0": (column(NUMBERS, Value("int64")), "train: label holds the numbers 0, 1, 2, 3 without names"),
    "counted from 1": (
        column([number + 1 for number in NUMBERS], Value("int64")),
        "split train: label holds the numbers 1, 2, 3, 4 without names.*World, Sports, Business, Sci/Tech.*ClassLabel",
    ),
    "other names": (
        column(NUMBERS, OTHERS),
        "split train: label has Business, Politics, Sci/Tech, Sports, and task ag_news has World, Sports, Business",
    ),
    "no label": (column(without(NAMES, 5), Value("string")), "split train, row 6: no label"),
    "no class": (column(without(NUMBERS, 5), CLASSES), "split train, row 6: no label"),
    "an unknown class": (column(without(NUMBERS, 5, -1), CLASSES), "split train, row 6: no label"),
    "no text": (Dataset.from_dict({"text": without(TEXTS, 2), "label": NAMES}), "split train, row 3: no text"),
    "blanks": (Dataset.from_dict({"text": without(TEXTS, 2, " "), "label": NAMES}), "split train, row 3: no text"),
    "lists of words": (
        Dataset.from_dict({"text": [text.split() for text in TEXTS], "label": NAMES}),
        "split train, row 1: no text in text",
    ),
    "another column": (
        Dataset.from_dict({"body": TEXTS, "label": NAMES}),
        r"split train, has the columns \['body', 'label'\]",
    ),
}


@pytest.mark.parametrize(("rows", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_missing_is_told_in_a_sentence_with_split_and_row(hub, rows, reason):
    with pytest.raises(UserError, match=reason) as refused:
        list(hub(rows).rows("train"))
    assert "\n" not in str(refused.value)


def test_rows_without_text_or_label_are_left_out_on_request(hub):
    columns = replace(AG_NEWS.sources["hub"], skip_incomplete=True)
    source = hub(column(without(NUMBERS, 5), CLASSES))
    source = replace(source, task=replace(AG_NEWS, sources={**AG_NEWS.sources, "hub": columns}))
    assert [row.text for row in source.rows("train")] == without(TEXTS, 5)[:5] + TEXTS[6:]
    # In train and test.
    assert source.recognised() == ["rows without text or label, left out: 2"]


def test_a_fault_of_the_test_split_is_told_too(hub):
    good, bad = column(NUMBERS, CLASSES), column(without(NUMBERS, 5), CLASSES)
    with pytest.raises(DataError, match="split test, row 6: no label"):
        hub(good, test=bad).provenance()


@pytest.mark.parametrize(("splits", "reason"), [({"test": None}, "no test split; it has train;")])
def test_a_missing_split_is_named(hub, splits, reason):
    with pytest.raises(UserError, match=reason):
        hub(column(NAMES, Value("string")), **splits).splits()


def test_a_changed_folder_is_not_reused(hub, tmp_path):
    def prepared(labels):
        # Another folder in the same place, and no cache of the first.
        source = hub(column(labels, Value("string")))
        return prepare(source, tmp_path / "prepared", prompt="lean", validation_rows=4)[1]

    assert [prepared(NAMES), prepared(NAMES)] == [False, True]
    with pytest.raises(DataError, match="already holds the data of another source"):
        prepared(without(NAMES, 0, "Sports"))
