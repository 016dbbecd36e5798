"""Trains on a GPU and prints what came out as a line of JSON, for test_gpu.py: in a process of its own, because Unsloth
changes transformers for the whole process.

    python tests/gpu/examine.py MODEL CSV_FOLDER ENGINE RUN
    python tests/gpu/examine.py MODEL CSV_FOLDER ENGINE --load RUN    # what that left, by plain libraries
"""

from __future__ import annotations

import gc
import json
import sys

from finetune import load_data
from finetune.notebooks import run_cells

ROWS = 32
OVERRIDES = {
    "source": "csv",
    "train_rows": 12 * ROWS,
    # Scored three times in rows of 20,000 tokens, more than Unsloth's tables of rotary embeddings begin with.
    "validation_rows": 256,
    "test_rows": 64,
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "eval_steps": 0.34,
    "save_steps": 0.5,
    "warmup_steps": 0.0,
    "num_train_epochs": 1,
    # The library's loss, which ours is compared to, is that of the answer alone.
    "article_loss": 0.0,
}


def main() -> None:
    model, csv, engine, *load, run = sys.argv[1:]
    # Enough for twelve steps to leave a model that is no longer undecided.
    rate = {"learning_rate": 1e-4 if run.startswith("full") else 1e-3}
    overrides = OVERRIDES | rate | {"model": model, "data_path": csv, "engine": engine}
    result = _load(run, overrides) if load else _examine(run, overrides)
    print("RESULT " + json.dumps(result), flush=True)


def _prepared(run: str, overrides: dict) -> dict:
    """The names of a training notebook that is ready to train."""
    return run_cells(f"fine_tuning_{run}", "newest_checkpoint(trainer)", PROFILE="gpu", OVERRIDES=overrides)


def _examine(run: str, overrides: dict) -> dict:
    names = _prepared(run, overrides)
    result = {"choices": names["resolved"].reasons | names["trainer"].checks, **_gradients(names["trainer"])}
    del names
    _release()
    return result | _resumption(run, overrides)


def _gradients(trainer) -> dict:
    """Loss and gradient of the same articles packed, padded, and in small batches."""
    from transformers.utils import logging
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    logging.set_verbosity_error()
    rows = [trainer.train_dataset[row] for row in range(ROWS)]
    pack, pad = trainer.data_collator, DataCollatorForLanguageModeling(trainer.processing_class.pad_token_id)
    loss, packed = _step(trainer, [pack(rows)], _packed_loss)
    padded_loss, padded = _step(trainer, [pad(rows)], _padded_loss)
    small_loss, small = _step(trainer, [pack([row]) for row in rows], _packed_loss)
    halves = [pack(rows[:16]), pack(rows[:16])]
    halves_loss, apart = _step(trainer, halves, _packed_loss)
    graphed_loss, graphed = _step(trainer, halves, _graphed_loss)
    return {
        "loss": loss,
        "padded_loss": padded_loss,
        "small_loss": small_loss,
        "halves_loss": halves_loss,
        "graphed_loss": graphed_loss,
        "padded": _compared(packed, padded),
        "small": _compared(packed, small),
        "graphed": _compared(graphed, apart),
    }


def _step(trainer, batches, loss_of):
    import torch

    trainer.model.zero_grad()
    count = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        batch = trainer._prepare_inputs(batch)
        total += loss_of(trainer, batch, torch.tensor(count, device="cuda"))
    gradients = torch.cat([p.grad.float().flatten() for p in trainer.model.parameters() if p.grad is not None])
    trainer.model.zero_grad()
    return total, gradients


def _packed_loss(trainer, batch, count) -> float:
    from finetune.model import packing

    with packing.within(batch["row"]):
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        loss.backward()
    return loss.item()


def _graphed_loss(trainer, batch, count) -> float:
    return trainer._passes({**batch, "tokens": count}).item()


def _padded_loss(trainer, batch, count) -> float:
    """The library's own forward pass and loss."""
    import torch

    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = trainer.model(**batch, num_items_in_batch=count).loss
    loss.backward()
    return loss.item()


def _compared(first, second) -> dict[str, float]:
    return {
        "cosine": (first @ second / (first.norm() * second.norm())).item(),
        "norms": (first.norm() / second.norm()).item(),
    }


def _resumption(run: str, overrides: dict) -> dict[str, float]:
    """How far apart two uninterrupted trainings end, and a resumed one from them, as shares of the way they went."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 8:
                raise KeyboardInterrupt

    start = _weights(_prepared(run, overrides)["trainer"])
    ends = [_weights(_trained(run, overrides)["trainer"]) for _ in range(2)]
    interrupted = _prepared(run, overrides)["trainer"]
    interrupted.add_callback(Stop())
    try:
        _finish(interrupted)
    except KeyboardInterrupt:
        del interrupted
        _release()
    last = _trained(run, overrides)
    resumed = _weights(last["trainer"])
    way = (ends[0] - start).norm()
    return {
        "again": ((ends[1] - ends[0]).norm() / way).item(),
        "resumed": ((resumed - ends[0]).norm() / way).item(),
        "probabilities": _probabilities(last["trainer"].backbone, last["tokenizer"], last["data"]),
    }


def _finish(trainer) -> None:
    from finetune import newest_checkpoint

    trainer.train(resume_from_checkpoint=newest_checkpoint(trainer))


def _trained(run: str, overrides: dict) -> dict:
    return run_cells(f"fine_tuning_{run}", "plots.training_curves", PROFILE="gpu", OVERRIDES=overrides)


def _probabilities(backbone, tokenizer, data) -> list[list[float]]:
    """Of the test rows' labels, by a model that is loaded."""
    import torch

    from finetune.evaluate import score
    from finetune.model import encode

    prompts = [row.prompt for row in encode.encode(tokenizer, data.test, 1024)]
    backbone.model.eval()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return score.LabelScorer(backbone, tokenizer, data.task, 64).score(prompts).tolist()


def _load(run: str, overrides: dict) -> dict:
    """The artefact by plain transformers and peft, and merged where it is an adapter: the same probabilities? And those
    of the base."""
    from finetune import find_run, load_model, records
    from finetune.evaluate.find import loading
    from finetune.evaluate.merge import merge
    from finetune.model import load, packing

    notebook = "full" if run.startswith("full") else run
    given = {"test_rows": overrides["test_rows"], "model": overrides["model"]}
    names = run_cells(f"{notebook}_finetuning_performance", "class_table", PROFILE="gpu", OVERRIDES=given, RUN=run)
    found, record = names["found"], names["record"]
    data = load_data(found)
    rows = records.read_predictions(record, found.folder)
    merged = merge(find_run(run, "gpu", given), data) if found.trained["adapter"] else None
    base, tokenizer = load_model(found.experiment.model, **loading(found))
    return {
        "base": _probabilities(packing.Backbone(load.evaluating(base)), tokenizer, data),
        "probabilities": [list(row.probabilities.values()) for row in rows],
        "merged": merged and {"agreement": merged.agreement, "largest_difference": merged.largest_difference},
    }


def _weights(trainer):
    import torch

    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = torch.cat([p.detach().float().flatten() for p in model.parameters() if p.requires_grad])
    del trainer
    _release()
    return weights


def _release() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
