"""The weights with the highest validation accuracy are kept, and a training without progress ends."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from data_prep import UserError
from finetune import paths, plan
from finetune.notebooks import run_cells
from finetune.train.save import newest_checkpoint, save_run

# Four steps, each measured.
OVERRIDES = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "eval_steps": 0.25,
    "load_best_model_at_end": True,
    # Large, so that each step's weights differ in bf16 too.
    "learning_rate": 1e-2,
    "warmup_steps": 0.0,
}


class Snapshots(TrainerCallback):
    """The trained weights after each step; ends the training after one of them, if asked."""

    def __init__(self, stop: int | None = None):
        self.weights, self.stop = {}, stop

    def on_evaluate(self, args, state, control, model=None, **_):
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.weights[state.global_step] = {name: value.detach().clone() for name, value in trained.items()}

    def on_save(self, args, state, control, **_):
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def prepared(run, overrides, accuracies, stop=None):
    """A notebook's names before it trains, whose measurements after each step are these."""
    names = run_cells(f"fine_tuning_{run}", "trainer.train(", PROFILE="cpu", OVERRIDES=overrides)
    trainer, classes = names["trainer"], list(names["data"].task.labels)
    _, labels = trainer._watched

    def scored(prompts, progress=None):
        right = round(accuracies[trainer.state.global_step - 1] * len(labels))
        answers = [classes.index(label) + (row >= right) for row, label in enumerate(labels)]
        return np.eye(len(classes))[np.array(answers) % len(classes)] * 0.96 + 0.01

    trainer.scorer.score = scored
    snapshots = Snapshots(stop)
    trainer.add_callback(snapshots)
    return names, snapshots


def finished(names):
    trainer = names["trainer"]
    trainer.train(resume_from_checkpoint=newest_checkpoint(trainer))
    record = save_run(names["settings"], names["data"], names["resolved"], trainer)
    [file] = (paths.home() / record.training.artefact).glob("*model.safetensors")
    return record, load_file(file)


def same(saved, snapshot):
    """Whether what was saved are these weights; a full model is saved in bf16."""
    for name, value in snapshot.items():
        found = saved[name.replace(".default", "").removeprefix("module.")]
        if not torch.equal(found, value.to(found.dtype)):
            return False
    return True


@pytest.mark.parametrize("run", ["full", "lora"])
def test_the_best_weights_are_kept(tiny, run):
    names, snapshots = prepared(run, tiny | OVERRIDES, [0.3, 0.9, 0.5, 0.9])
    record, saved = finished(names)
    assert record.training.steps == 4
    assert same(saved, snapshots.weights[2]) and not same(saved, snapshots.weights[4])
    assert record.training.choices["kept weights"].startswith("those of step 2 of 4, with 90.6%")
    assert record.settings["load_best_model_at_end"] is True


def test_the_last_weights_may_be_the_best(tiny):
    # Three measurements of four steps: the last one is no multiple.
    names, snapshots = prepared("lora", tiny | OVERRIDES | {"eval_steps": 0.6}, [0.1, 0.2, 0.3, 0.4])
    _, saved = finished(names)
    assert same(saved, snapshots.weights[4])


def test_an_interrupted_training_keeps_the_same_weights(tiny):
    names, _ = prepared("lora", tiny | OVERRIDES, [0.3, 0.9, 0.5, 0.4])
    _, expected = finished(names)
    names, _ = prepared("lora", tiny | OVERRIDES | {"seed": 42}, [0.3, 0.9, 0.5, 0.4], stop=3)
    with pytest.raises(KeyboardInterrupt):
        finished(names)
    names, _ = prepared("lora", tiny | OVERRIDES, [0.3, 0.9, 0.5, 0.4])
    _, saved = finished(names)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_a_training_without_progress_ends(tiny):
    overrides = tiny | OVERRIDES | {"early_stopping_patience": 1}
    names, snapshots = prepared("lora", overrides, [0.3, 0.9, 0.5, 0.95])
    record, saved = finished(names)
    assert record.training.steps == 3
    assert same(saved, snapshots.weights[2])
    assert record.settings["early_stopping_patience"] == 1


def test_early_stopping_without_the_best_weights_is_refused(tiny):
    with pytest.raises(UserError, match="early_stopping_patience needs load_best_model_at_end=True"):
        plan("lora", "cpu", tiny | {"early_stopping_patience": 2})
