"""Memory that runs out in a step: the update is the same."""

import pytest
import torch

from data_prep import UserError
from finetune import machine
from finetune.notebooks import run_cells
from finetune.train.save import newest_checkpoint

TWO_PASSES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}


def trainer_of(run: str, overrides: dict):
    return run_cells(f"fine_tuning_{run}", "trainer.train(", PROFILE="cpu", OVERRIDES=overrides)["trainer"]


def fits(trainer, articles: int, after: int = 0) -> list[int]:
    """From pass `after` on, memory runs out at the end of the backward pass of more articles than these; returns the
    articles of every pass that began."""
    passes, loss_of = [], trainer._loss

    def counted(batch):
        passes.append(len(batch["articles"].rows))
        return loss_of(batch)

    def run_out(_):
        if len(passes) > after and passes[-1] > articles:
            raise torch.OutOfMemoryError("simulated")

    trainer._loss = counted
    # The first layer's gradients come last.
    trainer._trained[0].register_hook(run_out)
    return passes


def updates(trainer, steps: int) -> list[torch.Tensor]:
    """The gradients of the first updates."""
    seen, clip = [], trainer._clip_grad_norm

    def noted(model):
        seen.append(torch.cat([parameter.grad.flatten() for parameter in trainer._trained]))
        return clip(model)

    trainer._clip_grad_norm = noted
    trainer.args.max_steps = steps
    trainer.train(resume_from_checkpoint=newest_checkpoint(trainer))
    return seen


@pytest.mark.parametrize("run", ["full", "lora"])
def test_the_update_is_the_same_in_smaller_passes(tiny, run, capsys):
    whole = trainer_of(run, tiny | TWO_PASSES)
    expected = updates(whole, 2)
    limited = trainer_of(run, tiny | TWO_PASSES)
    # It runs out in the second pass of the first update, whose first pass is done.
    passes = fits(limited, articles=3, after=1)
    found = updates(limited, 2)
    assert passes == [8, 8, 4, *[2] * 16]
    for one, other in zip(found, expected, strict=True):
        assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9999
        assert one.norm().item() == pytest.approx(other.norm().item(), rel=1e-3)
    first, second = (trainer.state.log_history for trainer in (limited, whole))
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert limited.portions.largest == 2


def test_one_article_that_does_not_fit_ends_the_training_in_a_sentence(tiny):
    trainer = trainer_of("lora", tiny)
    fits(trainer, articles=0)
    with pytest.raises(UserError, match="out of memory at step 1, where one article does not fit"):
        trainer.train()


def test_an_optimiser_that_does_not_fit_ends_the_training_in_a_sentence(tiny, monkeypatch):
    trainer = trainer_of("lora", tiny)

    def run_out(self, closure=None):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(torch.optim.AdamW, "step", run_out)
    with pytest.raises(UserError, match="out of memory after step 0: gradients and optimiser"):
        trainer.train()


def test_where_memory_runs_short_a_checkpoint_is_saved_and_the_next_run_takes_smaller_passes(tiny, monkeypatch):
    whole = trainer_of("lora", tiny | TWO_PASSES | {"num_train_epochs": 2})
    whole.train()
    cut = trainer_of("lora", tiny | TWO_PASSES | {"num_train_epochs": 2})
    passes = fits(cut, articles=8)
    # Less than the floor is left from the second step on; there are four.
    sentence = r"0.0 GB of memory .* step 2 of 4. A checkpoint is saved: end other programs"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=sentence):
        patch.setattr(machine, "memory_left", lambda: 10**12 if len(passes) < 4 else 10**6)
        cut.train(resume_from_checkpoint=newest_checkpoint(cut))
    again = trainer_of("lora", tiny | TWO_PASSES | {"num_train_epochs": 2})
    passes = fits(again, articles=4)
    again.train(resume_from_checkpoint=newest_checkpoint(again))
    assert passes == [4] * 8 and "with 8 articles in a pass; from there on 4" in again.portions.note
    for one, other in zip(again._trained, whole._trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_memory_that_is_too_short_to_score_one_article_costs_no_step(tiny, monkeypatch):
    trainer = trainer_of("lora", tiny | {"per_device_train_batch_size": 8, "eval_on_start": False})
    scored = trainer.scorer._score_batch

    def starved(*given):
        monkeypatch.setattr(machine, "memory_left", lambda: 10**6)
        return scored(*given)

    trainer.scorer._score_batch = starved
    with pytest.raises(UserError, match="one article does not fit beside the model"):
        trainer.train(resume_from_checkpoint=newest_checkpoint(trainer))
    assert newest_checkpoint(trainer).endswith("checkpoint-2")
