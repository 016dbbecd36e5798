"""Search hyper-parameters on validation rows: train every combination of a grid, and never look at a test row.

    python -m benchmarks.search full --profile gpu --set source=csv --set data_path=FOLDER \\
        --grid learning_rate=5e-5,1e-4 --grid weights=bfloat16,float32 --try learning_rate=1e-3,epochs=3 \\
        --out results/search-full.json

Writes one line of JSON per training, with its settings, final validation accuracy and log loss, seconds and peak
memory. Nothing is saved of the models.
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
from data_prep.store import replacing
from finetune import paths, plan_training
from finetune.settings import Settings, parse_assignments


def main() -> None:
    """Train the grid, and write each result as soon as it is known."""
    options = _options()
    os.environ["FINETUNE_COMMAND"] = shlex.join(["python", "-m", "benchmarks.search", *sys.argv[1:]])
    results: list[dict[str, Any]] = []
    for combination in (combinations(options.grid) if options.grid else []) + tries(options.tries):
        wanted = {"saves": 0} | parse_assignments(options.assignments) | combination
        settings = plan_training(options.run, options.profile, wanted)
        results.append({"run": options.run, **combination, **_train(settings)})
        print(json.dumps({key: value for key, value in results[-1].items() if key != "environment"}), flush=True)
        with replacing(Path(options.out)) as file:
            file.writelines(json.dumps(result) + "\n" for result in results)


def combinations(grid: list[str]) -> list[dict[str, str]]:
    """`["a=1,2", "b=3"]` as `[{"a": "1", "b": "3"}, {"a": "2", "b": "3"}]`."""
    axes = [[(name, value) for value in values.split(",")] for name, values in parse_assignments(grid).items()]
    return [dict(choice) for choice in itertools.product(*axes)]


def tries(lines: list[str]) -> list[dict[str, str]]:
    """`["a=1,b=3"]` as `[{"a": "1", "b": "3"}]`."""
    return [parse_assignments(line.split(",")) for line in lines]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--grid", action="append", default=[], metavar="NAME=VALUE,VALUE")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="NAME=VALUE,NAME=VALUE")
    parser.add_argument("--out", default="results/search.json")
    return parser.parse_args()


def _train(settings: Settings) -> dict[str, Any]:
    from finetune import hardware, records
    from finetune.data import prepare_data
    from finetune.training import prepare_training

    data = prepare_data(settings)
    session = prepare_training(settings, data)
    hardware.reset_peak_memory()
    try:
        session.trainer.train()
        outcome = {}
    except UserError as error:
        # A learning rate that diverges is a result too.
        outcome = {"outcome": str(error)}
    logged: dict[str, Any] = {}
    for entry in session.trainer.state.log_history:
        logged |= entry
    result = {
        **outcome,
        "validation_accuracy": logged.get("validation_accuracy"),
        "validation_log_loss": logged.get("validation_log_loss"),
        "seconds": round(session.clock.seconds, 2),
        "steps": session.trainer.state.global_step,
        "peak_memory_bytes": hardware.peak_memory()[0],
        "engine": settings.engine,
        "settings": settings.values,
        "data": data.reference.model_dump(),
        "environment": records.environment().model_dump(),
    }
    shutil.rmtree(paths.state_folder(settings.profile, settings.run), ignore_errors=True)
    del session
    _release()
    return result


def _release() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
