"""Tasks and models beside each other: every folder has its own name, and the defaults keep theirs."""

import random
from pathlib import Path

import made_up
import pandas as pd
import pytest

from data_prep import UserError
from data_prep.files import load_manifest
from finetune import find_run, paths, records
from finetune.__main__ import main
from finetune.compare import comparison
from finetune.config.plan import plan
from finetune.config.profiles import place
from finetune.data import load_data
from finetune.evaluate import baselines
from finetune.new import new
from finetune.notebooks import run_cells
from finetune.runner import Suite


def write_table(home: Path, name: str, labels: list[str]) -> None:
    generator = random.Random(name)
    rows = [" ".join(generator.choices(["lamp", "river", "ticket", "garden"], k=9)) + f" {n}" for n in range(90)]
    pd.DataFrame({"text": rows, "label": (labels * 90)[:90]}).to_csv(home / f"{name}.csv", index=False)
    new(str(home / f"{name}.csv"))


def test_the_defaults_have_the_folders_that_they_always_had(home):
    settings = plan("lora", "cpu")
    assert settings.place == "cpu" and plan("lora", "gpu").place == "gpu"
    assert plan("lora", "spark", {"model": "unsloth/Qwen2.5-7B-Instruct"}).place == "spark"
    assert settings.run_folder == home / "results/cpu/lora" and settings.artefact_folder == home / "adapters/cpu-lora"
    assert settings.state_folder == home / "checkpoints/.training/cpu-lora"
    assert paths.dataset_folder("sample", "cpu") == paths.dataset_folder("sample", "gpu") == home / "datasets/sample"


def test_no_two_tasks_and_models_share_a_place(tmp_path):
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "b" / "model").mkdir(parents=True)
    folders = [str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model")]
    models = ["embedded", "Qwen/Qwen2.5-0.5B", "other/Qwen2.5-0.5B", *folders]
    places = [place("cpu", task, model) for task in ("ag_news", "tickets", "tickets-2") for model in models]
    assert len(set(places)) == len(places) and places[0] == "cpu"
    assert place("cpu", "tickets", "Qwen/Qwen2.5-0.5B") == "cpu+tickets+Qwen--Qwen2.5-0.5B"
    assert not [name for name in places if "/" in name or " " in name]


def test_two_tasks_are_prepared_fitted_and_found_beside_each_other(home, tiny_model, monkeypatch):
    write_table(home, "lamps", ["on", "off"])
    write_table(home, "rivers", ["wide", "deep", "long"])
    for name in ("lamps", "rivers"):
        settings = plan("base", "cpu", {"model": str(tiny_model)}, name)
        data = load_data(settings)
        baselines.fit_svm(settings, data)
        assert load_manifest(data.folder).task == name
    assert len({path.name for path in (home / "datasets").iterdir() if path.is_dir()}) == 2
    assert len(list((home / "results").glob("cpu+*/baselines/svm/record.json"))) == 2
    monkeypatch.setenv("FINETUNE_TASK", "rivers")
    assert plan("base", "cpu").task.labels == ("deep", "long", "wide")
    # A name in the notebook, or on the command line, wins over the environment.
    assert plan("base", "cpu", {}, "lamps").task.name == plan("base", "cpu", {"task": "lamps"}).task.name == "lamps"


def test_the_command_line_takes_a_task_and_the_suite_tells_the_notebooks(home, tiny_model, capsys):
    write_table(home, "lamps", ["on", "off"])
    assert main(["data", "--profile", "cpu", "--task", "lamps", "--set", f"model={tiny_model}"]) == 0
    printed = capsys.readouterr().out
    assert "18 test rows can show no difference" in printed and "off" in printed
    assert main(["plan", "lora", "--profile", "cpu", "--task", "lamps"]) == 0
    assert "task lamps" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "--task", "lumps"]) == 2
    assert "unknown task 'lumps'; the tasks are: ag_news, lamps" in capsys.readouterr().err
    suite = Suite("cpu", {"task": "lamps", "model": str(tiny_model)}, only=("lora", "compare"))
    assert suite.folder == paths.results_folder(place("cpu", "lamps", str(tiny_model))) / "notebooks"
    given = [suite._given(step)["OVERRIDES"] for step in suite.steps]
    assert given == [{"task": "lamps", "model": str(tiny_model)}] * 3


@pytest.mark.parametrize("name", made_up.TASKS)
def test_a_user_s_task_is_trained_evaluated_and_compared(home, tiny_model, name):
    """From a file to the verdict's table, as the notebooks do it."""
    write, labels = made_up.TASKS[name]
    new(str(write(home)))
    given = {"model": str(tiny_model)}
    few = {"generation_rows": 4, "train_rows": 16, "eval_steps": 0.9}
    judged = given | {"generation_rows": 4}
    its = {"PROFILE": "cpu", "TASK": name}
    run_cells("base_model_performance", "class_table", **its, OVERRIDES=judged | {"train_rows": 16})
    trained = run_cells("fine_tuning_lora", "plots.training_curves", **its, OVERRIDES=given | few)["record"]
    record = run_cells("lora_finetuning_performance", "class_table", **its, OVERRIDES=judged)["record"]
    assert record.training.artefact_digest == trained.training.artefact_digest
    assert tuple(record.evaluation.scoring.classes) == labels and record.data.task == name
    names = run_cells("compare_methods", "plots.overview", **its, OVERRIDES=given)
    assert set(names["compared"].records) == {"base", "lora"} and names["decision"].text
    assert str(comparison.against_base(record)) == str(names["compared"].pair("lora", "base"))
    assert not (home / "results" / "cpu").exists() and records.read(names["settings"].run_folder).run == "base"


@pytest.mark.parametrize("task", ["ag_news", "lamps"])
def test_an_evaluation_of_another_model_says_what_is_missing(home, task, tiny_model):
    write_table(home, "lamps", ["on", "off"])
    with pytest.raises(UserError, match=r"there is no lora model of cpu\+.* yet: run fine_tuning_lora"):
        find_run("lora", "cpu", {"model": str(tiny_model)}, task)
