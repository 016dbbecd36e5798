"""A task of six classes is one file: everything from its rows to the report works from that alone."""

import csv
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep import UserError, find_task
from data_prep.sources import open_source
from data_prep.task import AG_NEWS
from finetune import paths
from finetune.compare import mistakes, report, tables
from finetune.compare.comparison import load
from finetune.config.plan import plan
from finetune.data import load_data
from finetune.evaluate.score import LabelScorer
from finetune.model import encode
from finetune.model.packing import Backbone
from finetune.notebooks import run_cells

# Two begin alike, one is not ASCII, and the order is not the alphabet's.
LABELS = ("Other issue", "Billing", "Other", "Störung", "Password reset", "Delivery")
TICKETS = """
title: Support tickets
description: Invented requests to a help desk.
labels: [Other issue, Billing, Other, Störung, Password reset, Delivery]
request: What is this ticket about?
prompts: {plain: "Sort the ticket: Other issue, Billing, Other, Störung, Password reset, Delivery"}
sources:
  files:
    at: .
    texts: body
    label: queue
    values: {OTHER ISSUE: Other issue, BILLING: Billing, OTHER: Other, STÖRUNG: Störung, PASSWORD RESET: Password reset,
      DELIVERY: Delivery}
answer_key: queue
"""


@pytest.fixture
def settings(home, tiny_model, tmp_path):
    """A plan on 60 training, 24 test rows; the first test row is a training row, and two training rows contradict."""
    (home / "tasks").mkdir()
    (home / "tasks" / "tickets.yaml").write_text(TICKETS, encoding="utf-8")
    generator = random.Random(0)
    rows = [
        (LABELS[number % 6].upper(), f"Ticket {number} &lt; {' '.join(generator.choices('abcdefgh', k=8))}")
        for number in range(84)
    ]
    rows[60] = rows[1][0], rows[0][1]
    rows[2] = rows[2][0], rows[1][1]
    for name, split in (("train", rows[:60]), ("validation", rows[60:72]), ("test", rows[:1] + rows[61:84])):
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("Queue", "Body"), *split])
    values = {"task": "tickets", "prompt": "plain"}
    return plan("base", "cpu", values | {"model": str(tiny_model), "generation_rows": 6})


def test_six_classes_go_from_the_files_to_the_report(settings, tiny_model):
    # Prepare: the description's columns, labels, prompt and answers; AG News' repairs are not for this task.
    data = load_data(settings)
    assert data.title == "Support tickets" and data.reference.task == "tickets"
    assert data.manifest.rows["train"] == dict.fromkeys(LABELS, 10) and not data.manifest.normalised
    assert (data.manifest.duplicates.test_exact_in_train, data.manifest.duplicates.train_contradicting) == (1, 2)
    row = data.test[0]
    assert (row.label, row.has_duplicate) == ("Other issue", True) and "&lt;" in row.text
    assert row.messages[1]["content"] == f"What is this ticket about?\n\n{row.text}"
    assert next(one for one in data.test if one.label == "Störung").messages[2]["content"] == '{"queue":"Störung"}'

    # Encode and score: the probabilities are those of separate forward passes.
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    encoded = encode.encode(tokenizer, data.test, 512)
    assert tokenizer.decode(encoded[0].answer) == '{"queue":"Other issue"}<|im_end|>'
    scored = LabelScorer(Backbone(model), tokenizer, settings.task, 8).score([row.prompt for row in encoded])
    assert scored.shape == (24, 6)
    np.testing.assert_allclose(scored[0], one_by_one(model, tokenizer, encoded[0].prompt), atol=1e-5)

    # Metrics, in the order of the labels, with baselines beside.
    names = {"task": "tickets", "prompt": "plain"}
    names |= {"model": str(tiny_model), "generation_rows": 6}
    record = run_cells("base_model_performance", "class_table", PROFILE="cpu", OVERRIDES=names)["record"]
    assert tuple(record.evaluation.scoring.classes) == LABELS
    assert np.array(record.evaluation.scoring.confusion).sum(axis=1).tolist() == [4] * 6
    # One test row is a training row, and eleven are validation rows.
    assert record.evaluation.without_duplicates.rows == 12

    # The comparison, its tables and pictures.
    compared = load(settings.place)
    assert compared.classes == LABELS
    assert list(tables.classes(compared).index) == list(LABELS)
    assert len(tables.quality(compared)) == len(compared.predictions) == 3
    texts = mistakes.articles(compared.any_record)
    assert texts == {row.id: row.text for row in data.test}
    html = report.render(compared, texts)
    assert all(label in html for label in LABELS)
    assert "AG News" not in html and "World" not in html
    assert "Training and validation used 72 rows, the test 24." in html


def one_by_one(model, tokenizer, prompt: list[int]) -> np.ndarray:
    """The labels' probabilities from six separate forward passes."""
    scores = []
    for label in LABELS:
        answer = tokenizer(f'{{"queue":"{label}"}}', add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        scores.append(sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)))
    return np.exp(scores) / np.exp(scores).sum()


def test_the_card_of_a_model_says_what_its_labels_are(settings):
    values = {"task": "tickets", "prompt": "plain"}
    values |= {"model": settings.experiment.model, "train_rows": 24}
    record = run_cells("fine_tuning_lora", "plots.training_curves", PROFILE="cpu", OVERRIDES=values)["record"]
    card = (paths.home() / record.training.artefact / "README.md").read_text()
    assert "Classifies a text as Other issue, Billing, Other, Störung, Password reset or Delivery" in card
    assert '`{"queue":"Other issue"}`' in card and "What is this ticket about?" in card
    assert "AG News" not in card


def test_an_unknown_task_or_a_prompt_of_another_task_is_refused(settings):
    with pytest.raises(UserError, match="unknown task 'mails'; the tasks are: ag_news, tickets"):
        plan("base", "cpu", {"task": "mails"})
    with pytest.raises(UserError, match="unknown prompt 'leen'; task tickets has: lean, verbose, plain"):
        plan("base", "cpu", {"task": "tickets", "prompt": "leen"})
    assert plan("base", "cpu").task is AG_NEWS


@pytest.mark.parametrize("source", ["sample", "hub", "csv"])
def test_a_source_that_a_task_does_not_have_is_refused(source, settings):
    with pytest.raises(UserError, match=r"task tickets has no .*source"):
        open_source(source, find_task("tickets"))


def test_a_task_s_own_source_is_taken_where_it_lacks_the_profile_s(settings):
    assert settings.experiment.source == "files" and settings.origins["source"] == "task tickets"
    assert plan("base", "gpu", {"task": "tickets"}).experiment.source == "files"
    assert plan("base", "gpu").experiment.source == "hub"


def test_an_edited_description_is_prepared_again(settings, home):
    before = load_data(settings).manifest
    path = home / "tasks" / "tickets.yaml"
    path.write_text(TICKETS.replace("What is this", "What was this"), encoding="utf-8")
    after = load_data(settings)
    assert after.manifest.fingerprint != before.fingerprint
    assert after.test[0].messages[1]["content"].startswith("What was this ticket about?")
