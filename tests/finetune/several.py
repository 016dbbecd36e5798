"""Trainings on several processes, forked from one that has imported the libraries; see `processes`."""

from __future__ import annotations

import json
import os
import signal
import socket
import traceback
from pathlib import Path

import processes
from transformers import TrainerCallback

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


class Ends(TrainerCallback):
    """Ends all processes after a step's checkpoint, or kills one of them after that; the next run goes on."""

    def __init__(self, step: int, killed: int | None = None):
        self.step, self.killed = step, killed

    def on_save(self, args, state, control, **_):
        if state.global_step == self.step and self.killed is None:
            os._exit(0)

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step + 1 and self.killed == args.process_index:
            os.kill(os.getpid(), signal.SIGKILL)


def ending(step: int, killed: int | None = None) -> dict[str, str]:
    """The edit of a training notebook that ends it after a step; 0: never."""
    return {"callbacks=[],": f"callbacks=[__import__('several').Ends({step}, {killed})],"}


def begin(
    run: str, overrides: dict, home: Path, count: int = 1, strategy: str = "ddp", edits: dict | None = None
) -> list:
    """Processes that run a notebook to its record, with the environment that `accelerate launch` gives them."""
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    common |= FSDP2 if strategy == "fsdp2" else {}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)] if count > 1 else [{}]
    return [
        processes.start(_one, environment, run, overrides, edits, home=home, log=home / f"rank-{rank}.log")
        for rank, environment in enumerate(ranks)
    ]


def _one(environment: dict[str, str], run: str, overrides: dict, edits: dict[str, str] | None) -> None:
    os.environ.update(environment)
    from accelerate import PartialState

    from finetune.notebooks import run_cells

    if environment:
        PartialState(cpu=True)

    name, end = f"fine_tuning_{run}", "plots.training_curves"
    if run.endswith("performance"):
        name, end = run, "class_table"
    try:
        run_cells(name, end, edits, PROFILE="cpu", OVERRIDES=overrides)
    except Exception:
        print(traceback.format_exc())
        # As `launch` does: the others would wait.
        os._exit(1)


def finish(run: str, overrides: dict, home: Path, **named) -> str:
    """Run a notebook on processes; what the first one prints."""
    started = begin(run, overrides, home, **named)
    for process in started:
        process.join(300)
    logs = [(home / f"rank-{rank}.log").read_text() for rank in range(len(started))]
    assert [process.exitcode for process in started] == [0] * len(started), "\n".join(logs)
    return logs[0]


def record(run: str, home: Path) -> dict:
    [file] = (home / "results").rglob(f"{run}/record.json")
    return json.loads(file.read_text())
