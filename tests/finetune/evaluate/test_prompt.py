"""The prompt of an evaluation: the one that the model was trained with, and cut like any other."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import chats
import factories
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep import Example, UserError
from data_prep.task import AG_NEWS
from finetune import keys
from finetune.__main__ import main
from finetune.config.plan import plan
from finetune.data import load_data
from finetune.evaluate import baselines
from finetune.evaluate.find import Found
from finetune.evaluate.run import check_prompt
from finetune.model import encode

FORM = AG_NEWS.form("lean-1")[:-1]
CASES = Path(__file__).resolve().parents[4] / "shared" / "cases"


@pytest.fixture
def data(tiny):
    settings = plan("base", "cpu", {name: tiny[name] for name in ("model", "train_rows", "test_rows")})
    return load_data(settings)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def trained_with(prompt: str, data) -> Found:
    record = factories.record("lora", training=factories.training("lora", rendered_prompt=prompt))
    experiment = plan("base", "cpu").experiment
    return Found("lora", "cpu", experiment, data.folder, record)


def test_a_model_that_was_trained_with_another_template_is_refused_by_name(data, tokenizer, capsys):
    written = tokenizer.apply_chat_template(FORM, tokenize=False, add_generation_prompt=True)
    # Older records hold none.
    for known in (written, ""):
        check_prompt(trained_with(known, data), tokenizer, data)
    assert capsys.readouterr().out == "prompt: by the model's template: system, user and assistant turns\n" * 2
    found = trained_with(written, data)
    tokenizer.chat_template = chats.CHATML.replace("|im_start|>' +", "|im_start|>the ' +").replace("|>a", "|>the a")
    with pytest.raises(UserError, match=r"^the lora model was trained with another prompt: .* writes 'the system"):
        check_prompt(found, tokenizer, data)


def test_a_changed_template_makes_a_step_anew(tmp_path, monkeypatch):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    before = [*keys.model_files(str(tmp_path))]
    (tmp_path / "chat_template.jinja").write_text(chats.CHATML)
    assert [*keys.model_files(str(tmp_path))] == [chats.CHATML.encode(), *before] == [chats.CHATML.encode(), b"{}"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert [*keys.model_files("someone/a-model")] == []
    cached = tmp_path / "hub/models--someone--a-model/snapshots/0123/chat_template.jinja"
    cached.parent.mkdir(parents=True)
    cached.write_text(chats.OLMO2)
    assert [*keys.model_files("someone/a-model")] == [chats.OLMO2.encode()]


def test_changed_weights_of_a_folder_make_a_step_anew(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"some")
    before = [*keys.model_files(str(tmp_path))]
    (tmp_path / "model.safetensors").write_bytes(b"more")
    assert len(before) == 1 and [*keys.model_files(str(tmp_path))] != before
    (tmp_path / "model.safetensors").write_bytes(b"some")
    (tmp_path / "README.md").write_text("notes")
    assert [*keys.model_files(str(tmp_path))] == before


def test_examples_are_cut_and_articles_as_without_them(data, tokenizer, tiny, monkeypatch, capsys):
    """Each example keeps its first 256 tokens, so that memory does not grow with its length."""
    settings = plan("base", "cpu", {"model": tiny["model"], "few_shot_examples": 4})
    long = "profit " * 1_500
    given = [Example("row", long, label, AG_NEWS.messages("lean", long, label)) for label in AG_NEWS.labels]
    data = replace(data, train=given, test=[*given[:2], data.test[0]])
    seen = []
    monkeypatch.setattr(
        baselines.checks, "choose_backbone", lambda model, prompts: (SimpleNamespace(model=model), "not asked")
    )
    monkeypatch.setattr(
        baselines.score.LabelScorer, "score", lambda self, prompts, **_: seen.extend(prompts) or np.eye(3, 4)
    )
    model = AutoModelForCausalLM.from_pretrained(tiny["model"])
    baselines.few_shot(settings, data, model, tokenizer)
    printed = capsys.readouterr().out
    assert "examples: 4 of 4 are cut to their first 256 tokens" in printed
    assert "articles: 2 of 3 do not fit into " in printed
    words = [tokenizer.decode(prompt).count("profit") for prompt in seen]
    each = 256 * 1_500 // len(tokenizer(long)["input_ids"])
    assert abs(words[2] - 4 * each) <= 4
    alone = len(tokenizer.apply_chat_template(FORM, add_generation_prompt=True, return_dict=False))
    assert abs(words[0] - words[2] - (1024 - alone) * each / 256) < 30
    assert json.dumps(tokenizer.decode(seen[0])).count(AG_NEWS.request) == 5


@pytest.mark.parametrize("case", ["long_rows", "special_tokens"])
def test_prepared_rows_keep_request_and_answer_and_two_turns(case, tiny, tokenizer):
    folder = CASES / case
    if not folder.is_dir():
        pytest.skip(f"no rows in {folder}")
    values = {"model": tiny["model"], "source": "csv", "data_path": str(folder), "validation_rows": "8"}
    assert main(["data", "--profile", "cpu", *(f"--set={name}={value}" for name, value in values.items())]) == 0
    rows = load_data(plan("base", "cpu", values | {"train_rows": None})).train
    encoded = encode.encode(tokenizer, rows, 512)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, found in zip(rows, encoded, strict=True):
        assert found.prompt.count(end) == 2
        assert found.answer == tokenizer(row.messages[2]["content"] + "<|im_end|>")["input_ids"]
        prompt = tokenizer.decode(found.prompt)
        assert f"{AG_NEWS.request}\n\n{row.text[:400]}" in prompt and len(found) <= 512
        assert (found.lost == 0) == (row.text in prompt)
    assert any(found.lost for found in encoded) == (case == "long_rows")
    assert any("<|im_end|>" in row.text for row in rows) == (case == "special_tokens")
