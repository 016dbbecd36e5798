"""Trains on a GPU and prints what came out as a line of JSON, for test_gpu.py: in a process of its own, because Unsloth
changes transformers for the whole process.

    python tests/gpu/examine.py MODEL CSV_FOLDER ENGINE RUN
    python tests/gpu/examine.py MODEL CSV_FOLDER ENGINE --load RUN    # what that left, by plain libraries
"""

from __future__ import annotations

import gc
import json
import sys

from finetune import plan, plan_training

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
    # Loading must not import Unsloth, which plan_training would.
    planned = plan if load else plan_training
    # Enough for twelve steps to leave a model that is no longer undecided.
    rate = {"learning_rate": 1e-4 if run.startswith("full") else 1e-3}
    settings = planned(run, "gpu", OVERRIDES | rate | {"model": model, "data_path": csv, "engine": engine})
    result = _load(settings) if load else _examine(settings)
    print("RESULT " + json.dumps(result), flush=True)


def _examine(settings) -> dict:
    from finetune.data import prepare_data
    from finetune.train.run import prepare_training

    data = prepare_data(settings)
    session = prepare_training(settings, data)
    result = {"choices": session.choices, **_gradients(session)}
    del session
    _release()
    return result | _resumption(settings, data)


def _gradients(session) -> dict:
    """Loss and gradient of the same articles packed, padded, and in small batches."""
    from transformers.utils import logging
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    logging.set_verbosity_error()
    rows = [session.trainer.train_dataset[row] for row in range(ROWS)]
    pack, pad = session.trainer.data_collator, DataCollatorForLanguageModeling(session.tokenizer.pad_token_id)
    loss, packed = _step(session, [pack(rows)], _packed_loss)
    padded_loss, padded = _step(session, [pad(rows)], _padded_loss)
    small_loss, small = _step(session, [pack([row]) for row in rows], _packed_loss)
    halves = [pack(rows[:16]), pack(rows[:16])]
    halves_loss, apart = _step(session, halves, _packed_loss)
    graphed_loss, graphed = _step(session, halves, _graphed_loss)
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


def _step(session, batches, loss_of):
    import torch

    session.model.zero_grad()
    count = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        batch = {name: value.to("cuda") for name, value in batch.items()}
        total += loss_of(session, batch, torch.tensor(count, device="cuda"))
    gradients = torch.cat([p.grad.float().flatten() for p in session.model.parameters() if p.grad is not None])
    session.model.zero_grad()
    return total, gradients


def _packed_loss(session, batch, count) -> float:
    from finetune.model import packing

    with packing.within(batch["row"]):
        loss = session.trainer.compute_loss(session.model, batch, num_items_in_batch=count)
        loss.backward()
    return loss.item()


def _graphed_loss(session, batch, count) -> float:
    return session.trainer._passes({**batch, "tokens": count}).item()


def _padded_loss(session, batch, count) -> float:
    """The library's own forward pass and loss."""
    import torch

    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = session.model(**batch, num_items_in_batch=count).loss
    loss.backward()
    return loss.item()


def _compared(first, second) -> dict[str, float]:
    return {
        "cosine": (first @ second / (first.norm() * second.norm())).item(),
        "norms": (first.norm() / second.norm()).item(),
    }


def _resumption(settings, data) -> dict[str, float]:
    """How far apart two uninterrupted trainings end, and a resumed one from them, as shares of the way they went."""
    from transformers import TrainerCallback

    from finetune.train.run import prepare_training

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 8:
                raise KeyboardInterrupt

    start = _weights(prepare_training(settings, data))
    ends = [_trained(prepare_training(settings, data)) for _ in range(2)]
    interrupted = prepare_training(settings, data)
    interrupted.trainer.add_callback(Stop())
    try:
        interrupted.run()
    except KeyboardInterrupt:
        del interrupted
        _release()
    last = prepare_training(settings, data)
    resumed = _trained(last)
    way = (ends[0] - start).norm()
    return {
        "again": ((ends[1] - ends[0]).norm() / way).item(),
        "resumed": ((resumed - ends[0]).norm() / way).item(),
        "probabilities": _probabilities(last.backbone, last.tokenizer, data),
    }


def _trained(session):
    session.run()
    return _weights(session)


def _probabilities(backbone, tokenizer, data) -> list[list[float]]:
    """Of the test rows' labels, by a model that is loaded."""
    import torch

    from finetune.evaluate import score
    from finetune.model import encode

    prompts = [row.prompt for row in encode.encode(tokenizer, data.test, 1024)]
    backbone.model.eval()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return score.LabelScorer(backbone, tokenizer, data.task, 64).score(prompts).tolist()


def _load(settings) -> dict:
    """The artefact by plain transformers and peft, and merged where it is an adapter: the same probabilities? And those
    of the base."""
    from finetune import records
    from finetune.data import prepare_data
    from finetune.evaluate.merge import merge
    from finetune.evaluate.run import evaluate
    from finetune.model import load, packing

    data = prepare_data(settings)
    record = evaluate(settings, data, "examine.py")
    rows = records.read_predictions(record, settings.run_folder)
    merged = merge(settings, data) if settings.recipe.adapter else None
    base = packing.Backbone(load.load_for_evaluation(settings, None))
    return {
        "base": _probabilities(base, load.load_tokenizer(settings), data),
        "probabilities": [list(row.probabilities.values()) for row in rows],
        "merged": merged and {"agreement": merged.agreement, "largest_difference": merged.largest_difference},
    }


def _weights(session):
    import torch

    model = session.trainer.accelerator.unwrap_model(session.model)
    weights = torch.cat([p.detach().float().flatten() for p in model.parameters() if p.requires_grad])
    del session
    _release()
    return weights


def _release() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
