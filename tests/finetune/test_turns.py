"""Turns on a device: one measurement at a time among processes, and which parts of a run are one."""

import os
import subprocess
import sys
from functools import wraps
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from sklearn.svm import LinearSVC

from finetune import baselines, evaluation, plan, turns
from finetune.data import prepare_data
from finetune.performance import evaluate
from finetune.training import prepare_training

PROCESSES, ROUNDS = 3, 4
MEASURE = """
import sys, time
from pathlib import Path
from finetune import turns

log, name, rounds, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def say(word):
    with log.open("a") as file:
        file.write(f"{word} {name}\\n")

say("here")
while log.read_text().count("here") < processes:
    time.sleep(0.01)
for _ in range(rounds):
    with turns.alone():
        say("begin")
        time.sleep(0.02)
        say("end")
"""


@pytest.fixture
def device(tmp_path, monkeypatch) -> Path:
    """A device that the suite shares out."""
    monkeypatch.setenv(turns.VARIABLE, str(tmp_path / "GPU 0"))
    return tmp_path / "GPU 0"


def is_taken(device: Path) -> bool:
    lock = FileLock(device.with_name(f".{device.name}.lock"))
    try:
        with lock.acquire(blocking=False):
            return False
    except Timeout:
        return True


def test_no_two_processes_measure_on_one_device_at_once(device, tmp_path):
    log = tmp_path / "log"
    processes = [
        subprocess.Popen([sys.executable, "-c", MEASURE, str(log), str(number), str(ROUNDS), str(PROCESSES)])
        for number in range(PROCESSES)
    ]
    assert [process.wait(120) for process in processes] == [0] * PROCESSES
    lines = [line for line in log.read_text().splitlines() if not line.startswith("here")]
    assert len(lines) == 2 * PROCESSES * ROUNDS
    for begin, end in zip(lines[::2], lines[1::2], strict=True):
        assert begin.split() == ["begin", end.split()[1]] and end.startswith("end")


def test_devices_do_not_wait_for_each_other(device, monkeypatch, capsys):
    with turns.alone():
        monkeypatch.setenv(turns.VARIABLE, str(device.with_name("GPU 1")))
        with turns.alone():
            assert is_taken(device) and is_taken(device.with_name("GPU 1"))
    assert not is_taken(device) and capsys.readouterr().out == ""


def test_of_the_long_turns_one_at_a_time_waits_for_the_device(device):
    with turns.alone(is_long=True):
        assert is_taken(device) and is_taken(device.with_name("GPU 0 long"))
    with turns.alone():
        assert is_taken(device) and not is_taken(device.with_name("GPU 0 long"))


def test_without_the_suite_nothing_is_locked(tmp_path, monkeypatch):
    monkeypatch.delenv(turns.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with turns.alone():
        assert os.listdir() == []


def test_all_that_is_timed_or_keeps_the_device_busy_is_a_turn(tiny, device, monkeypatch):
    taken: dict[str, list[bool]] = {}

    def watch(owner, name: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def watched(*arguments, **named):
            taken.setdefault(name, []).append(is_taken(device))
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((evaluation.LabelScorer, "score"), (evaluation, "generate"), (LinearSVC, "fit")):
        watch(owner, name)
    settings = plan("lora", "cpu", tiny)
    data = prepare_data(settings)
    session = prepare_training(settings, data)
    watch(session.trainer, "train")
    session.run()
    evaluate(settings, data, "fine_tuning_lora.ipynb")
    baselines.evaluate(plan("base", "cpu", {name: tiny[name] for name in ("model", "train_rows", "test_rows")}), data)
    # Three validations of the training, the test and the validation rows, and the test rows behind examples.
    assert {name: len(times) for name, times in taken.items()} == {"train": 1, "score": 6, "generate": 1, "fit": 1}
    assert all(all(times) for times in taken.values()), taken
    assert not is_taken(device)
