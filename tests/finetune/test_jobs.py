"""The suite with several steps at once: what may run beside what, and what is left when one fails or is interrupted.

Most tests execute stand-ins for the notebooks, which import nothing and tell in a log when they begin and end.
"""

import os
import signal
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import nbformat
import pytest
from jupyter_client import AsyncKernelClient
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import load_file

from finetune import paths, plan, records, suite
from finetune.__main__ import main
from finetune.data import prepare_data
from finetune.kernels import Interrupted, Kernels
from finetune.performance import evaluate
from finetune.suite import STEPS, Suite
from finetune.training import prepare_training

METADATA = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
BEGINNING = """
import os, time
from pathlib import Path

log = Path({log!r})
name = {notebook!r} + ("_" + OVERRIDES["variant"] if "variant" in OVERRIDES else "")

def say(word):
    with log.open("a") as file:
        file.write(word + " " + name + "\\n")

def wait_until(is_so):
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)

say("begin")
"""
RUN_STAND_INS = """
import sys
from pathlib import Path
from finetune import suite
from finetune.__main__ import main

suite.NOTEBOOKS = Path(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


class StandIns(Protocol):
    def __call__(self, **bodies: str) -> Path: ...


@pytest.fixture
def stand_ins(home, monkeypatch) -> StandIns:
    """Puts notebooks of a few lines in place of all; `bodies` are what single ones do. Returns the log's path."""
    folder, log = home / "stand-ins", home / "log"
    folder.mkdir()
    monkeypatch.setattr(suite, "NOTEBOOKS", folder)

    def make(**bodies: str) -> Path:
        for notebook in {step.notebook for step in STEPS}:
            parameters = new_code_cell("OVERRIDES = {}", metadata={"tags": ["parameters"]})
            beginning = new_code_cell(BEGINNING.format(log=str(log), notebook=notebook))
            cells = [parameters, beginning, new_code_cell(bodies.get(notebook, "")), new_code_cell('say("end")')]
            nbformat.write(new_notebook(cells=cells, metadata=METADATA), folder / f"{notebook}.ipynb")
        return log

    return make


def said(log: Path) -> list[str]:
    return log.read_text().splitlines()


def test_with_one_job_each_step_begins_when_the_one_before_it_has_ended(stand_ins, home):
    log = stand_ins()
    steps = Suite("cpu", only=("base", "lora", "compare"), seeds=2)
    assert {outcome.status for outcome in steps.execute()} == {"done"}
    assert said(log) == [f"{word} {step.name}" for step in steps.steps for word in ("begin", "end")]


def test_what_needs_nothing_of_each_other_runs_at_once_and_the_rest_waits(stand_ins, capsys):
    # A training ends when three steps have begun, the base when all trainings have ended.
    meet = 'wait_until(lambda: log.read_text().count("begin") >= 3)'
    last = 'wait_until(lambda: log.read_text().count("end fine_tuning") == 4)'
    log = stand_ins(base_model_performance=last, fine_tuning_lora=meet, fine_tuning_qlora=meet)
    steps = Suite("cpu", only=("base", "lora", "qlora", "compare"), seeds=2, jobs=3)
    outcomes = steps.execute()
    assert {outcome.step.name: outcome.status for outcome in outcomes} == {step.name: "done" for step in steps.steps}
    lines = said(log)
    assert max(accumulate(1 if line.startswith("begin") else -1 for line in lines)) == 3
    for run in ("lora", "qlora"):
        for variant in ("", "_seed-43"):
            begin = lines.index(f"begin {run}_finetuning_performance{variant}")
            assert lines.index(f"end fine_tuning_{run}{variant}") < begin
            assert lines.index("end base_model_performance") < begin
    assert lines[-2:] == ["begin compare_methods", "end compare_methods"]
    assert "Up to 3 steps at once on the CPU, for want of a GPU" in capsys.readouterr().out


def test_each_kernel_has_a_gpu_a_lock_for_it_and_a_compile_folder_of_its_own(stand_ins, monkeypatch):
    monkeypatch.setattr("finetune.hardware.visible_gpus", lambda: ("3", "1"))
    monkeypatch.setattr("os.cpu_count", lambda: 10)
    tell = """
assert os.environ["OMP_NUM_THREADS"] == os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"
assert Path(os.environ["UNSLOTH_COMPILE_LOCATION"]).is_dir()
names = ("CUDA_VISIBLE_DEVICES", "FINETUNE_TURNS", "UNSLOTH_COMPILE_LOCATION")
say("|".join(os.environ[name] for name in names) + "|")
wait_until(lambda: log.read_text().count("unsloth-") == 3)
"""
    log = stand_ins(base_model_performance=tell, fine_tuning_full=tell, fine_tuning_lora=tell)
    runs = Suite("cpu", only=("base", "full", "lora"), jobs=3)
    runs.steps = tuple(step for step in runs.steps if not step.needs)
    assert [outcome.status for outcome in runs.execute()] == ["done"] * 3
    gpus, locks, folders, _ = zip(*(line.split("|") for line in said(log) if "|" in line), strict=True)
    assert sorted(gpus) == ["1", "3", "3"]
    assert [Path(lock).name for lock in locks] == [f"GPU {gpu}" for gpu in gpus]
    assert len(set(locks)) == 2 and len(set(folders)) == 3
    assert not any(Path(folder).exists() for folder in folders), "left behind"


@pytest.mark.parametrize("jobs", [1, 2])
def test_after_a_failure_what_needs_it_is_skipped_and_the_rest_goes_on(stand_ins, home, capsys, jobs):
    log = stand_ins(fine_tuning_lora='raise ValueError("no luck")')
    arguments = ["run", "--profile", "cpu", "--jobs", str(jobs)]
    arguments += [part for run in ("base", "lora", "qlora", "compare") for part in ("--only", run)]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "fine_tuning_lora failed, and what needs it was skipped" in printed.err
    assert "failed             fine_tuning_lora: ValueError: no luck" in printed.out
    for skipped in ("lora_finetuning_performance", "compare_methods"):
        assert f"skipped            {skipped}: fine_tuning_lora failed" in printed.out
    ended = {line.split()[1] for line in said(log) if line.startswith("end")}
    assert ended == {"base_model_performance", "fine_tuning_qlora", "qlora_finetuning_performance"}
    notebooks = home / "results" / "cpu" / "notebooks"
    assert {path.name for path in notebooks.iterdir()} == {
        *(f"{name}.ipynb" for name in (*ended, "fine_tuning_lora")),
        *(f".{name}.json" for name in ended),
    }


def test_a_kernel_that_does_not_start_fails_its_step_alone(stand_ins, monkeypatch, capsys):
    log = stand_ins()
    ready = AsyncKernelClient.wait_for_ready

    async def never(self, timeout=None):
        monkeypatch.setattr(AsyncKernelClient, "wait_for_ready", ready)
        raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(AsyncKernelClient, "wait_for_ready", never)
    assert main(["run", "--profile", "cpu", "--only", "lora", "--only", "qlora"]) == 1
    assert "its kernel died, or did not start" in capsys.readouterr().out
    assert len([line for line in said(log) if line.startswith("end fine_tuning")]) == 1


def test_without_the_base_nothing_is_evaluated(stand_ins, capsys):
    log = stand_ins(base_model_performance='raise ValueError("no luck")')
    assert main(["run", "--profile", "cpu", "--only", "base", "--only", "lora"]) == 1
    assert "skipped            lora_finetuning_performance: base_model_performance failed" in capsys.readouterr().out
    assert said(log)[-1] == "end fine_tuning_lora"


def test_ctrl_c_interrupts_every_cell_that_runs(stand_ins, home):
    wait_for_it = """
say(f"process {os.getpid()} of")
try:
    time.sleep(120)
except KeyboardInterrupt:
    say("interrupted")
    raise
"""
    log = stand_ins(base_model_performance=wait_for_it, fine_tuning_lora=wait_for_it)
    command = [sys.executable, "-c", RUN_STAND_INS, str(home / "stand-ins"), "run", "--profile", "cpu"]
    command += ["--only", "base", "--only", "lora", "--jobs", "2"]
    process = subprocess.Popen(
        command, cwd=paths.PROJECT, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count("process") < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    # On a busy machine interrupts get lost, and are repeated only every ten seconds.
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors == "\ninterrupted; the same command goes on from here\n"
    lines = said(log)
    assert sorted(line for line in lines if line.startswith(("interrupted", "end"))) == [
        "interrupted base_model_performance",
        "interrupted fine_tuning_lora",
    ]
    for kernel in [int(line.split()[1]) for line in lines if line.startswith("process")]:
        with pytest.raises(ProcessLookupError):
            os.kill(kernel, 0)
    assert not list(home.rglob("*.partial"))


def test_ctrl_c_between_two_cells_is_not_lost(stand_ins):
    """A kernel without a cell to execute ignores an interrupt: its notebook must not go on."""
    log = stand_ins()
    steps = Suite("cpu", only=("base",), jobs=2)
    with Kernels(2) as kernels:
        kernels.interrupt()
        with pytest.raises(Interrupted):
            steps._execute(steps.steps[0], kernels, suite._Progress({}, "cpu", 2))
    assert not log.exists()


def test_trainings_at_once_give_what_they_give_one_after_the_other(tiny, home, monkeypatch):
    """Real notebooks: the base model, and LoRA with two seeds, against the same in this process."""
    overrides = tiny | {"learning_rate": 3e-3}
    beside, alone = home / "beside", home / "alone"
    monkeypatch.setenv("FINETUNE_HOME", str(beside))
    outcomes = Suite("cpu", overrides, only=("base", "lora"), seeds=2, jobs=3).execute()
    assert [str(outcome) for outcome in outcomes if outcome.status != "done"] == []
    monkeypatch.setenv("FINETUNE_HOME", str(alone))
    for variant in ({}, {"seed": 43, "variant": "seed-43"}):
        settings = plan("lora", "cpu", overrides | variant)
        data = prepare_data(settings)
        prepare_training(settings, data).run()
        evaluate(settings, data, "fine_tuning_lora.ipynb")
    base = plan("base", "cpu", {name: tiny[name] for name in ("model", "train_rows", "test_rows", "generation_rows")})
    evaluate(base, prepare_data(base))
    for run in ("base", "lora", "lora/seed-43"):
        assert _result(beside, run) == _result(alone, run), run
    for artefact in ("cpu-lora", "cpu-lora-seed-43"):
        file = Path("adapters", artefact, "adapter_model.safetensors")
        first, second = load_file(beside / file), load_file(alone / file)
        assert all(first[name].equal(second[name]) for name in first | second)


def _result(home: Path, run: str) -> list:
    """What must not depend on how a run was made: all but times, memory and places."""
    folder = home / "results" / "cpu" / run
    record = records.read(folder)
    history = record.training.history if record.training else []
    return [
        record.settings,
        record.data,
        record.evaluation.scoring,
        record.evaluation.predictions_digest,
        record.evaluation.validation_digest,
        (folder / "predictions.jsonl").read_text(),
        [point.model_copy(update={"training_seconds": None}) for point in history],
    ]
