"""What scores in fp32 change and cost: the models of a finished run, scored with logits in bf16 and in fp32.

    python -m finetune run --profile gpu --set source=csv --set data_path=FOLDER
    python -m benchmarks.scores --set source=csv --set data_path=FOLDER

Writes results/reference/scores.json, from which `python -m benchmarks.render` makes the table in docs/method.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep import UserError
from data_prep.files import replacing
from finetune import machine, metrics, paths, records
from finetune.config.methods import METHODS
from finetune.config.plan import parse_assignments
from finetune.config.recipes import MAX_LENGTH
from finetune.evaluate.score import LabelScorer, predicted_labels, timed
from finetune.model import checks, encode, load
from finetune.notebooks import run_cells

FILE = paths.PROJECT / "results" / "reference" / "scores.json"
RUNS = ("base", "full", "lora", "qlora")
REPEATS = 5
# Of the log-odds of the two best labels: 1.001 to 1 is a tie.
TIE = 0.001
# The log-odds of labels whose logits are bf16 numbers between 16 and 32 are multiples of it.
STEP = 0.125
# Two steps, with room for rounding.
NEAR = 2 * STEP + 0.01


class InBf16:
    """A model that rounds its logits to its own type, as it did for our scores until commit 31e57c4."""

    def __init__(self, backbone):
        self.backbone, self.device = backbone, backbone.device

    def __call__(self, row, places, in_fp32):
        return self.backbone(row, places)


def measure(run: str, profile: str, overrides: dict[str, str]) -> dict[str, Any]:
    """Score the test rows of a run in both types, in turn, and compare.

    Args:
        run: The method's name; its notebook loads the model.
        profile: As in the training.
        overrides: Of the base model's data; a trained model knows its own.
    """
    given = {"PROFILE": profile, "OVERRIDES": overrides if run == "base" else {}}
    names = run_cells(METHODS[run].evaluation, until="evaluate(found", **given)
    model, tokenizer, data, found = (names[name] for name in ("model", "tokenizer", "data", "found"))
    load.evaluating(model)
    rows = encode.encode(tokenizer, data.test, MAX_LENGTH)
    prompts = [row.prompt for row in rows]
    backbone, _ = checks.choose_backbone(model, [row.prompt + row.answer for row in rows])
    batch = found.experiment.per_device_eval_batch_size
    models = {"bf16": InBf16(backbone), "fp32": backbone}
    scorers = {name: LabelScorer(each, tokenizer, data.task, batch) for name, each in models.items()}
    probabilities, peak, seconds = {}, {}, {name: [] for name in models}
    for name, scorer in scorers.items():
        machine.reset_peak_memory()
        # The first pass warms up.
        probabilities[name] = scorer.score(prompts)
        peak[name] = machine.peak_memory()[0]
    for _ in range(REPEATS):
        for name, scorer in scorers.items():
            seconds[name].append(timed(scorer.score, prompts)[1])
    labels = data.task.labels
    tokens = [len(encode.answer_tokens(tokenizer, data.task.answer_for(label))) for label in labels]
    return {
        "run": run,
        "data": data.reference.model_dump(),
        "batch_size": batch,
        "rows": len(prompts),
        **difference(probabilities, [example.label for example in data.test], labels, tokens),
        "seconds": seconds,
        "peak_memory_bytes": peak,
    }


def difference(
    probabilities: dict[str, np.ndarray], truth: Sequence[str], labels: Sequence[str], tokens: Sequence[int]
) -> dict[str, Any]:
    """How scores in bf16 and in fp32 differ.

    Args:
        probabilities: Of `bf16` and of `fp32`, shape (rows, labels).
        truth: The rows' labels.
        labels: The task's labels.
        tokens: How many tokens each of these has.
    """
    order = {name: each.argsort(axis=1)[:, :-3:-1] for name, each in probabilities.items()}
    odds = {
        name: -np.diff(np.log(np.take_along_axis(each, order[name], axis=1)), axis=1)[:, 0]
        for name, each in probabilities.items()
    }
    predicted = {name: predicted_labels(each, labels) for name, each in probabilities.items()}
    right = [[a == b for a, b in zip(each, truth, strict=True)] for each in predicted.values()]
    only_bf16, only_fp32, p_value = metrics.mcnemar(*right)
    # Where bf16 ties between labels of different lengths: does the label with more tokens win?
    lengths = np.array(tokens)[order["bf16"]]
    unequal = (odds["bf16"] < TIE) & (lengths[:, 0] != lengths[:, 1])
    longer = np.take_along_axis(order["bf16"], lengths.argmax(axis=1)[:, None], axis=1)[:, 0]
    return {
        "accuracy": {name: metrics.compute(truth, each, labels).accuracy for name, each in predicted.items()},
        "ties": {name: int((each < TIE).sum()) for name, each in odds.items()},
        "within_two_steps": {name: int((each <= NEAR).sum()) for name, each in odds.items()},
        "multiples": {
            name: int((np.abs(each - STEP * np.round(each / STEP)) < TIE).sum()) for name, each in odds.items()
        },
        "unequal_ties": int(unequal.sum()),
        "to_longer": {name: int((each[:, 0] == longer)[unequal].sum()) for name, each in order.items()},
        "changed": sum(a != b for a, b in zip(*predicted.values(), strict=True)),
        "only_bf16_right": only_bf16,
        "only_fp32_right": only_fp32,
        "p_value": p_value,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure all runs, and write the file; returns 2 if a run is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="gpu")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--only", action="append", choices=RUNS, metavar="RUN", help=", ".join(RUNS))
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    os.environ.setdefault("FINETUNE_COMMAND", shlex.join(["python", "-m", "benchmarks.scores", *arguments]))
    try:
        overrides = parse_assignments(options.assignments)
        lines = []
        for run in options.only or RUNS:
            lines.append(measure(run, options.profile, overrides))
            print(json.dumps(lines[-1]), flush=True)
            gc.collect()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    content = {"environment": records.environment().model_dump(), "profile": options.profile, "runs": lines}
    with replacing(FILE) as file:
        file.write(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
