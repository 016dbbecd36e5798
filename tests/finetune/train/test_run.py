"""Training: the loss sees the answers, the result is reproducible, resumable and loadable by plain libraries."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerState

from data_prep import UserError, prepare
from data_prep.task import AG_NEWS
from finetune import paths, plan, records
from finetune.data import prepare_data
from finetune.evaluate import score
from finetune.evaluate.merge import merge
from finetune.evaluate.run import evaluate
from finetune.model import encode, load
from finetune.model.packing import Backbone
from finetune.runner import _training_progress
from finetune.train.callbacks import Clock, newest_whole_checkpoint
from finetune.train.checks import check_supervision
from finetune.train.run import Session, prepare_training

RUNS = ["full", "lora", "qlora"]
TRAIN_SCRIPT = """
import json, sys
from finetune import plan_training
settings = plan_training(sys.argv[1], "cpu", json.loads(sys.argv[2]))
from finetune.data import prepare_data
from finetune.train.run import prepare_training
prepare_training(settings, prepare_data(settings)).run()
"""


PREPARE_SCRIPT = """
import json, sys
from finetune import plan
from finetune.data import prepare_data
prepare_data(plan("lora", "cpu", json.loads(sys.argv[1])))
"""


def session_of(run: str, overrides: dict) -> Session:
    settings = plan(run, "cpu", overrides)
    return prepare_training(settings, prepare_data(settings))


def weights_of(record: records.RunRecord) -> dict[str, torch.Tensor]:
    [file] = (paths.home() / record.training.artefact).glob("*model.safetensors")
    return load_file(file)


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("run", RUNS)
def test_the_loss_sees_the_answers_and_nothing_else(tiny, run):
    session = session_of(run, tiny)
    assert session.supervision.rows == 8
    assert all(text.startswith('{"category":"') and text.endswith("<|im_end|>") for text in session.supervision.decoded)
    [row] = [session.trainer.train_dataset[0]]
    batch = session.trainer.data_collator([row])
    with torch.no_grad(), session.trainer._precision.autocast():
        loss = session.trainer.compute_loss(session.model, dict(batch)).item()
        logits = session.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()
    answer = [token for token in row["labels"] if token != encode.IGNORED]
    start = len(row["labels"]) - len(answer)
    by_hand = -np.mean([logits[start + i - 1].log_softmax(-1)[token].item() for i, token in enumerate(answer)])
    assert loss == pytest.approx(by_hand, abs=2e-2)


def test_rows_without_supervised_tokens_are_refused(tiny):
    session = session_of("lora", tiny)
    masked = session.trainer.train_dataset.map(lambda row: {"labels": [encode.IGNORED] * len(row["labels"])})
    session.trainer.train_dataset = masked
    with pytest.raises(UserError, match="no token of the first rows carries loss"):
        check_supervision(session.trainer, session.tokenizer)


@pytest.mark.parametrize(("run", "kinds"), [("full", {"embed_tokens"}), ("lora", {"lora_A", "lora_B"})])
def test_the_right_tensors_train(tiny, run, kinds):
    trainable = session_of(run, tiny).trainable().index
    assert all(any(kind in name for name in trainable) for kind in kinds)
    assert ("lora_A" in " ".join(trainable)) == (run != "full")
    if run != "full":
        assert all("lora" in name for name in trainable)


@pytest.mark.parametrize("run", RUNS)
def test_the_same_seed_gives_the_same_weights_and_metrics(tiny, run):
    results = []
    for _ in range(2):
        record = session_of(run, tiny).run()
        settings = plan(run, "cpu", tiny)
        evaluated = evaluate(settings, prepare_data(settings), "the notebook")
        results.append((weights_of(record), evaluated.evaluation.predictions_digest, evaluated.evaluation.scoring))
    (first, *rest), (second, *others) = results
    assert same_weights(first, second)
    assert rest == others


def test_another_seed_gives_other_weights(tiny):
    first = weights_of(session_of("lora", tiny).run())
    assert not same_weights(first, weights_of(session_of("lora", tiny | {"seed": 1}).run()))


def test_a_small_batch_accumulated_equals_a_large_one(tiny):
    """8 x 2 and 16 x 1 see the same rows at each step: the weights agree to bf16's rounding."""
    tiny = tiny | {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "optim": "adamw_torch"}
    small = session_of("full", tiny | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2})
    large = session_of("full", tiny | {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1})
    rows = [small.trainer.train_dataset[row] for row in range(16)]

    def gradient(session, size):
        session.model.zero_grad()
        count = sum(label != encode.IGNORED for row in rows for label in row["labels"][1:])
        for start in range(0, len(rows), size):
            batch = session.trainer.data_collator(rows[start : start + size])
            with session.trainer._precision.autocast():
                loss = session.trainer.compute_loss(session.model, batch, num_items_in_batch=torch.tensor(count))
            loss.backward()
        return torch.cat([p.grad.flatten() for p in session.model.parameters()])

    accumulated, whole = gradient(small, 8), gradient(large, 16)
    assert torch.nn.functional.cosine_similarity(accumulated, whole, dim=0) > 0.999
    assert accumulated.norm().item() == pytest.approx(whole.norm().item(), rel=1e-2)


@pytest.mark.parametrize("run", RUNS)
def test_artefacts_load_in_plain_libraries_and_predict_the_same(tiny, tiny_model, run):
    record = session_of(run, tiny).run()
    settings = plan(run, "cpu", tiny | {"generation_rows": 0})
    data = prepare_data(settings)
    evaluate(plan("base", "cpu", {key: tiny[key] for key in ("model", "train_rows", "test_rows")}), data)
    folder = paths.home() / record.training.artefact
    if run == "full":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        quantised = {"quantization_config": four_bit} if run == "qlora" else {}
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **quantised)
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = encode.encode_prompts(tokenizer, [example.prompt for example in data.test])
    plain = score.LabelScorer(Backbone(load.evaluating(model)), tokenizer, AG_NEWS, 4).score(prompts)
    evaluated = evaluate(settings, data, "the notebook")
    saved = records.read_predictions(evaluated, paths.run_folder("cpu", run))
    np.testing.assert_allclose(plain, [list(row.probabilities.values()) for row in saved], atol=1e-5)
    assert (folder / "README.md").read_text().startswith("---\nbase_model:")
    assert not list(folder.parent.glob(".*")) or folder.parent.name == "checkpoints"


def test_tuned_and_base_predict_differently(tiny):
    base = evaluate(
        plan("base", "cpu", {k: v for k, v in tiny.items() if k not in ("num_train_epochs", "eval_steps")}),
        *_data(tiny),
    )
    session_of("lora", tiny | {"learning_rate": 5e-3}).run()
    settings = plan("lora", "cpu", tiny | {"learning_rate": 5e-3})
    tuned = evaluate(settings, prepare_data(settings), "the notebook")
    assert tuned.evaluation.predictions_digest != base.evaluation.predictions_digest
    assert tuned.evaluation.log_loss != pytest.approx(base.evaluation.log_loss, abs=1e-4)


def _data(overrides: dict):
    return (prepare_data(plan("lora", "cpu", overrides)),)


def test_the_record_counts_what_was_trained(tiny):
    session = session_of("lora", tiny | {"num_train_epochs": 2, "eval_on_start": True})
    record = session.run()
    training = record.training
    real = sum(len(row["input_ids"]) for row in session.trainer.train_dataset)
    assert training.tokens == 2 * real
    assert training.articles == 64
    assert training.steps == 8
    assert training.tokens_per_second == pytest.approx(training.tokens / training.seconds)
    accuracies = [point.step for point in training.history if point.validation_accuracy is not None]
    assert accuracies == [0, 4, 8]
    losses = [point.loss for point in training.history if point.loss is not None]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_evaluating_what_was_not_trained_names_the_notebook(tiny):
    settings = plan("lora", "cpu", tiny)
    with pytest.raises(UserError, match=r"no lora model of profile cpu yet: run fine_tuning_lora\.ipynb first"):
        evaluate(settings, prepare_data(settings), "fine_tuning_lora.ipynb")


def test_evaluating_with_other_settings_than_the_training_is_refused(tiny):
    session_of("lora", tiny).run()
    settings = plan("lora", "cpu", tiny | {"learning_rate": 1e-3})
    with pytest.raises(UserError, match=r"trained with other settings \(learning_rate\)"):
        evaluate(settings, prepare_data(settings), "fine_tuning_lora.ipynb")


def test_a_loss_that_is_no_number_ends_the_run(tiny):
    with pytest.raises(UserError, match="the loss became nan at step"):
        session_of("full", tiny | {"learning_rate": 1e30, "max_grad_norm": 1e30, "num_train_epochs": 4}).run()


def test_an_unfinished_checkpoint_is_not_resumed_from(tmp_path):
    for step, whole in ((2, True), (10, True), (12, False)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}")
        if whole:
            (checkpoint / "whole.json").write_text('{"step": 0, "seconds": 0}')
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-10"


def test_weights_updated_in_the_backward_pass_end_where_they_end_after_it(tiny):
    common = tiny | {"optim": "adamw_torch", "max_grad_norm": 1e9}
    after = weights_of(session_of("full", common).run())
    session = session_of("full", common | {"update_in_backward": True})
    kept = []

    def count(_):
        kept.append(sum(parameter.grad is not None for parameter in session.model.parameters()))

    # The last that gets its gradient: those of all others are gone.
    session.model.get_input_embeddings().weight.register_post_accumulate_grad_hook(count)
    assert same_weights(after, weights_of(session.run()))
    assert kept == [1] * session.trainer.state.global_step


@pytest.mark.parametrize(
    ("run", "change"), [("full", {}), ("lora", {}), ("qlora", {}), ("full", {"update_in_backward": True})]
)
def test_a_killed_run_resumes_to_the_uninterrupted_runs_weights(tiny, tmp_path, run, change):
    overrides = tiny | {"num_train_epochs": 2, "train_rows": 96, "save_steps": 1 / 6} | change
    homes = {name: tmp_path / name for name in ("whole", "killed")}
    assert _train(run, overrides, homes["whole"]).wait() == 0
    process = _train(run, overrides, homes["killed"])
    state = homes["killed"] / "checkpoints" / ".training" / f"cpu-{run}"
    deadline = time.monotonic() + 120
    while not newest_whole_checkpoint(state):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (homes["killed"] / "results" / "cpu" / run / "record.json").exists()
    resumed = _train(run, overrides, homes["killed"], stdout=subprocess.PIPE)
    output = resumed.communicate()[0]
    assert resumed.returncode == 0 and "Resuming from checkpoint-" in output
    assert not state.exists()
    folder = "checkpoints" if run == "full" else "adapters"
    weights = [load_file(next((home / folder / f"cpu-{run}").glob("*model.safetensors"))) for home in homes.values()]
    assert same_weights(*weights)


def _train(run: str, overrides: dict, home: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN_SCRIPT, run, json.dumps(overrides)],
        env=os.environ | {"FINETUNE_HOME": str(home)},
        text=True,
        **options,
    )


def test_a_validation_leaves_the_gradients_of_a_4_bit_model_as_they_were(tiny):
    """bitsandbytes repacks 4-bit layers in evaluation mode on the CPU; no gradient passes a repacked layer."""
    session = session_of("qlora", tiny)
    batch = session.trainer.data_collator([session.trainer.train_dataset[row] for row in range(4)])

    def gradients() -> list[torch.Tensor]:
        session.model.zero_grad()
        with session.trainer._precision.autocast():
            session.trainer.compute_loss(session.model, dict(batch)).backward()
        return [p.grad.clone() for p in session.model.parameters() if p.requires_grad]

    before = gradients()
    scorer = score.LabelScorer(Backbone(load.evaluating(session.model)), session.tokenizer, AG_NEWS, 4)
    scorer.score([row["input_ids"][:50] for row in session.trainer.train_dataset])
    session.model.train()
    assert all(torch.equal(first, second) for first, second in zip(before, gradients(), strict=True))
    assert any(gradient.abs().sum() > 0 for gradient in before)


def test_scores_of_a_4_bit_model_do_not_depend_on_the_batch_size(tiny):
    session_of("qlora", tiny).run()
    settings = plan("qlora", "cpu", tiny)
    model = load.load_for_evaluation(settings, paths.artefact_folder("cpu", "qlora", is_adapter=True))
    tokenizer = load.load_tokenizer(settings)
    prompts = encode.encode_prompts(tokenizer, [example.prompt for example in prepare_data(settings).test])
    scored = [score.LabelScorer(Backbone(model), tokenizer, AG_NEWS, size).score(prompts) for size in (1, 5, 24)]
    np.testing.assert_allclose(scored[0], scored[2], atol=1e-5)
    np.testing.assert_allclose(scored[1], scored[2], atol=1e-5)


@pytest.mark.parametrize("run", ["lora", "qlora"])
def test_a_merged_model_predicts_what_base_and_adapter_do(tiny, run):
    overrides = tiny | {"learning_rate": 5e-3}
    session_of(run, overrides).run()
    settings = plan(run, "cpu", overrides)
    data = prepare_data(settings)
    evaluate(settings, data, "the notebook")
    result = merge(settings, data)
    assert result.agreement > 0.9
    assert ("4-bit" in result.base) == (run == "qlora")
    record = records.read(settings.run_folder)
    assert records.read_merged(record, settings.run_folder) == result
    again = record.training.model_copy(update={"artefact_digest": "another"})
    stale = record.model_copy(update={"training": again})
    assert records.read_merged(stale, settings.run_folder) is None, "the adapter was trained again since"
    folder = paths.home() / result.artefact
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=load.choose_precision(settings).dtype)
    assert not any("lora" in name for name, _ in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = encode.encode_prompts(tokenizer, [example.prompt for example in data.test])
    merged = score.LabelScorer(Backbone(model), tokenizer, AG_NEWS, 8).score(prompts)
    predicted = score.predicted_labels(merged, AG_NEWS.labels)
    right = [label == example.label for label, example in zip(predicted, data.test, strict=True)]
    assert np.mean(right) == pytest.approx(result.scoring.accuracy)
    if run == "qlora":
        # On the base in full precision, the adapter is another model than on the 4-bit one.
        elsewhere = AutoPeftModelForCausalLM.from_pretrained(paths.home() / "adapters" / "cpu-qlora")
        wrong = score.LabelScorer(Backbone(elsewhere), tokenizer, AG_NEWS, 8).score(prompts)
        saved = records.read_predictions(records.read(paths.run_folder("cpu", run)), paths.run_folder("cpu", run))
        known = np.array([list(row.probabilities.values()) for row in saved])
        assert np.abs(merged - known).mean() < np.abs(wrong - known).mean() / 2
    card = (folder / "README.md").read_text()
    assert "AutoPeftModel" not in card and f"merged into {result.base}" in card


def test_a_run_without_an_adapter_cannot_be_merged(tiny):
    settings = plan("full", "cpu", tiny)
    with pytest.raises(UserError, match="full trains no adapter: there is nothing to merge"):
        merge(settings, prepare_data(settings))


@pytest.mark.parametrize("run", RUNS)
def test_packed_and_padded_batches_have_the_same_loss_and_gradients(tiny, run):
    """Packing changes the layout of a batch and the kernel of its attention, not what is learnt."""
    packed, padded = session_of(run, tiny), session_of(run, tiny | {"packing": False})
    results = []
    for session in (packed, padded):
        rows = [session.trainer.train_dataset[row] for row in range(8)]
        batch = session.trainer.data_collator(rows)
        count = torch.tensor(sum(label != encode.IGNORED for row in rows for label in row["labels"]))
        session.model.zero_grad()
        with packed.trainer._precision.autocast():
            loss = session.trainer.compute_loss(session.model, dict(batch), num_items_in_batch=count)
        loss.backward()
        gradients = [p.grad.float().flatten() for p in session.model.parameters() if p.grad is not None]
        results.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (other_loss, other) = results
    assert loss == pytest.approx(other_loss, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) > 0.999


@pytest.mark.parametrize(
    ("changes", "is_shared"), [({}, True), ({"completion_only_loss": False}, False), ({"lora_dropout": 0.1}, False)]
)
def test_what_prompts_share_is_computed_once_only_where_it_changes_nothing(tiny, changes, is_shared):
    session = session_of("lora", tiny | changes)
    rows = [session.trainer.train_dataset[row] for row in range(4)]
    computed = session.trainer.data_collator(rows)["input_ids"].numel()
    assert (computed < sum(len(row["input_ids"]) for row in rows)) == is_shared


def test_variants_of_a_run_report_their_progress_apart(home):
    for variant in ({}, {"variant": "seed-43", "seed": 43}):
        settings = plan("lora", "cpu", variant)
        clock = Clock(settings)
        clock.go_on()
        clock.on_step_end(None, TrainerState(global_step=3, max_steps=10), None)
        progress = json.loads((settings.run_folder / "progress.json").read_text())
        assert (progress["run"], progress["step"]) == ("lora/seed-43" if variant else "lora", 3)
    assert _training_progress("cpu").startswith("step 3/10, ")
    paths.run_folder("cpu", "lora").joinpath("progress.json").unlink()
    assert _training_progress("cpu").startswith("step 3/10, "), "the variant's"


def test_two_processes_that_start_together_prepare_the_data_once(tiny, monkeypatch, capfd):
    """The second starts while the first is at it; it must wait, and reuse what the first made."""
    others = []

    def prepare_slowly(*arguments, **named):
        other = subprocess.Popen(
            [sys.executable, "-c", PREPARE_SCRIPT, json.dumps(tiny)], stdout=subprocess.PIPE, text=True
        )
        others.append((other, other.stdout.readline()))
        return prepare(*arguments, **named)

    monkeypatch.setattr("finetune.data.prepare", prepare_slowly)
    prepare_data(plan("lora", "cpu", tiny))
    [(other, waiting)] = others
    said = other.communicate(timeout=60)[0]
    folder = paths.dataset_folder("sample")
    assert other.returncode == 0
    assert waiting == f"Waiting for {folder}: another process prepares it\n"
    assert capfd.readouterr().out.startswith(f"Prepared {folder}: ") and said.startswith(f"Reused {folder}: ")
