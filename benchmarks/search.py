"""Search hyper-parameters on validation rows: train every combination of a grid, and never look at a test row.

    python -m benchmarks.search full --profile gpu --set source=csv --set data_path=FOLDER \\
        --grid learning_rate=5e-5,1e-4 --grid dtype=bfloat16,float32 --try learning_rate=1e-3,num_train_epochs=3 \\
        --out results/search-full.json

Writes one line of JSON for each training: its settings, final validation accuracy and log loss, seconds and peak
memory. The models are not saved.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from data_prep import UserError
from data_prep.files import replacing
from finetune import plan_training
from finetune.config.methods import METHODS
from finetune.config.plan import parse_assignments


def main(arguments: list[str] | None = None) -> int:
    """Train the grid, and write each result as soon as it is known; returns 2 if a parameter is wrong."""
    options = _options(arguments)
    os.environ["FINETUNE_COMMAND"] = shlex.join(["python", "-m", "benchmarks.search", *sys.argv[1:]])
    try:
        asked = {"save_steps": 0.0} | parse_assignments(options.assignments)
        wanted = combinations(options.grid, options.tries)
        # All before the first training: a wrong value must not end a search that has run for an hour.
        for each in wanted:
            plan_training(options.run, options.profile, asked | each)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results: list[dict[str, Any]] = []
    for combination in wanted:
        outcome = _train(options.run, options.profile, asked | combination)
        results.append({"run": options.run, **combination, **outcome})
        print(json.dumps({key: value for key, value in results[-1].items() if key != "environment"}), flush=True)
        with replacing(Path(options.out)) as file:
            file.writelines(json.dumps(result) + "\n" for result in results)
    return 0


def combinations(grid: list[str], tries: list[str]) -> list[dict[str, str]]:
    """Of `["a=1,2", "b=3"]` and `["a=4,b=5"]`: `a=1 b=3`, `a=2 b=3` and `a=4 b=5`, as dicts."""
    axes = [[(name, value) for value in values.split(",")] for name, values in parse_assignments(grid).items()]
    return [dict(choice) for choice in itertools.product(*axes) if choice] + [
        parse_assignments(line.split(",")) for line in tries
    ]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--grid", action="append", default=[], metavar="NAME=VALUE,VALUE")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="NAME=VALUE,NAME=VALUE")
    parser.add_argument("--out", default="results/search.json")
    options = parser.parse_args(arguments)
    if not options.grid and not options.tries:
        parser.error("nothing to train: name values with --grid or --try")
    return options


def _train(run: str, profile: str, overrides: dict[str, str]) -> dict[str, Any]:
    import torch

    from finetune import machine, records
    from finetune.notebooks import run_cells
    from finetune.train.save import observed

    names = run_cells(METHODS[run].notebook, "newest_checkpoint(trainer)", PROFILE=profile, OVERRIDES=overrides)
    settings, trainer = names["settings"], names["trainer"]
    outcome, logged = {}, {}
    try:
        trainer.train()
    except UserError as error:
        # A learning rate that diverges is a result too.
        outcome = {"outcome": str(error)}
    for entry in trainer.state.log_history:
        logged |= entry
    result = {
        **outcome,
        "validation_accuracy": logged.get("eval_accuracy"),
        "validation_log_loss": logged.get("eval_log_loss"),
        "seconds": round(trainer.clock.seconds, 2),
        "steps": trainer.state.global_step,
        "peak_memory_bytes": machine.peak_memory()[0],
        "engine": settings.engine,
        "settings": settings.values | observed(trainer),
        "data": names["data"].reference.model_dump(),
        "environment": records.environment().model_dump(),
    }
    shutil.rmtree(settings.state_folder, ignore_errors=True)
    del names, trainer
    gc.collect()
    torch.cuda.empty_cache()
    return result


if __name__ == "__main__":
    sys.exit(main())
