"""Articles, answers and prompts."""

import hashlib
import json

import pytest

from data_prep import LABELS, PROMPTS, Article, Example, answer_for, parse_answer

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
    article = Article(title, description, "Business")
    assert article.text == text
    assert PROMPTS["lean"].render(article)[1]["content"] == f"Classify the following news article:\n\n{text}"


@pytest.mark.parametrize("label", LABELS)
def test_an_answer_comes_back_as_its_label(label):
    assert json.loads(answer_for(label)) == {"category": label}
    assert parse_answer(answer_for(label)) == label


def test_answers_are_compact():
    """Evaluation forces the prefix `{"category":"`, so a space would change every score."""
    assert answer_for("Sci/Tech") == '{"category":"Sci/Tech"}'


@pytest.mark.parametrize("text", NOT_AN_ANSWER)
def test_anything_else_is_not_an_answer(text):
    assert parse_answer(text) is None


@pytest.mark.parametrize("text", HOSTILE_ANSWERS.values(), ids=HOSTILE_ANSWERS)
def test_a_hostile_answer_is_not_an_answer(text):
    assert parse_answer(text) is None


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("label", LABELS)
def test_a_rendered_example_knows_its_label_and_its_prompt(prompt, label):
    messages = prompt.render(Article("Title", "Text.", label))
    example = Example("train-0", messages)
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert example.label == label
    assert example.prompt == messages[:2]
    assert messages[0]["content"] == prompt.system


def test_a_changed_prompt_gets_a_new_version():
    """When this fails: raise the version of the prompt whose text changed, and enter its digest here."""
    digests = {
        prompt.id: hashlib.sha256(prompt.render(Article("T", "D", "World"))[0]["content"].encode()).hexdigest()[:12]
        for prompt in PROMPTS.values()
    }
    assert digests == {"lean-1": "ad28cbb46a3b", "verbose-1": "636ac36f298e"}


def test_the_verbose_prompt_names_every_category_and_the_lean_one_is_shorter():
    for label in LABELS:
        assert label in PROMPTS["verbose"].system
        assert label in PROMPTS["lean"].system
    assert len(PROMPTS["lean"].system) * 10 < len(PROMPTS["verbose"].system)
