"""The experiment: which sets of records a machine has, and the commands that make and publish them."""

import os
import subprocess

import pytest
import torch

from benchmarks import evidence
from finetune.compare import publish
from finetune.config.profiles import PROFILES
from finetune.model import smollm2

GPU = ["--profile", "gpu", "--set", "source=csv", "--set", "data_path=/data/ag_news"]


@pytest.fixture
def commands(home, monkeypatch) -> list[tuple[str, str]]:
    """What would have been executed: the set's name and the command's arguments."""
    done: list[tuple[str, str]] = []

    def run(command, env, **_):
        done.append((os.path.basename(env["FINETUNE_HOME"]), " ".join(command[3:])))
        assert env["FINETUNE_COMMAND"] == "python -m finetune " + done[-1][1]
        fails = "--only qlora" in done[-1][1] and "all" in done[-1][0]
        return subprocess.CompletedProcess(command, int(fails))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(evidence, "HOME", home / "results" / "evidence")
    monkeypatch.setattr(publish, "copy", lambda results, name: done.append((name, f"copied {results.name}")))
    monkeypatch.setattr(publish, "regenerate", lambda: done.append(("", "renewed")))
    smollm2.folder().mkdir(parents=True)
    return done


def test_with_a_gpu_each_set_changes_one_thing(commands, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(PROFILES["gpu"].shared, "article_loss", 0.5)
    assert evidence.main([*GPU, "--publish"]) == 1
    common = "--profile gpu --set source=csv --set data_path=/data/ag_news"
    runs = "--only base --only full --only lora --only qlora"
    all_runs = "--only full --only full_unsloth --only lora --only qlora"
    assert commands == [
        ("gpu", f"run {common} --only base {all_runs} --seeds 3"),
        ("gpu", f"curve {common} --only svm {all_runs} --rows 250 --rows 1000 --rows 4000"),
        ("gpu", f"merge lora {common}"),
        ("gpu", f"merge qlora {common}"),
        ("gpu-answer", f"run {common} --set article_loss=0.0 {runs} --seeds 3"),
        ("gpu-answer-all", f"run {common} --set article_loss=0.0 --set completion_only_loss=False {runs} --seeds 3"),
        ("gpu-verbose", f"run {common} --set prompt=verbose {runs} --seeds 3"),
        (
            "gpu-transformers",
            f"run {common} --set engine=transformers --only base --only lora --only qlora --seeds 3",
        ),
        *((name, "copied gpu") for name in ("gpu", "gpu-answer", "gpu-verbose", "gpu-transformers")),
        ("", "renewed"),
    ]
    assert "gpu-answer-all is not whole" in capsys.readouterr().err


def test_a_set_that_changes_nothing_here_is_skipped(commands, capsys):
    evidence.main(["--profile", "cpu"])
    assert {name for name, _ in commands} == {"cpu", "cpu-answer-all", "cpu-verbose"}
    printed = capsys.readouterr().out
    assert "skipped cpu-answer: {'article_loss': 0.0} is what cpu does here" in printed
    assert "skipped cpu-transformers: {'engine': 'transformers'} is what cpu does here" in printed


def test_each_set_finds_the_embedded_model(commands, home):
    evidence.main(["--profile", "cpu", "--seeds", "1"])
    assert (home / "results/evidence/cpu/checkpoints" / smollm2.NAME).resolve() == smollm2.folder().resolve()


def test_a_wrong_parameter_is_refused_before_anything_runs(commands, capsys):
    assert evidence.main(["--profile", "cpu", "--set", "lr=1"]) == 2
    assert commands == []
    assert "unknown parameter 'lr'" in capsys.readouterr().err


def test_after_ctrl_c_nothing_more_begins(commands, monkeypatch, capsys):
    def interrupted(command, **_):
        commands.append(("", " ".join(command[3:])))
        return subprocess.CompletedProcess(command, 130)

    monkeypatch.setattr(subprocess, "run", interrupted)
    assert evidence.main(["--profile", "cpu", "--publish"]) == 130
    assert len(commands) == 1
    assert capsys.readouterr().err == "\ninterrupted; the same command goes on from here\n"
