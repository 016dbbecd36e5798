"""`new`: from a file that nobody has described to a task, its prepared data and the next command."""

from pathlib import Path

import made_up
import pandas as pd
import pytest
from made_up import CLASSES, texts

from data_prep import UserError, find_task
from data_prep.sources import open_source
from finetune import metrics
from finetune.__main__ import main
from finetune.config.plan import plan
from finetune.data import load_data
from finetune.new import new

TASKS = Path(__file__).resolve().parents[3] / "shared" / "tasks"


@pytest.fixture
def tickets(home):
    return made_up.tickets(home)


def prepared(name: str, tiny_model):
    return load_data(plan("base", "cpu", {"task": name, "model": str(tiny_model)}))


def test_six_classes_in_json_lines(tickets, tiny_model, capsys):
    assert main(["new", str(tickets)]) == 0
    printed = capsys.readouterr().out
    task = find_task("tickets")
    assert task.labels == CLASSES and task.sources["files"].at == "tickets.jsonl"
    assert task.sources["files"].texts == ("title", "body") and task.splits.by == "stratified"
    assert "  queue: Billing\n" in printed and "Text: title + body. Label: queue, 6 classes." in printed
    assert "48 test rows can show no difference between" in printed
    assert f"one point needs {metrics.rows_to_show(1, 0.05):,}\n" in printed
    assert "Duplicates: 0 test rows repeat" in printed
    assert printed.endswith("\n  python -m finetune run --task tickets\n")
    data = prepared("tickets", tiny_model)
    frame = pd.read_json(tickets, lines=True).assign(text=lambda frame: frame["title"] + " " + frame["body"])
    rows = {row.text: row.label for row in [*data.train, *data.validation, *data.test]}
    assert rows == dict(zip(frame["text"], frame["queue"], strict=True))
    assert [len(data.train), len(data.validation), len(data.test)] == [168, 24, 48]


def test_three_imbalanced_classes_under_odd_headers(home, tiny_model, capsys):
    new(str(made_up.reviews(home)))
    assert "\nClasses with fewer than 5 rows: odd (1 in validation), odd (2 in test)\n" in capsys.readouterr().out
    data = prepared("my-reviews", tiny_model)
    assert data.task.sources["files"].texts == ("The Review",) and data.task.labels == ("bad", "good", "odd")
    assert data.manifest.rows["test"] == {"bad": 10, "good": 48, "odd": 2}
    assert data.title == "my-reviews"
    assert "separated by semicolons" in data.manifest.recognised[0]


def test_truth_values_in_parquet(home, tiny_model):
    new(str(made_up.mails(home)), name="spam")
    data = prepared("spam", tiny_model)
    assert data.task.labels == ("false", "true")
    assert data.manifest.total("train") == 140 and data.manifest.rows["test"] == {"false": 30, "true": 10}
    assert data.test[0].messages[0]["content"] == "false or true?"


def test_a_file_without_a_header_gets_numbers_for_names(home, tiny_model):
    pd.DataFrame({"text": texts(90), "label": ["a", "b", "c"] * 30}).to_csv(home / "t.csv", header=False, index=False)
    new(str(home / "t.csv"))
    columns = find_task("t").sources["files"]
    assert (columns.texts, columns.label, columns.names) == (("column 1",), "column 2", ("column 1", "column 2"))
    assert prepared("t", tiny_model).manifest.total("train") == 63


def test_a_group_stays_together(home):
    frame = pd.DataFrame(
        {"text": texts(90), "label": ["a", "b", "c"] * 30, "who": [str(row // 9) for row in range(90)]}
    )
    frame.to_csv(home / "t.csv", index=False)
    assert main(["new", str(home / "t.csv"), "--group", "who"]) == 0
    assert (find_task("t").splits.by, find_task("t").splits.column) == ("group", "who")


def test_labels_that_differ_in_case_or_blanks_are_one_on_request(home, capsys):
    frame = pd.DataFrame({"text": texts(90), "label": ["Sports", "sports ", "Arts"] * 30})
    frame.to_csv(home / "t.csv", index=False)
    new(str(home / "t.csv"), "two")
    assert "classes of their own: 'Sports' and 'sports '. Are they one? --merge" in capsys.readouterr().out
    new(str(home / "t.csv"), "one", merge_spellings=True)
    assert "classes of their own" not in capsys.readouterr().out
    assert find_task("two").labels == ("Arts", "Sports", "sports ") and find_task("one").labels == ("Arts", "Sports")


def test_odd_texts_and_labels_are_counted_and_lengths_drawn(home, capsys):
    labels = ["good", "bad", "nan"] * 30
    rows = [*texts(87), "good", "***", "\U0001f600 1"]
    pd.DataFrame({"text": rows, "label": [*labels[:87], "good", *labels[88:]]}).to_csv(home / "t.csv", index=False)
    new(str(home / "t.csv"), text=["text"], label="label")
    printed = capsys.readouterr().out
    assert "The label nan may mean that there is none" in printed
    assert "Texts without a letter: 2 of 90\n" in printed and "WARNING: 1 of 90 texts are their label" in printed
    picture = [line.split() for line in printed[printed.index("Words of a text") :].splitlines()[1:5]]
    assert [(line[0], line[2], line[-1]) for line in picture] == [
        ("1", "1", "2"),
        ("2", "3", "1"),
        ("4", "7", "0"),
        ("8", "15", "87"),
    ]


def test_another_encoding_is_proposed_and_kept(home, monkeypatch, capsys):
    rows = [f"Müller grüßt {text}" for text in texts(90)]
    frame = pd.DataFrame({"text": rows, "label": ["a", "b", "c"] * 30})
    frame.to_csv(home / "t.csv", index=False, encoding="cp1252")
    assert main(["new", str(home / "t.csv")]) == 2
    assert "--encoding cp1252" in capsys.readouterr().err and not (home / "tasks").exists()
    assert main(["new", str(home / "t.csv"), "--encoding", "cp1252"]) == 0
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "")
    new(str(home / "t.csv"), "asked")
    for task in map(find_task, ("t", "asked")):
        assert task.sources["files"].encoding == "cp1252"
        assert {row.text for row in open_source("files", task).rows("test")} < set(rows)


def test_labels_and_columns_of_any_characters_are_written_as_they_are(home):
    labels = [
        'say "a": {b}, [c] # d',
        "\x85 next line\u2028and\u00a0blanks\x7f",
        "\U0001f469\u200d\U0001f4bb: it's \\ 100 %",
    ]
    frame = pd.DataFrame({'te"xt: #': texts(90), "la\u2028bel": labels * 30})
    frame.to_json(home / "t.jsonl", orient="records", lines=True)
    new(str(home / "t.jsonl"))
    assert set(find_task("t").labels) == set(labels) and find_task("t").sources["files"].texts == ('te"xt: #',)


def test_a_packed_file_and_training_rows_alone(home):
    frame = pd.DataFrame({"text": texts(90), "label": ["a", "b", "c"] * 30})
    frame.to_csv(home / "mail.csv.gz", index=False)
    (home / "set").mkdir()
    frame.to_csv(home / "set" / "train.csv", index=False)
    new(str(home / "mail.csv.gz"))
    new(str(home / "set"))
    assert find_task("mail").splits.by == find_task("set").splits.by == "stratified"


def table(**columns):
    return lambda home: pd.DataFrame(columns).to_csv(home / "t.csv", index=False)


REFUSED = {
    "two columns may be the label": (
        table(text=texts(60), first=["a", "b"] * 30, second=["c", "d"] * 30),
        {},
        "which column is the label. Name one of first, second: --label 'first'",
    ),
    "none may be": (
        table(text=texts(60), code=range(60)),
        {},
        "is the label. Name a column of text, code",
    ),
    "one column": (table(text=texts(60)), {}, r"t\.csv:1: one column; a task needs a text and a label"),
    "an encoding that is none": (
        table(text=texts(60), label=["x", "y"] * 30),
        {"encoding": "utf-9"},
        "Python knows no encoding utf-9",
    ),
    "no text": (table(word=["a"] * 60, label=["x", "y"] * 30), {}, "which column is the text. .*--text 'word'"),
    "another column": (table(text=texts(60), label=["x", "y"] * 30), {"label": "topic"}, "has no column 'topic'; its"),
    "an unnamed label": (
        table(text=texts(61), label=["x", "y"] * 30 + [""]),
        {"label": "label"},
        r"t\.csv:62: no label: nothing in label",
    ),
    "one label": (table(text=texts(60), label=["x"] * 60), {"label": "label"}, "has 1 different values; a label has 2"),
    "a built-in name": (
        table(text=texts(60), label=["x", "y"] * 30),
        {"name": "ag_news"},
        "'ag_news' is there",
    ),
    "no name": (table(text=texts(60), label=["x", "y"] * 30), {"name": "A b"}, "'A b' is no name of lower-case"),
}


@pytest.mark.parametrize(("write", "given", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_guessed_or_read_is_told_and_nothing_is_written(home, write, given, reason):
    write(home)
    with pytest.raises(UserError, match=reason):
        new(str(home / "t.csv"), **given)
    assert not (home / "tasks").exists()


def test_in_a_terminal_columns_are_asked_for_with_proposals(tickets, monkeypatch):
    asked = []

    def answer(question):
        asked.append(question)
        return "body" if question.startswith("Text") else ""

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", answer)
    new(str(tickets))
    assert asked == ["Label column [queue]: ", "Text columns, with commas [title, body]: "]
    assert find_task("tickets").sources["files"].texts == ("body",)


@pytest.mark.parametrize(
    ("folder", "classes", "rows"), [("banking77", 77, (9003, 1000, 3080)), ("trec", 6, (4907, 545, 500))]
)
def test_public_sets_need_no_flags(home, folder, classes, rows, capsys):
    if not (TASKS / folder).is_dir():
        pytest.skip(f"no {folder} in {TASKS}")
    new(str(TASKS / folder))
    assert len(find_task(folder).labels) == classes
    printed = capsys.readouterr().out
    frame = pd.read_csv(TASKS / folder / "test.csv")
    assert f"\n{len(frame):,} test rows can show" in printed and len(frame) == rows[2]
