"""Surroundings that are not as on the developer's machine: each works, or ends in one sentence."""

import contextlib
import errno
import fcntl
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import matplotlib
import pytest
from transformers import TrainerState

from data_prep import UserError, find_task
from finetune import files, paths, records
from finetune.__main__ import main
from finetune.config.plan import plan
from finetune.config.profiles import place
from finetune.runner import Suite
from finetune.train.callbacks import Clock
from finetune.train.portions import Portions


def test_a_foreign_machine_runs_a_notebook(tiny_model, tmp_path):
    """All at once: no account and no HOME, a checkout that may not be written, ASCII, files for their owner alone,
    another repository in GIT_DIR, another Python's `python3` kernel, and a TMPDIR too long for a socket."""
    (tmp_path / "kernels" / "kernels" / "python3").mkdir(parents=True)
    kernel = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (tmp_path / "kernels" / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel))
    subprocess.run(["git", "init", "--quiet", tmp_path / "other"], check=True)
    long = tmp_path / ("x" * 120)
    long.mkdir()
    isolated = ["unshare", "--mount", "bash", "-c"]
    script = f"""
umask 077
mount --bind '{paths.PROJECT}' '{paths.PROJECT}' && mount -o remount,bind,ro '{paths.PROJECT}' || exit 99
exec unshare --user --map-user=12345 --map-group=12345 "$@"
"""
    values = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(paths.PROJECT),
        "FINETUNE_HOME": f"{tmp_path}/out",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # Its list of fonts takes seconds to make.
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
        "LC_ALL": "C",
        # Python would take UTF-8 in its place.
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "GIT_DIR": f"{tmp_path}/other/.git",
        "TMPDIR": str(long),
        "JUPYTER_PATH": f"{tmp_path}/kernels",
    }
    tried = subprocess.run([*isolated, script, "bash", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no read-only checkout and no other user can be made here: {tried.stderr.strip()}")
    # The model's folder is named as seen from here, and the notebook works elsewhere.
    given = {"model": tiny_model.name, "train_rows": 32, "test_rows": 24, "generation_rows": 2, "few_shot_examples": 1}
    command = [sys.executable, "-m", "finetune", "run", "--profile", "cpu", "--only", "base"]
    command += [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    done = subprocess.run(
        [*isolated, script, "bash", *command], cwd=tiny_model.parent, env=values, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out" / "results" / place("cpu", "ag_news", str(tiny_model)) / "base"
    head = subprocess.run(["git", "-C", paths.PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert records.read(folder).evaluation.environment.commit == head.stdout.strip()
    assert (folder / "record.json").stat().st_mode & 0o077 == 0
    assert not list(long.glob("finetune-*")), "sockets lie elsewhere"


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small file system in a folder; the test is skipped where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size=1m,{options}", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def refusal(capsys, tiny_model) -> str:
    """The sentence that preparing the data ends in."""
    assert main(["data", "--profile", "cpu", "--set", f"model={tiny_model}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("options", "reason"), [("ro", "read-only; set FINETUNE_HOME"), ("nr_inodes=4", "no inodes (df -h, df -i)")]
)
def test_a_home_that_takes_no_files_is_named(home, monkeypatch, tiny_model, capsys, options, reason):
    monkeypatch.setenv("FINETUNE_HOME", str(home / "full"))
    with mounted(home / "full", options):
        said = refusal(capsys, tiny_model)
    assert reason in said and f"{home}/full/datasets" in said


@pytest.mark.parametrize(("number", "reason"), [(errno.EDQUOT, "quota"), (errno.EACCES, "you may not write there")])
def test_what_an_operating_system_refuses_is_said(home, monkeypatch, tiny_model, capsys, number, reason):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    assert reason in refusal(capsys, tiny_model)
    with pytest.raises(UserError, match=reason), files.replacing_folder(home / "artefact") as beside:
        (beside / "weights").touch()
    assert not list(home.glob("*artefact*"))
    # A source that may not be read meanwhile is another matter.
    with pytest.raises(OSError, match=r"data.train"), files.replacing_folder(home / "artefact"):
        raise OSError(number, os.strerror(number), "/data/train.csv")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.filterwarnings("ignore:.*flock")
def test_without_file_locks_a_file_stands_for_each(home, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.locked(home / "data", "never printed"):
        lock = next(home.glob(".data*lock"), None)
        assert lock, "where locks are, or where filelock puts its own"
        path = lock if number == errno.ENOSYS else home / ".data.soft.lock"
        with pytest.raises(filelock.Timeout):
            filelock.SoftFileLock(path).acquire(blocking=False)
    files.own(home / "training")
    files.disown(home / "training")


def test_relative_places_mean_the_same_in_every_working_folder(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", "outputs/mine")
    (tmp_path / "rows").mkdir()
    for folder in (tmp_path, tiny_model.parent):
        monkeypatch.chdir(folder)
        assert paths.home() == paths.PROJECT / "outputs" / "mine"
        with pytest.raises(UserError, match="unknown task 'none'"):
            find_task("none")
    given = {"model": tiny_model.name, "data_path": os.path.relpath(tmp_path / "rows"), "source": "csv"}
    settings = plan("base", "cpu", given)
    assert (settings.experiment.model, settings.experiment.data_path) == (str(tiny_model), f"{tmp_path}/rows")
    suite = Suite("cpu", given, only=("base",))
    assert suite._given(suite.steps[0])["OVERRIDES"]["data_path"] == f"{tmp_path}/rows"
    # What is no folder here is a name on the hub; the embedded model is none.
    (tiny_model.parent / "embedded").mkdir(exist_ok=True)
    for name in ("embedded", "Qwen/Qwen2.5-0.5B"):
        assert plan("base", "cpu", {"model": name}).experiment.model == name
    monkeypatch.setenv("FINETUNE_HOME", "~/outputs")
    assert paths.home() == Path.home() / "outputs"


def test_a_clock_that_is_set_back_stops_no_report(tmp_path, monkeypatch):
    clock, now = Clock(Portions(None, [])), time.time()
    monkeypatch.setattr("finetune.train.callbacks.SECONDS_BETWEEN_REPORTS", 0)
    clock.go_on()
    for step, wall in enumerate((now, now - 3600), start=1):
        monkeypatch.setattr(time, "time", lambda wall=wall: wall)
        arguments = SimpleNamespace(output_dir=str(tmp_path / "cpu-lora"))
        clock.on_step_end(arguments, TrainerState(global_step=step, max_steps=10), None)
        progress = json.loads((tmp_path / "cpu-lora" / "progress.json").read_text())
        assert progress["step"] == step and progress["seconds_left"] >= 0


def test_an_encoding_without_umlauts_gets_something_else_for_them(home, monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", written)
    assert main(["data", "--task", "Müller"]) == 2
    written.flush()
    assert b"unknown task 'M?ller'" in written.buffer.getvalue()
