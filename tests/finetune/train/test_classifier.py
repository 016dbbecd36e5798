"""A classification head: trained, resumed, judged, merged and loaded as any other method."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import processes
import pytest
import torch
from families import tiny_family
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data_prep import UserError
from data_prep.task import AG_NEWS
from finetune import paths, plan, records
from finetune.compare import comparison, tables, verdict
from finetune.compare.report import write_report
from finetune.config.recipes import HEAD, LORA
from finetune.data import load_data
from finetune.evaluate import score
from finetune.evaluate.find import find_run
from finetune.evaluate.merge import merge
from finetune.model import checks, encode, load
from finetune.notebooks import run_cells
from finetune.train import memory
from finetune.train.held import Work

LABELS = dict(enumerate(AG_NEWS.labels))


def trainer_of(overrides, **edits):
    return run_cells("fine_tuning_head", "trainer.train(", edits, PROFILE="cpu", OVERRIDES=overrides)["trainer"]


@pytest.fixture(scope="module")
def overrides(tiny_model):
    return {
        "model": str(tiny_model),
        "train_rows": 32,
        "test_rows": 24,
        "generation_rows": 8,
        "eval_steps": 0.5,
        "learning_rate": 5e-3,
    }


@pytest.fixture(scope="module")
def left(overrides, tmp_path_factory):
    """The home that a base model's evaluation and a head's training and evaluation leave, and the head's record."""
    home = tmp_path_factory.mktemp("left")
    given = {name: overrides[name] for name in ("model", "test_rows", "generation_rows")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_HOME", str(home))
        run_cells("base_model_performance", "class_table", PROFILE="cpu", OVERRIDES=given | {"train_rows": 32})
        run_cells("fine_tuning_head", PROFILE="cpu", OVERRIDES=overrides)
        record = run_cells("head_finetuning_performance", PROFILE="cpu", OVERRIDES=given)["record"]
    return home, record


@pytest.fixture
def evaluated(left, monkeypatch):
    home, record = left
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    return record


def saved_probabilities(record) -> np.ndarray:
    rows = records.read_predictions(record, paths.run_folder(record.profile, "head"))
    return np.array([[row.probabilities[label] for label in AG_NEWS.labels] for row in rows])


def prompts_of(record, tokenizer) -> list[list[int]]:
    data = load_data(find_run("head", "cpu", {"model": record.settings["model"], "test_rows": 24}))
    return encode.encode_prompts(tokenizer, [example.prompt for example in data.test])


def test_a_record_holds_what_ran_and_what_a_head_cannot_do_is_absent(evaluated):
    ran = evaluated.settings
    assert (ran["task_type"], ran["packing"], ran["labels"]) == ("SEQ_CLS", False, list(AG_NEWS.labels))
    assert (evaluated.engine, ran["other_arguments"]) == ("transformers", {})
    probabilities = saved_probabilities(evaluated)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert len(np.unique(probabilities.argmax(axis=1))) > 1
    assert evaluated.evaluation.generation is None
    compared = comparison.load(evaluated.profile)
    assert set(tables.generation(compared).loc["LoRA + head"][:-1]) == {"-"}
    assert "LoRA + head" in tables.calibration(compared) and "head" in verdict.decide(compared).methods
    assert ("head", "svm") in [(pair.first, pair.second) for pair in compared.pairs]
    page = write_report(compared, paths.results_folder(evaluated.profile) / "report.html", {}).read_text()
    assert "LoRA + head" in page


def test_a_moved_artefact_gives_the_same_probabilities_by_the_lines_of_its_card(evaluated, tiny_model, tmp_path):
    """In batches too: the card's lines set the pad token, by which transformers finds a row's last token."""
    moved = shutil.copytree(paths.home() / evaluated.training.artefact, tmp_path / "moved")
    base = shutil.copytree(tiny_model, tmp_path / "moved base")
    assert {
        name.rpartition(".")[0] for name in load_file(moved / "adapter_model.safetensors") if "lora" not in name
    } == {"base_model.model.score"}
    [code] = re.findall(r"```python\n(.*?)```", (moved / "README.md").read_text(), re.DOTALL)
    code = code.replace("PATH/TO/THIS/FOLDER", str(moved)).replace(f"PATH/TO/{tiny_model.name}", str(base))
    prompts = prompts_of(evaluated, AutoTokenizer.from_pretrained(moved))
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    code += """
import json, torch
batch = tokenizer.pad({"input_ids": json.load(open("prompts.json"))}, return_tensors="pt")
with torch.no_grad():
    found = model(**batch).logits.softmax(-1)
torch.save([found, model.config.id2label], "found.pt")
"""
    processes.start(processes.execute, code, tmp_path, home=tmp_path).join()
    found, labels = torch.load(tmp_path / "found.pt")
    assert labels == LABELS
    np.testing.assert_allclose(found, saved_probabilities(evaluated), atol=1e-5)


def test_an_evaluation_refuses_a_head_of_other_labels_and_one_that_was_not_loaded(evaluated):
    given = {"model": evaluated.settings["model"], "test_rows": 24}
    names = run_cells("head_finetuning_performance", "evaluate(found", PROFILE="cpu", OVERRIDES=given)
    from finetune.evaluate.run import evaluate

    names["model"].base_model.model.config.id2label = dict(enumerate(reversed(AG_NEWS.labels)))
    with pytest.raises(UserError, match="the head is for Sci/Tech, Business"):
        evaluate(names["found"], names["model"], names["tokenizer"], names["data"])
    names["model"].base_model.model.config.id2label = LABELS
    with torch.no_grad():
        names["model"].score.modules_to_save["default"].weight.zero_()
    with pytest.raises(UserError, match=r"the model lacks 1 of its \d+ matrices, such as base_model\.model\.score"):
        evaluate(names["found"], names["model"], names["tokenizer"], names["data"])


# Those with a head in transformers.
HEADS = ["llama", "qwen2", "capped", "learned positions", "experts of mixtral", "window", "hybrid", "own attention"]


@pytest.mark.parametrize("family", HEADS)
def test_probabilities_depend_on_no_batch_and_are_those_of_the_prompts_last_token(tiny_model, family):
    tokenizer = load.load_tokenizer(tiny_model)
    tokenizer.padding_side = "left"
    config = tiny_family(family, tokenizer).config
    config.id2label, config.get_text_config().pad_token_id = LABELS, tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    # Some end with what others are padded with before.
    prompts = [[5 + (row * step) % 300 for step in range(9 + 7 * row)] for row in range(6)]
    alone = np.concatenate([score.HeadScorer(model, tokenizer, AG_NEWS, 1).score([prompt]) for prompt in prompts])
    for size in (2, 6):
        found = score.HeadScorer(model, tokenizer, AG_NEWS, size).score(prompts)
        np.testing.assert_allclose(found, alone, atol=1e-5)
    with torch.no_grad():
        hidden = [model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts]
        by_hand = model.score(torch.stack(hidden)).softmax(-1)
    np.testing.assert_allclose(alone, by_hand, atol=1e-5)
    scorer, _ = score.choose_scorer(model, tokenizer, AG_NEWS, prompts, 4)
    assert scorer.padding_error(prompts) < 1e-4
    # With another pad token than the model knows, the last token is padding.
    config.get_text_config().pad_token_id = tokenizer.convert_tokens_to_ids("the") or 7
    with pytest.raises(UserError, match="padding changes the head's logits by"):
        score.choose_scorer(model, tokenizer, AG_NEWS, prompts, 4)


def test_an_architecture_without_a_head_is_refused_before_its_weights_are_loaded(tiny_model, home, monkeypatch):
    tokenizer = load.load_tokenizer(tiny_model)
    config = tiny_family("divided", tokenizer).config
    sentence = "transformers has no classification head for granite models .*: choose LoRA, or another model"
    with pytest.raises(UserError, match=sentence):
        checks.check_model(config, tokenizer, AG_NEWS, [[1, 2, 3]], HEAD)
    checks.check_model(config, tokenizer, AG_NEWS, [[1, 2, 3]], LORA)
    monkeypatch.setattr(load, "configuration", lambda name: config)
    settings = plan("head", "cpu", {"model": str(tiny_model)})
    with pytest.raises(UserError, match=sentence):
        run_cells("fine_tuning_head", "load_model(", PROFILE="cpu", OVERRIDES={"model": settings.experiment.model})


def test_the_adapter_and_the_head_train_and_the_loss_is_that_of_the_labels(home, overrides):
    trainer = trainer_of(overrides | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4})
    kinds = load.trainable_counts(trainer.model)
    assert {name.rpartition(".")[2] for name in kinds} == {"lora_A", "lora_B", "modules_to_save"}
    assert trainer.preview()["label"].isin(AG_NEWS.labels).all()
    assert all(text.endswith("<|im_start|>assistant\n") for text in trainer.preview()["the prompt ends with"])
    rows = [trainer.train_dataset[row] for row in range(8)]

    def gradients(size):
        trainer.model.zero_grad()
        for start in range(0, len(rows), size):
            batch = trainer.data_collator(rows[start : start + size])
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(len(rows))).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])

    torch.testing.assert_close(gradients(3), gradients(8), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        logits = [trainer.model(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
        by_hand = torch.nn.functional.cross_entropy(torch.stack(logits), torch.tensor([row["labels"] for row in rows]))
        assert trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item() == pytest.approx(
            by_hand.item(), abs=1e-5
        )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Of the whole update, and not of one of its passes.
    assert 0.5 < losses[0] / by_hand.item() < 2


def test_an_ended_training_resumes_to_the_uninterrupted_ones_weights(overrides, place, tmp_path):
    overrides = overrides | {"train_rows": 96, "num_train_epochs": 2}
    homes = {name: tmp_path / name for name in ("whole", "ended")}
    processes.start(processes.train, "head", overrides, home=homes["whole"]).join()
    ended = processes.start(processes.train, "head", overrides, home=homes["ended"])
    state, deadline = homes["ended"] / "checkpoints" / ".training" / f"{place}-head", time.monotonic() + 120
    while not list(state.glob("progress.json")):
        assert ended.is_alive() and time.monotonic() < deadline, "it ended before it could be interrupted"
        time.sleep(0.01)
    os.kill(ended.pid, signal.SIGTERM)
    ended.join()
    log = tmp_path / "log"
    processes.start(processes.train, "head", overrides, home=homes["ended"], log=log).join()
    assert "Resuming from checkpoint-" in log.read_text()
    first, second = (
        load_file(home / "adapters" / f"{place}-head" / "adapter_model.safetensors") for home in homes.values()
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_merged_head_predicts_what_base_and_adapter_do(evaluated):
    found = find_run("head", "cpu", {"model": evaluated.settings["model"], "test_rows": 24})
    result = merge(found, load_data(found))
    assert result.agreement > 0.9
    folder = paths.home() / result.artefact
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    assert config.id2label == LABELS and "AutoModelForSequenceClassification" in (folder / "README.md").read_text()


def test_a_head_takes_no_more_memory_than_lora(tiny_model):
    """Nor the weights of an output layer, where it is no copy of the input embeddings."""
    config = load.configuration(tiny_model)
    config.tie_word_embeddings, config.num_labels = False, 4
    rows = memory.Rows(own=[60] * 8, shared=20, answer=7, scored=7, read=11)
    head, lora = (
        memory.estimate(
            config, Work(replace(of, packing=False), "off", "float32", "float32", "none", False), rows, 8, 0
        )
        for of in (HEAD, LORA)
    )
    table = 4 * config.vocab_size * config.hidden_size
    # The head's own weights are 4 rows.
    assert lora.parts["weights"] - head.parts["weights"] == table - 4 * 4 * config.hidden_size
    assert head.parts["adapter"] == lora.parts["adapter"] + 4 * 4 * config.hidden_size
    assert head.total < lora.total
