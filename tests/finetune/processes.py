"""Processes that tests may kill, forked from one that has imported the libraries once: 12 s on two cores."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["finetune.train.trainer", "finetune.train.save", "finetune.compare.plots"])


def start(function: Callable, *arguments: object, home: Path, log: Path = Path(os.devnull)) -> multiprocessing.Process:
    """Call a function of a module that can be imported, with FINETUNE_HOME set; what it prints goes to `log`."""
    process = _FORKED.Process(target=_call, args=(function, arguments, str(home), log), daemon=True)
    process.start()
    return process


def _call(function: Callable, arguments: tuple, home: str, log: Path) -> None:
    os.environ["FINETUNE_HOME"] = home
    # Where the tests run under nohup, SIGHUP is ignored, and children inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # The garbage collector passes over what was imported, as in a kernel.
    gc.freeze()
    with log.open("w", buffering=1) as file, contextlib.redirect_stdout(file):
        function(*arguments)


def train(run: str, overrides: dict[str, object]) -> None:
    """Train as a notebook of the profile cpu does."""
    from finetune.notebooks import run_cells

    run_cells(f"fine_tuning_{run}", "plots.training_curves", PROFILE="cpu", OVERRIDES=overrides)


def train_beside_a_hungry_program(overrides: dict[str, object], group: Path) -> None:
    """Train in a control group, where in the second step all but 100 MB are taken; print how it ends."""
    from data_prep import UserError
    from finetune import machine
    from finetune.notebooks import run_cells
    from finetune.train.save import newest_checkpoint

    (group / "cgroup.procs").write_text(str(os.getpid()))
    os.environ["FINETUNE_MEMORY_FLOOR"] = "0.2"
    trainer = run_cells("fine_tuning_lora", "trainer.train(", PROFILE="cpu", OVERRIDES=overrides)["trainer"]
    loss_of, taken = trainer._loss, []

    def hungry(batch):
        if trainer.state.global_step == 1 and not taken:
            taken.append(b"x" * (machine.memory_left() - 100_000_000))
        return loss_of(batch)

    trainer._loss = hungry
    try:
        trainer.train(resume_from_checkpoint=newest_checkpoint(trainer))
    except UserError as error:
        print(error)


def prepare(overrides: dict[str, object]) -> None:
    """Prepare the data of a LoRA run."""
    from finetune import load_data, plan

    load_data(plan("lora", "cpu", overrides))


def own(folder: Path) -> None:
    """Have a folder until the process is killed."""
    from finetune import files

    files.own(folder)
    print("owned", flush=True)
    time.sleep(600)


def execute(code: str, folder: Path) -> None:
    """Execute code in a folder."""
    os.chdir(folder)
    exec(code, {})
