"""A task's file: what it may leave out, and one sentence with file, key and what is allowed for what is wrong."""

import re

import pytest

from data_prep import DataError, UserError, find_task
from data_prep.task import AG_NEWS, BUILT_IN

SMALL = """
labels: {no: the door stays shut, yes: "the door opens", maybe: }
sources: {files: {at: doors.csv, texts: body, label: answer}}
"""
SPLITS = "splits: {by: stratified}"
WRONG = {
    "an unknown key": (SMALL + "lables: [a, b]", "unknown key 'lables'; known are: title, labels, sources"),
    "an unknown key of a source": (
        SMALL.replace("texts", "text"),
        "unknown key 'sources.files.text'; known are: texts, label, at,",
    ),
    "a missing key": (SMALL.replace("labels", "# "), "the key 'labels' is missing"),
    "a source that nobody reads": (SMALL.replace("files", "kaggle"), "sources.kaggle: .*'files', 'hub' or 'csv'"),
    "no file": (SMALL.replace("at: doors.csv, ", ""), r"sources\.files\.at: is missing"),
    "a file of no split": (
        SMALL.replace("doors.csv", "{tests: a.csv}"),
        r"files\.at: .*train, validation and",
    ),
    "one label": (SMALL.replace("yes", "# "), "not YAML|two or more"),
    "a label twice": (SMALL.replace("yes", "no"), "2: not YAML: 'no' is there twice"),
    "a label twice in a list": ("labels: [a, b, a]\n" + SMALL[SMALL.index("sources") :], "each once"),
    "values of other labels": (
        SMALL.replace("answer}", "answer, values: {0: no}}"),
        "values: must stand for",
    ),
    "a text that is the label": (
        SMALL.replace("texts: body", "texts: [body, answer]"),
        "label: 'answer' is one of the",
    ),
    "names without the label": (
        SMALL.replace("answer}", "answer, names: [body, reply]}"),
        "sources.files.names: lacks answer; it has body, reply",
    ),
    "an unknown split": (SMALL + SPLITS.replace("stratified", "luck"), "splits.by: .*'stratified', 'group' or 'time'"),
    "a group without its column": (SMALL + SPLITS.replace("stratified", "group"), "splits: `column` is for splits by"),
    "a share over 1": (SMALL + "splits: {by: stratified, test: 20}", "splits.test: Input should be less than 1"),
    "nothing to train on": (SMALL + "splits: {by: stratified, test: 0.8, validation: 0.15}", "more than 0.9"),
    "an unknown repair": (SMALL + "repairs: [html]", "repairs.0: .*'entities', 'tags', 'backslashes' or 'spaces'"),
    "a prompt without text": (SMALL + "prompts: {short: {version: 2}}", "the key 'prompts.short.system' is missing"),
    "no YAML": (SMALL + "title: [", "4: not YAML"),
    "no keys": ("- a", "not a task; it has the keys title, labels"),
    "nothing": ("", "not a task"),
}


@pytest.fixture
def write(home):
    def write(text: str, name: str = "doors"):
        (home / "tasks").mkdir(exist_ok=True)
        (home / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")
        return find_task(name)

    return write


@pytest.mark.parametrize(("text", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_with_file_key_and_what_is_allowed(write, home, text, reason):
    with pytest.raises(DataError, match=f"^{re.escape(str(home / 'tasks' / 'doors.yaml'))}:.*({reason})") as refused:
        write(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_small_description_has_usual_prompts_that_tell_the_meanings(write):
    task = write(SMALL)
    assert (task.title, task.labels, task.repairs, task.licence) == ("doors", ("no", "yes", "maybe"), (), "")
    assert task.prompts["lean"].system == "no, yes or maybe?"
    assert task.prompts["verbose"].system == (
        "Sort each text into exactly one of 3 categories.\n\nCategories:\n"
        "- no: the door stays shut\n- yes: the door opens\n- maybe\n\n"
        'Answer with one line of JSON and nothing else, in this form: {"category":"no"}'
    )
    assert [prompt.id for prompt in task.prompts.values()] == ["lean-1", "verbose-1"]


def test_what_yaml_takes_for_truth_and_numbers_are_labels(write):
    task = write("labels: [no, on, 1, 1.0, null, 2024-05-31]\n" + SMALL[SMALL.index("sources") :])
    assert task.labels == ("no", "on", "1", "1.0", "null", "2024-05-31")


def test_an_edited_file_is_read_again_and_its_digest_says_whether_rows_change(write):
    before = write(SMALL)
    assert find_task("doors") is before
    assert write("title: Doors" + SMALL).digest == before.digest
    for change in ("request: Is it open", "answer_key: door", "prompts: {lean: Is it open}", "repairs: [tags]", SPLITS):
        assert write(SMALL + change).digest != before.digest


def test_ag_news_is_such_a_file_and_a_user_s_own_does_not_hide_it(write):
    assert AG_NEWS.folder == BUILT_IN.parent and AG_NEWS.sample == BUILT_IN.parent / "sample"
    write(SMALL, "ag_news")
    assert find_task("ag_news") is AG_NEWS
    with pytest.raises(UserError, match="unknown task 'Doors'; the tasks are: ag_news; a name has lower-case letters"):
        find_task("Doors")
