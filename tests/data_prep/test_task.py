"""A task's answers and prompts, and the checks of its description."""

import hashlib
import json
from dataclasses import replace

import pytest

from data_prep import Example, UserError, find_task
from data_prep.sources import Row
from data_prep.task import AG_NEWS

NOT_AN_ANSWER = [
    "",
    "World",
    '"World"',
    "null",
    "true",
    "1",
    '["World"]',
    "{}",
    '{"category":"World"',
    '{"category":"World"} I think',
    'The answer is {"category":"World"}',
    '{"category":"World"}{"category":"World"}',
    '{"category":"World","confidence":1}',
    '{"Category":"World"}',
    '{"category":"world"}',
    '{"category":"World "}',
    '{"category":"Politics"}',
    '{"category":""}',
    '{"category":null}',
    '{"category":true}',
    '{"category":0}',
    '{"category":NaN}',
    '{"category":["World"]}',
    '{"category":{"World":1}}',
    "{'category':'World'}",
]
# What a model may babble, and a strict parser must survive.
HOSTILE_ANSWERS = {
    "two answers in one": '{"category":"World","category":"Sports"}',
    "a number of 5,000 digits": '{"category":' + "1" * 5000 + "}",
    "200,000 brackets": "[" * 200_000,
}


@pytest.mark.parametrize(
    ("title", "description", "text"),
    [
        ("Oil rises", "Prices rose on Monday.", "Oil rises Prices rose on Monday."),
        ("", "Oil rises Prices rose on Monday.", "Oil rises Prices rose on Monday."),
        ("Oil rises Prices rose on Monday.", "", "Oil rises Prices rose on Monday."),
    ],
)
def test_title_and_description_join_alike(title, description, text):
    row = Row((title, description), "Business")
    assert row.text == text
    assert (
        AG_NEWS.messages("lean", row.text, row.label)[1]["content"] == f"Classify the following news article:\n\n{text}"
    )


@pytest.mark.parametrize("label", AG_NEWS.labels)
def test_an_answer_comes_back_as_its_label(label):
    assert json.loads(AG_NEWS.answer_for(label)) == {"category": label}
    assert AG_NEWS.parse_answer(AG_NEWS.answer_for(label)) == label


def test_answers_are_compact():
    """Evaluation forces the prefix `{"category":"`, so a space would change every score."""
    assert AG_NEWS.answer_for("Sci/Tech") == '{"category":"Sci/Tech"}'


@pytest.mark.parametrize("text", NOT_AN_ANSWER)
def test_anything_else_is_not_an_answer(text):
    assert AG_NEWS.parse_answer(text) is None


@pytest.mark.parametrize("text", HOSTILE_ANSWERS.values(), ids=HOSTILE_ANSWERS)
def test_a_hostile_answer_is_not_an_answer(text):
    assert AG_NEWS.parse_answer(text) is None


@pytest.mark.parametrize("prompt", AG_NEWS.prompts)
@pytest.mark.parametrize("label", AG_NEWS.labels)
def test_a_rendered_example_knows_its_label_and_its_prompt(prompt, label):
    messages = AG_NEWS.messages(prompt, "Title Text.", label)
    example = Example("train-0", "Title Text.", label, messages)
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert AG_NEWS.parse_answer(messages[2]["content"]) == label
    assert example.prompt == messages[:2]
    assert messages[0]["content"] == AG_NEWS.prompts[prompt].system


def test_a_changed_prompt_gets_a_new_version():
    """When this fails: raise the version of the prompt whose text changed, and enter its digest here."""
    digests = {
        prompt.id: hashlib.sha256(prompt.system.encode()).hexdigest()[:12] for prompt in AG_NEWS.prompts.values()
    }
    assert digests == {"lean-1": "ad28cbb46a3b", "verbose-1": "636ac36f298e"}


def test_the_verbose_prompt_names_every_category_and_the_lean_one_is_shorter():
    for label in AG_NEWS.labels:
        assert label in AG_NEWS.prompts["verbose"].system
        assert label in AG_NEWS.prompts["lean"].system
    assert len(AG_NEWS.prompts["lean"].system) * 10 < len(AG_NEWS.prompts["verbose"].system)


def test_an_unknown_task_is_refused_with_those_that_there_are():
    assert find_task("ag_news") is AG_NEWS
    with pytest.raises(UserError, match="unknown task 'tickets'; the tasks are: ag_news"):
        find_task("tickets")


def test_an_unknown_prompt_is_refused_with_those_that_there_are():
    for asks in (AG_NEWS.find_prompt, lambda name: AG_NEWS.messages(name, "Oil rises", "World")):
        with pytest.raises(UserError, match="unknown prompt 'leen'; task ag_news has: lean, verbose"):
            asks("leen")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": ("World",)}, "two or more"),
        ({"labels": ("World", "World")}, "each once"),
        ({"labels": ("World", "Sports")}, "must stand for the labels"),
    ],
    ids=["one label", "a label twice", "other labels than the columns'"],
)
def test_a_contradictory_description_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        replace(AG_NEWS, **change)


def test_the_sample_and_the_user_s_own_data_are_never_called_the_data_set():
    assert AG_NEWS.title_of({"kind": "sample"}) == "the built-in sample (not AG News)"
    assert AG_NEWS.title_of({"kind": "csv", "sha256": {"test.csv": "0" * 64}}) == "your own data"
    assert AG_NEWS.title_of({"kind": "hub", "dataset": "me/ag_news"}) == "your own data"
    # A task that describes no published data is its own.
    assert replace(AG_NEWS, published_rows={}).title_of({"kind": "hub", "dataset": "me/news"}) == "AG News"
    assert AG_NEWS.title_of({"kind": "hub", "dataset": "fancyzhx/ag_news"}) == "AG News"


def test_the_form_of_a_prompt_has_placeholders_and_is_empty_where_the_prompt_is_gone():
    assert AG_NEWS.form("lean-1") == AG_NEWS.messages("lean", "TITLE DESCRIPTION", "World")
    assert AG_NEWS.form("lean-0") == []
