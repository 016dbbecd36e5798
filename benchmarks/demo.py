"""Where the minutes of `make demo` go: a table of its steps, from the records and notebooks that a finished run left.

    make demo && .venv/bin/python -m benchmarks.demo

Writes results/reference/demo/PROCESSOR.json. A step's rest is the start of its kernel, loading, checks, validation
rows, pictures and saving.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

import pandas as pd

from data_prep import UserError
from data_prep.files import replacing
from finetune import paths, records
from finetune.runner import STEPS

FOLDER = paths.PROJECT / "results" / "reference" / "demo"


def steps(profile: str) -> tuple[pd.DataFrame, records.RunRecord]:
    """The seconds of each part of each step, and the record of full fine-tuning: its environment and data are all's.

    Raises:
        DataError: The demo has not run to its end.
    """
    full, rows = records.read(paths.run_folder(profile, "full")), []
    for step in STEPS:
        stamp = paths.results_folder(profile) / "notebooks" / f".{step.name}.json"
        if not stamp.is_file():
            continue
        record, parts = records.read(paths.run_folder(profile, step.run)) if step.run else None, {}
        if step.kind == "train":
            parts = {"training": record.training.seconds}
        elif step.kind == "evaluate":
            scoring, writing = record.evaluation.seconds, record.evaluation.generation.seconds
            parts = {"scoring the test rows": scoring, "writing answers": writing}
        parts["rest"] = json.loads(stamp.read_text())["seconds"] - sum(parts.values())
        rows += [[step.name, part, seconds] for part, seconds in parts.items()]
    return pd.DataFrame(rows, columns=["step", "part", "seconds"]), full


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
    content = {
        # Of the demo, which ran before.
        "environment": full.evaluation.environment.model_dump(),
        "data": full.data.model_dump(),
        "dtype": full.evaluation.dtype,
        "seconds": round(table.seconds.sum(), 1),
        "steps": json.loads(table.round(3).to_json(orient="records")),
    }
    name = re.sub(r"[^a-z0-9]+", "-", str(content["environment"]["hardware"]["cpu"]).lower()).strip("-")
    with replacing(FOLDER / f"{name}.json") as file:
        file.write(json.dumps(content, indent=1) + "\n")
    print(f"{table.round(2).to_string(index=False)}\n{content['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
