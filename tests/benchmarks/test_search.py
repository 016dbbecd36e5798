"""The search trains what it was asked for, and refuses a wrong value before the first training."""

import json

import pytest

from benchmarks import search
from finetune import plan


@pytest.fixture
def trained(home, monkeypatch) -> list:
    """The plans that would have been trained."""
    plans = []
    monkeypatch.setenv("FINETUNE_COMMAND", "restored after the test")

    def train(run, profile, overrides):
        plans.append(plan(run, profile, overrides))
        return {"validation_accuracy": 0.9}

    monkeypatch.setattr(search, "_train", train)
    return plans


def test_a_grid_is_every_combination_and_tries_come_behind_it():
    found = search.combinations(["a=1,2", "b=3,4"], ["a=5,b=6"])
    assert [" ".join(of.values()) for of in found] == ["1 3", "1 4", "2 3", "2 4", "5 6"]
    assert search.combinations([], []) == []


def test_each_combination_is_trained_and_written(trained, tmp_path):
    out = tmp_path / "search.json"
    grid = ["--grid", "learning_rate=1e-4,1e-3", "--try", "learning_rate=1e-2,num_train_epochs=2"]
    assert search.main(["lora", "--profile", "cpu", *grid, "--out", str(out)]) == 0
    recipes = [settings.recipe for settings in trained]
    assert [recipe.learning_rate for recipe in recipes] == [1e-4, 1e-3, 1e-2]
    assert [recipe.num_train_epochs for recipe in recipes] == [1, 1, 2]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == ["1e-4", "1e-3", "1e-2"]
    assert list(lines[0]) == ["run", "learning_rate", "validation_accuracy"]


def test_a_wrong_value_is_refused_before_anything_is_trained(trained, capsys):
    assert search.main(["lora", "--profile", "cpu", "--grid", "learning_rate=1e-4", "--try", "lr=1"]) == 2
    assert "unknown parameter 'lr'" in capsys.readouterr().err and trained == []


def test_a_search_of_nothing_is_refused(trained, capsys):
    with pytest.raises(SystemExit):
        search.main(["lora", "--profile", "cpu"])
    assert "name values with --grid or --try" in capsys.readouterr().err
