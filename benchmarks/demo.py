"""Where the minutes of `make demo` go: a table of its steps, from the records and notebooks that a finished run left.

    make demo && .venv/bin/python -m benchmarks.demo

Writes results/reference/demo/PROCESSOR.json. The share of the peak is that of a large product, measured now: run this
on the machine that ran the demo. A step's rest is the start of its kernel, loading, checks, validation rows, pictures
and saving.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from typing import Any

import pandas as pd

from data_prep import UserError
from data_prep.files import replacing
from finetune import paths, records
from finetune.config.plan import plan
from finetune.config.recipes import MAX_LENGTH
from finetune.data import load_data
from finetune.model import encode, load, precision
from finetune.runner import STEPS

FOLDER = paths.PROJECT / "results" / "reference" / "demo"
# Sides of the product that is the peak, and how often it is timed.
SIDE, REPEATS = 2048, 10


def steps(profile: str) -> tuple[pd.DataFrame, records.RunRecord]:
    """Each part of each step: seconds, tokens that the model computed, and FLOP of their products with its layers.

    A step of n tokens takes 2 n FLOP a parameter of the layers; a training 4 n, or 6 n where the weights are trained.

    Returns:
        The table, and the record of full fine-tuning, whose environment and data are those of all.

    Raises:
        DataError: The demo has not run to its end.
    """
    settings = plan("base", profile)
    configuration, data = load.configuration(settings.experiment.model), load_data(settings)
    prompts = [
        row.prompt for row in encode.encode(load.load_tokenizer(settings.experiment.model), data.test, MAX_LENGTH)
    ]
    shared, rows = encode.shared_length(prompts), []
    full = records.read(paths.run_folder(profile, "full"))
    layers = full.training.parameters - configuration.vocab_size * configuration.hidden_size
    for step in STEPS:
        stamp = paths.results_folder(profile) / "notebooks" / f".{step.name}.json"
        if not stamp.is_file():
            continue
        rest = json.loads(stamp.read_text())["seconds"]
        record = records.read(paths.run_folder(profile, step.run)) if step.run else None
        if step.kind == "train":
            # The beginning of all prompts is computed once a step.
            tokens = record.training.tokens - shared * (record.training.articles - record.training.steps)
            flop = (6 if step.run == "full" else 4) * tokens * layers
            rows.append([step.name, "training", record.training.seconds, tokens, flop])
        elif step.kind == "evaluate":
            batches = -(-len(prompts) // record.evaluation.batch_size)
            tokens = sum(map(len, prompts)) - shared * (len(prompts) - batches)
            rows.append([step.name, "scoring the test rows", record.evaluation.seconds, tokens, 2 * tokens * layers])
            rows.append([step.name, "writing answers", record.evaluation.generation.seconds, None, None])
        rest -= sum(row[2] for row in rows if row[0] == step.name)
        rows.append([step.name, "rest", rest, None, None])
    return pd.DataFrame(rows, columns=["step", "part", "seconds", "tokens", "flop"]), full


def peak(dtype: str) -> float:
    """FLOP/s of a large product, the best of several."""
    import torch

    precision.use_physical_cores()
    matrix = torch.ones(SIDE, SIDE, dtype=precision.DTYPES[dtype])
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.nn.functional.linear(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(seconds)


def main(arguments: list[str] | None = None) -> int:
    """Write the table of a finished demo; returns 2 if there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu")
    options = parser.parse_args(arguments)
    try:
        table, full = steps(options.profile)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    best = peak(full.evaluation.dtype)
    table["share_of_peak"] = table.flop / (table.seconds * best)
    content: dict[str, Any] = {
        # Of the demo, which ran before.
        "environment": full.evaluation.environment.model_dump(),
        "data": full.data.model_dump(),
        "dtype": full.evaluation.dtype,
        "peak_gflops": round(best / 1e9, 1),
        "seconds": round(table.seconds.sum(), 1),
        "steps": json.loads(table.drop(columns="flop").round(3).to_json(orient="records")),
    }
    name = re.sub(r"[^a-z0-9]+", "-", str(content["environment"]["hardware"]["cpu"]).lower()).strip("-")
    with replacing(FOLDER / f"{name}.json") as file:
        file.write(json.dumps(content, indent=1) + "\n")
    print(table.drop(columns="flop").round(2).to_string(index=False))
    print(f"{content['seconds']:.0f} s; peak {best / 1e9:.0f} GFLOP/s in {content['dtype']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
