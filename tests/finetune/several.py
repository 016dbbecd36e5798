"""Trainings on several processes, forked from one that has imported the libraries; see `processes`."""

from __future__ import annotations

import json
import os
import socket
import traceback
from pathlib import Path

import processes

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def begin(run: str, overrides: dict, home: Path, count: int = 2, strategy: str = "ddp", **edits: str) -> list:
    """Processes that run a notebook to its record, with the environment that `accelerate launch` gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    common |= FSDP2 if strategy == "fsdp2" else {}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)] if count > 1 else [{}]
    return [
        processes.start(one, environment, run, overrides, edits, home=home, log=home / f"rank-{rank}.log")
        for rank, environment in enumerate(ranks)
    ]


def one(environment: dict[str, str], run: str, overrides: dict, edits: dict[str, str]) -> None:
    os.environ.update(environment)
    from finetune.notebooks import run_cells

    name = f"fine_tuning_{run}" if not run.endswith("performance") else run
    end = "plots.training_curves" if name == f"fine_tuning_{run}" else "class_table"
    try:
        run_cells(name, end, edits, PROFILE="cpu", OVERRIDES=overrides)
    except Exception:
        print(traceback.format_exc())
        # As `launch` does: the others would wait.
        os._exit(1)


def train(run: str, overrides: dict, home: Path, **named) -> dict:
    """A run's record from several processes."""
    started = begin(run, overrides, home, **named)
    for process in started:
        process.join(120)
    codes = [process.exitcode for process in started]
    assert codes == [0] * len(codes), "\n".join((home / f"rank-{rank}.log").read_text() for rank in range(len(codes)))
    [record] = (home / "results").rglob(f"{run}/record.json")
    return json.loads(record.read_text())
