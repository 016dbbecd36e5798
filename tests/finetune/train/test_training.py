"""Training: the loss sees the answers, the result is reproducible, resumable and loadable by plain libraries."""

import json
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import families
import numpy as np
import processes
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerState

from data_prep import UserError, prepare
from data_prep.task import AG_NEWS
from finetune import paths, plan, records
from finetune.compare import comparison, tables
from finetune.data import load_data
from finetune.evaluate import score
from finetune.evaluate.find import find_run
from finetune.evaluate.merge import merge
from finetune.files import disown
from finetune.model import encode, load
from finetune.model.packing import Backbone
from finetune.notebooks import run_cells
from finetune.progress import training_progress
from finetune.train.callbacks import Clock, SaveOnSignal
from finetune.train.checks import check_supervision
from finetune.train.portions import Portions
from finetune.train.save import checkpoint_fault, newest_checkpoint, save_run

RUNS = ["full", "lora", "qlora"]


def trainer_of(run: str, overrides: dict, **edits: str):
    """The trainer of a notebook, before it trains."""
    return run_cells(f"fine_tuning_{run}", "trainer.train(", edits, PROFILE="cpu", OVERRIDES=overrides)["trainer"]


def trained(run: str, overrides: dict, edits: dict[str, str] | None = None) -> records.RunRecord:
    """The record of a notebook's training."""
    return run_cells(f"fine_tuning_{run}", "plots.training_curves", edits, PROFILE="cpu", OVERRIDES=overrides)["record"]


def evaluated(run: str, overrides: dict) -> records.RunRecord:
    """The record of an evaluation notebook; of a trained model with those overrides that are the evaluation's."""
    given = {name: overrides[name] for name in ("model", "test_rows", "generation_rows") if name in overrides}
    if run == "base":
        given["train_rows"] = overrides["train_rows"]
    name = "base_model_performance" if run == "base" else f"{run}_finetuning_performance"
    return run_cells(name, "class_table", PROFILE="cpu", OVERRIDES=given)["record"]


def weights_of(record: records.RunRecord) -> dict[str, torch.Tensor]:
    [file] = (paths.home() / record.training.artefact).glob("*model.safetensors")
    return load_file(file)


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("run", RUNS)
def test_the_loss_sees_the_answers_and_nothing_else(tiny, run):
    trainer = trainer_of(run, tiny)
    assert trainer.supervision.rows == 8
    assert all(text.startswith('{"category":"') and text.endswith("<|im_end|>") for text in trainer.supervision.decoded)
    [row] = [trainer.train_dataset[0]]
    batch = trainer.data_collator([row])
    with torch.no_grad(), trainer.autocast():
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
        logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()
    answer = [token for token in row["labels"] if token != encode.IGNORED]
    start = len(row["labels"]) - len(answer)
    by_hand = -np.mean([logits[start + i - 1].log_softmax(-1)[token].item() for i, token in enumerate(answer)])
    assert loss == pytest.approx(by_hand, abs=2e-2)


def test_rows_without_supervised_tokens_are_refused(tiny):
    trainer = trainer_of("lora", tiny)
    masked = trainer.train_dataset.map(lambda row: {"labels": [encode.IGNORED] * len(row["labels"])})
    trainer.train_dataset = masked
    with pytest.raises(UserError, match="no token of the first rows carries loss"):
        check_supervision(trainer, trainer.processing_class)


@pytest.mark.parametrize(("run", "kinds"), [("full", {"embed_tokens"}), ("lora", {"lora_A", "lora_B"})])
def test_the_right_tensors_train(tiny, run, kinds):
    trainable = load.trainable_counts(trainer_of(run, tiny).model)
    assert all(any(kind in name for name in trainable) for kind in kinds)
    assert ("lora_A" in " ".join(trainable)) == (run != "full")
    if run != "full":
        assert all("lora" in name for name in trainable)


@pytest.mark.parametrize("run", RUNS)
def test_the_same_seed_gives_the_same_weights_and_metrics(tiny, run):
    results = []
    for _ in range(2):
        weights, found = weights_of(trained(run, tiny)), evaluated(run, tiny).evaluation
        results.append((weights, found.predictions_digest, found.scoring))
    (first, *rest), (second, *others) = results
    assert same_weights(first, second)
    assert rest == others


def test_another_seed_gives_other_weights(tiny):
    first = weights_of(trained("lora", tiny))
    assert not same_weights(first, weights_of(trained("lora", tiny | {"seed": 1})))


def test_a_small_batch_accumulated_equals_a_large_one(tiny):
    """8 x 2 and 16 x 1 see the same rows at each step: the weights agree to bf16's rounding."""
    tiny = tiny | {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "optim": "adamw_torch"}
    small = trainer_of("full", tiny | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2})
    large = trainer_of("full", tiny | {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1})
    rows = [small.train_dataset[row] for row in range(16)]

    def gradient(trainer, size):
        trainer.model.zero_grad()
        count = sum(label != encode.IGNORED for row in rows for label in row["labels"][1:])
        for start in range(0, len(rows), size):
            batch = trainer.data_collator(rows[start : start + size])
            with trainer.autocast():
                loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(count))
            loss.backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    accumulated, whole = gradient(small, 8), gradient(large, 16)
    assert torch.nn.functional.cosine_similarity(accumulated, whole, dim=0) > 0.999
    assert accumulated.norm().item() == pytest.approx(whole.norm().item(), rel=1e-2)


@pytest.mark.parametrize("run", RUNS)
def test_artefacts_load_in_plain_libraries_and_predict_the_same(place, tiny, tiny_model, run):
    record = trained(run, tiny)
    evaluated("base", tiny)
    data = load_data(plan(run, "cpu", tiny))
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
    saved = records.read_predictions(evaluated(run, tiny), paths.run_folder(place, run))
    np.testing.assert_allclose(plain, [list(row.probabilities.values()) for row in saved], atol=1e-5)
    assert (folder / "README.md").read_text().startswith("---\nbase_model:")
    assert not list(folder.parent.glob(".*")) or folder.parent.name == "checkpoints"


def test_a_moved_adapter_loads_in_a_fresh_process_by_the_lines_of_its_card(tiny, tiny_model, tmp_path):
    adapter = paths.home() / trained("lora", tiny).training.artefact
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = AutoPeftModelForCausalLM.from_pretrained(adapter)(ids).logits
    moved, base = adapter.rename(tmp_path / "moved"), shutil.copytree(tiny_model, tmp_path / "moved base")
    [code] = re.findall(r"```python\n(.*?)```", (moved / "README.md").read_text(), re.DOTALL)
    for placeholder, place in {"PATH/TO/THIS/FOLDER": moved, f"PATH/TO/{tiny_model.name}": base}.items():
        assert f'"{placeholder}"' in code
        code = code.replace(placeholder, str(place))
    code += "import torch\ntorch.save(model(torch.arange(3, 60)[None]).logits.detach(), 'logits.pt')\n"
    (tmp_path / "elsewhere").mkdir()
    processes.start(processes.execute, code, tmp_path / "elsewhere", home=tmp_path).join()
    torch.testing.assert_close(torch.load(tmp_path / "elsewhere" / "logits.pt"), expected)


def test_tuned_and_base_predict_differently(tiny):
    base = evaluated("base", tiny)
    trained("lora", tiny | {"learning_rate": 5e-3})
    tuned = evaluated("lora", tiny)
    assert tuned.evaluation.predictions_digest != base.evaluation.predictions_digest
    assert tuned.evaluation.log_loss != pytest.approx(base.evaluation.log_loss, abs=1e-4)


def test_the_record_counts_what_was_trained(tiny):
    overrides = tiny | {"num_train_epochs": 2, "eval_on_start": True}
    trainer, training = trainer_of("lora", overrides), trained("lora", overrides).training
    real = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert training.tokens == 2 * real
    assert training.articles == 64
    assert training.steps == 8
    assert training.tokens_per_second == pytest.approx(training.tokens / training.seconds)
    accuracies = [point.step for point in training.history if point.validation_accuracy is not None]
    assert accuracies == [0, 4, 8]
    losses = [point.loss for point in training.history if point.loss is not None]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_evaluating_what_was_not_trained_names_the_notebook(home):
    with pytest.raises(UserError, match=r"no lora model of cpu yet: run fine_tuning_lora\.ipynb first"):
        find_run("lora", "cpu")


def test_an_evaluation_takes_the_model_as_it_lies_there(tiny):
    trained("lora", tiny | {"learning_rate": 1e-3, "seed": 7})
    found = find_run("lora", "cpu", {"model": tiny["model"], "test_rows": 24})
    assert (found.trained["learning_rate"], found.experiment.seed, found.experiment.model) == (1e-3, 7, tiny["model"])
    with pytest.raises(UserError, match="learning_rate: not a parameter of an evaluation"):
        find_run("lora", "cpu", {"learning_rate": 1e-3})


EDITS = {
    "r=recipe.r,": "r=3,",
    "use_dora=False": "use_dora=True, use_rslora=True",
    "lr_scheduler_type=recipe.lr_scheduler_type": 'lr_scheduler_type="polynomial"',
    "optim=recipe.optim,": 'optim="adafactor",',
    "seed=experiment.seed,\n    data_seed": "seed=5,\n    adam_beta2=0.9,\n    data_seed",
    "callbacks=[]": "callbacks=[__import__('transformers').PrinterCallback()]",
}


def test_the_record_the_card_and_the_report_say_what_ran_in_edited_cells(tiny):
    evaluated("base", tiny)
    record = trained("lora", tiny, EDITS)
    wanted = {"r": 3, "use_dora": True, "lr_scheduler_type": "polynomial", "optim": "adafactor", "seed": 5}
    assert {name: record.settings[name] for name in wanted} == wanted
    assert record.settings["callbacks"] == ["PrinterCallback"]
    assert record.settings["other_arguments"] == {"adam_beta2": 0.9, "LoraConfig.use_rslora": True}
    assert record.seed == 5
    folder = paths.home() / record.training.artefact
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    card = (folder / "README.md").read_text()
    assert "r 3," in card and "lr_scheduler_type polynomial" in card
    assert evaluated("lora", tiny).settings["optim"] == "adafactor"
    shared = tables.recipes(comparison.load(record.profile))[1]
    assert shared["lr_scheduler_type"] == "polynomial" and "adam_beta2" in shared["other_arguments"]


def test_an_optimizer_of_ones_own_trains_and_is_recorded(tiny):
    edits = {
        "callbacks=[],": "callbacks=[], optimizers=(__import__('torch').optim.SGD(model.parameters(), 0.1), None),"
    }
    assert trained("lora", tiny, edits).settings["optim"] == "torch.optim.sgd.SGD"


def test_a_checkpoint_of_other_arguments_is_not_resumed_from(tiny):
    overrides = tiny | {"save_steps": 0.5}
    trainer = trainer_of("lora", overrides)
    assert newest_checkpoint(trainer) is None
    trainer.train()
    assert newest_checkpoint(trainer_of("lora", overrides)).endswith("checkpoint-4")
    assert (
        newest_checkpoint(trainer_of("lora", overrides, **{"max_grad_norm=recipe.max_grad_norm": "max_grad_norm=2.0"}))
        is None
    )
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


def test_target_modules_that_the_model_lacks_are_refused(tiny):
    with pytest.raises(UserError, match=r"qkv_proj, and this model has no such layer; it has down_proj"):
        trainer_of("lora", tiny | {"target_modules": "q_proj,qkv_proj"})


def test_a_loss_that_is_no_number_ends_the_run(tiny):
    with pytest.raises(UserError, match="the loss became nan at step"):
        trained("full", tiny | {"learning_rate": 1e30, "max_grad_norm": 1e30, "num_train_epochs": 4})


def test_scores_that_are_no_numbers_end_the_run(tiny):
    """Where a validation comes before the next loss is logged."""
    trainer = trainer_of("lora", tiny)
    with torch.no_grad():
        trainer._trained[0].fill_(torch.nan)
    with pytest.raises(UserError, match="scores are no numbers after step 0; lower learning_rate"):
        trainer.evaluate()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tiny, capsys):
    trainer = trainer_of("lora", tiny | {"save_steps": 0.25})
    assert newest_checkpoint(trainer) is None
    trainer.train()
    older, newest = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"))
    training, found = trainer.clock.training, 0
    for path in [path for path in newest.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        flipped = bytes([*content[:-1], content[-1] ^ 1])
        for damaged in (b"", content[: len(content) // 2], bytes(len(content)), flipped, None):
            path.write_bytes(damaged) if damaged is not None else path.unlink()
            found += path.name in checkpoint_fault(newest, training) or damaged is None
            path.write_bytes(content)
    assert found == 5 * len(list(newest.iterdir())) > 40
    assert checkpoint_fault(newest, training) is None
    (newest / "optimizer.pt").unlink()
    assert newest_checkpoint(trainer) == str(older)
    assert f"Discarding {newest}: optimizer.pt is damaged or missing" in capsys.readouterr().out
    assert not newest.exists()


def test_a_checkpoint_of_another_base_is_refused(tiny, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "copy")
    overrides = tiny | {"model": str(model), "save_steps": 0.5}
    trainer = trainer_of("lora", overrides)
    newest_checkpoint(trainer)
    trainer.train()
    assert newest_checkpoint(trainer).endswith("checkpoint-4")
    configuration = model / "tokenizer_config.json"
    configuration.write_text(configuration.read_text() + "\n")
    with pytest.raises(UserError, match=r"checkpoint-4 was trained on other files of the base model.*put them back"):
        newest_checkpoint(trainer_of("lora", overrides))


def test_a_checkpoint_runs_no_code(tiny, tmp_path):
    """Whoever can write a checkpoint can write its digests too: states are read as tensors alone."""
    trainer = trainer_of("lora", tiny | {"save_steps": 0.5})
    newest_checkpoint(trainer)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"

    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        kept = (checkpoint / name).read_bytes()
        torch.save(Hostile(), checkpoint / name)
        with pytest.raises(pickle.UnpicklingError):
            trainer_of("lora", tiny | {"save_steps": 0.5}).train(str(checkpoint))
        (checkpoint / name).write_bytes(kept)
    assert not (tmp_path / "ran").exists()


def test_signals_that_are_ignored_stay_ignored():
    """Under nohup, a terminal that closes ends no training."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SaveOnSignal(Portions(None, [])) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == "SIGTERM"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_weights_updated_in_the_backward_pass_end_where_they_end_after_it(tiny):
    common = tiny | {"optim": "adamw_torch", "max_grad_norm": 1e9}
    after = weights_of(trained("full", common))
    trainer = trainer_of("full", common | {"update_in_backward": True})
    kept = []

    def count(_):
        kept.append(sum(parameter.grad is not None for parameter in trainer.model.parameters()))

    # The last that gets its gradient: those of all others are gone.
    trainer.model.get_input_embeddings().weight.register_post_accumulate_grad_hook(count)
    trainer.train()
    assert same_weights(
        after, {name: value.bfloat16() for name, value in trainer.model.state_dict().items() if name in after}
    )
    assert kept == [1] * trainer.state.global_step


@pytest.mark.parametrize(
    ("run", "number", "change"),
    [
        ("full", signal.SIGKILL, {}),
        ("lora", signal.SIGTERM, {}),
        ("qlora", signal.SIGKILL, {}),
        ("full", signal.SIGHUP, {"update_in_backward": True}),
    ],
)
def test_an_ended_run_resumes_to_the_uninterrupted_runs_weights(tiny, place, tmp_path, run, number, change):
    """Killed, it goes on from its last checkpoint. At another signal it saves one, though its recipe asks for none."""
    kills = number == signal.SIGKILL
    overrides = tiny | {"num_train_epochs": 2, "train_rows": 96, "save_steps": 1 / 6 if kills else 0} | change
    homes = {name: tmp_path / name for name in ("whole", "killed")}
    processes.start(processes.train, run, overrides, home=homes["whole"]).join()
    killed = processes.start(processes.train, run, overrides, home=homes["killed"])
    state = homes["killed"] / "checkpoints" / ".training" / f"{place}-{run}"
    deadline = time.monotonic() + 120
    while not list(state.glob("checkpoint-*/whole.json" if kills else "progress.json")):
        assert killed.is_alive() and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(killed.pid, number)
    killed.join()
    assert killed.exitcode == (-number if kills else 1)
    assert not (homes["killed"] / "results" / place / run / "record.json").exists()
    log = tmp_path / "log"
    resumed = processes.start(processes.train, run, overrides, home=homes["killed"], log=log)
    resumed.join()
    assert resumed.exitcode == 0 and "Resuming from checkpoint-" in log.read_text()
    assert not state.exists()
    folder = "checkpoints" if run == "full" else "adapters"
    weights = [
        load_file(next((home / folder / f"{place}-{run}").glob("*model.safetensors"))) for home in homes.values()
    ]
    assert same_weights(*weights)


def test_a_training_that_another_process_has_is_refused_until_that_ends(tiny, tmp_path):
    trainer = trainer_of("full", tiny)
    state, log = Path(trainer.args.output_dir), tmp_path / "log"
    other = processes.start(processes.own, state, home=tmp_path, log=log)
    while not (log.exists() and log.read_text()):
        assert other.is_alive()
        time.sleep(0.01)
    for begin in (lambda: newest_checkpoint(trainer), trainer.train):
        with pytest.raises(UserError, match=rf"process {other.pid} on .* trains in {re.escape(str(state))} already"):
            begin()
    other.kill()
    other.join()
    trainer.train(newest_checkpoint(trainer))
    assert trainer.state.global_step == trainer.state.max_steps
    disown(state)


def test_a_validation_leaves_the_gradients_of_a_4_bit_model_as_they_were(tiny):
    """bitsandbytes repacks 4-bit layers in evaluation mode on the CPU; no gradient passes a repacked layer."""
    trainer = trainer_of("qlora", tiny)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])

    def gradients() -> list[torch.Tensor]:
        trainer.model.zero_grad()
        with trainer.autocast():
            trainer.compute_loss(trainer.model, dict(batch)).backward()
        return [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]

    before = gradients()
    scorer = score.LabelScorer(Backbone(load.evaluating(trainer.model)), trainer.processing_class, AG_NEWS, 4)
    scorer.score([row["input_ids"][:50] for row in trainer.train_dataset])
    trainer.model.train()
    assert all(torch.equal(first, second) for first, second in zip(before, gradients(), strict=True))
    assert any(gradient.abs().sum() > 0 for gradient in before)


def test_scores_of_a_4_bit_model_do_not_depend_on_the_batch_size(tiny):
    trained("qlora", tiny)
    given = {"model": tiny["model"], "test_rows": 24}
    names = run_cells("qlora_finetuning_performance", "evaluate(found", PROFILE="cpu", OVERRIDES=given)
    model, tokenizer = load.evaluating(names["model"]), names["tokenizer"]
    prompts = encode.encode_prompts(tokenizer, [example.prompt for example in names["data"].test])
    scored = [score.LabelScorer(Backbone(model), tokenizer, AG_NEWS, size).score(prompts) for size in (1, 5, 24)]
    np.testing.assert_allclose(scored[0], scored[2], atol=1e-5)
    np.testing.assert_allclose(scored[1], scored[2], atol=1e-5)


@pytest.mark.parametrize("run", ["lora", "qlora"])
def test_a_merged_model_predicts_what_base_and_adapter_do(tiny, run):
    overrides = tiny | {"learning_rate": 5e-3}
    trained(run, overrides)
    evaluated(run, overrides)
    found = find_run(run, "cpu", {"model": tiny["model"], "test_rows": 24})
    data = load_data(found)
    result = merge(found, data)
    assert result.agreement > 0.9
    assert ("4-bit" in result.base) == (run == "qlora")
    record = records.read(found.folder)
    assert records.read_merged(record, found.folder) == result
    again = record.training.model_copy(update={"artefact_digest": "another"})
    stale = record.model_copy(update={"training": again})
    assert records.read_merged(stale, found.folder) is None, "the adapter was trained again since"
    folder = paths.home() / result.artefact
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=load.choose_precision(found.experiment).dtype)
    assert not any("lora" in name for name, _ in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = encode.encode_prompts(tokenizer, [example.prompt for example in data.test])
    merged = score.LabelScorer(Backbone(model), tokenizer, AG_NEWS, 8).score(prompts)
    predicted = score.predicted_labels(merged, AG_NEWS.labels)
    right = [label == example.label for label, example in zip(predicted, data.test, strict=True)]
    assert np.mean(right) == pytest.approx(result.scoring.accuracy)
    if run == "qlora":
        # On the base in full precision, the adapter is another model than on the 4-bit one.
        elsewhere = AutoPeftModelForCausalLM.from_pretrained(paths.home() / "adapters" / f"{found.place}-qlora")
        wrong = score.LabelScorer(Backbone(elsewhere), tokenizer, AG_NEWS, 8).score(prompts)
        saved = records.read_predictions(record, found.folder)
        known = np.array([list(row.probabilities.values()) for row in saved])
        assert np.abs(merged - known).mean() < np.abs(wrong - known).mean() / 2
    card = (folder / "README.md").read_text()
    assert "AutoPeftModel" not in card and f"merged into {result.base}" in card


def test_a_run_without_an_adapter_cannot_be_merged(tiny):
    trained("full", tiny)
    found = find_run("full", "cpu", {"model": tiny["model"]})
    with pytest.raises(UserError, match="full trains no adapter: there is nothing to merge"):
        merge(found, load_data(found))


@pytest.mark.parametrize("run", RUNS)
def test_packed_and_padded_batches_have_the_same_loss_and_gradients(tiny, run):
    """Packing changes the layout of a batch and the kernel of its attention, not what is learnt."""
    packed, padded = trainer_of(run, tiny), trainer_of(run, tiny | {"packing": False})
    results = []
    for trainer in (packed, padded):
        rows = [trainer.train_dataset[row] for row in range(8)]
        batch = trainer.data_collator(rows)
        count = torch.tensor(sum(label != encode.IGNORED for row in rows for label in row["labels"]))
        trainer.model.zero_grad()
        with packed.autocast():
            loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
        loss.backward()
        gradients = [p.grad.float().flatten() for p in trainer.model.parameters() if p.grad is not None]
        results.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (other_loss, other) = results
    assert loss == pytest.approx(other_loss, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) > 0.999


@pytest.mark.parametrize(("name", "rows_are"), [("convolution", "padded batches"), ("experts", "packed rows")])
def test_a_model_trains_on_the_loss_that_plain_transformers_gives(tiny, tiny_model, tmp_path, name, rows_are):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = families.tiny_family(name, tokenizer)
    for part in (plain, tokenizer):
        part.save_pretrained(tmp_path / "model")
    overrides = tiny | {"model": str(tmp_path / "model"), "compute_dtype": "float32"}
    names = run_cells("fine_tuning_full", "trainer.train(", PROFILE="cpu", OVERRIDES=overrides)
    trainer = names["trainer"]
    assert trainer.checks["rows"].startswith(rows_are)
    rows = [trainer.train_dataset[row] for row in range(4)]
    count = sum(label != encode.IGNORED for row in rows for label in row["labels"])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows), num_items_in_batch=count)
        expected = [
            plain(**{key: torch.tensor([value]) for key, value in row.items()}, num_items_in_batch=count).loss
            for row in rows
        ]
    assert loss.item() == pytest.approx(sum(expected).item(), rel=1e-4)
    assert np.isfinite(trainer.train().training_loss)
    record = save_run(names["settings"], names["data"], names["resolved"], trainer)
    said, attention = ("on: ", "padded") if rows_are == "packed rows" else ("off: the model cannot read", "sdpa")
    assert record.settings["packing"] == (rows_are == "packed rows")
    assert record.training.choices["packing"].startswith(said) and record.training.attention == attention


@pytest.mark.parametrize(
    ("changes", "is_shared"), [({}, True), ({"completion_only_loss": False}, False), ({"lora_dropout": 0.1}, False)]
)
def test_what_prompts_share_is_computed_once_only_where_it_changes_nothing(tiny, changes, is_shared):
    trainer = trainer_of("lora", tiny | changes)
    rows = [trainer.train_dataset[row] for row in range(4)]
    computed = trainer.data_collator(rows)["input_ids"].numel()
    assert (computed < sum(len(row["input_ids"]) for row in rows)) == is_shared


def test_variants_of_a_run_report_their_progress_apart(home):
    for variant in ("", "seed-43"):
        folder = paths.state_folder("cpu", "lora", variant)
        clock = Clock(Portions(None, []))
        clock.go_on()
        clock.on_step_end(SimpleNamespace(output_dir=str(folder)), TrainerState(global_step=3, max_steps=10), None)
        progress = json.loads((folder / "progress.json").read_text())
        assert (progress["run"], progress["step"]) == (folder.name, 3)
    assert training_progress("cpu").startswith("step 3/10, ")
    paths.state_folder("cpu", "lora").joinpath("progress.json").unlink()
    assert training_progress("cpu").startswith("step 3/10, "), "the variant's"
    assert training_progress("cpu+tickets") == ""


def test_two_processes_that_start_together_prepare_the_data_once(tiny, place, tmp_path, monkeypatch, capfd):
    """The second starts while the first is at it; it must wait, and reuse what the first made."""
    others, log = [], tmp_path / "log"

    def prepare_slowly(*arguments, **named):
        others.append(processes.start(processes.prepare, tiny, home=paths.home(), log=log))
        while not (log.exists() and "\n" in log.read_text()):
            assert others[0].is_alive()
            time.sleep(0.05)
        return prepare(*arguments, **named)

    monkeypatch.setattr("finetune.data.prepare", prepare_slowly)
    load_data(plan("lora", "cpu", tiny))
    [other] = others
    other.join()
    waiting, said = log.read_text().split("\n", 1)
    folder = paths.dataset_folder("sample", place)
    assert other.exitcode == 0
    assert waiting == f"Waiting for {folder}: another process prepares it"
    assert capfd.readouterr().out.startswith(f"Prepared {folder}: ") and said.startswith(f"Reused {folder}: ")


def test_in_a_control_group_the_training_ends_before_the_kernel_kills_it(tiny, memory_group, tmp_path):
    given = tiny | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    log = tmp_path / "log"
    process = processes.start(processes.train_beside_a_hungry_program, given, memory_group, home=tmp_path, log=log)
    process.join()
    assert process.exitcode == 0 and "0.2 GB free) ended the training after step 2 of 4" in log.read_text()
    trainer = trainer_of("lora", given)
    trainer.train(resume_from_checkpoint=newest_checkpoint(trainer))
    assert trainer.portions.largest == 4 and trainer.state.global_step == 4
