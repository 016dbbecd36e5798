"""A training on two processes is the training of one: same losses, same weights, and either goes on from the other."""

import json
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import several
import torch
from safetensors.torch import load_file

from data_prep import UserError
from finetune import machine, predictions
from finetune.evaluate import score
from finetune.launch import BEGINS, _failure, driver, launch, processes_for
from finetune.notebooks import FOLDER
from finetune.runner import Suite
from finetune.train import processes

# 42 rows are five updates of 8 and one of 2, where the second process has no row.
OVERRIDES = {
    "train_rows": 42,
    "test_rows": 24,
    "generation_rows": 9,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-3,
    "eval_steps": 0.5,
    "eval_on_start": False,
    "save_steps": 1 / 3,
    "compute_dtype": "float32",
}
# A checkpoint within the second epoch, whose rows have another order.
MIDDLE = 8


@pytest.fixture(scope="module")
def overrides(tiny_model) -> dict:
    return OVERRIDES | {"model": str(tiny_model)}


@pytest.fixture(scope="module")
def alone(overrides, tmp_path_factory):
    """The folder of a method's training in one process."""
    homes: dict[str, Path] = {}

    def trained(run: str) -> Path:
        if run not in homes:
            homes[run] = tmp_path_factory.mktemp(run)
            several.finish(run, overrides, homes[run], edits=several.ending(0))
        return homes[run]

    return trained


def weights(run: str, home: Path) -> dict[str, torch.Tensor]:
    [file] = (home / several.record(run, home)["training"]["artefact"]).glob("*model.safetensors")
    return load_file(file)


def assert_equal(run: str, home: Path, other: Path) -> None:
    one, two = (several.record(run, folder) for folder in (home, other))
    assert one["settings_digest"] == two["settings_digest"]
    for name in ("loss", "grad_norm", "validation_log_loss", "learning_rate"):
        points = [[point[name] or 0.0 for point in record["training"]["history"]] for record in (one, two)]
        assert points[0] == pytest.approx(points[1], rel=1e-4), name
    mine, its = weights(run, home), weights(run, other)
    assert mine.keys() == its.keys()
    for name in mine:
        # Full weights are saved in bf16, where a rounding may fall to the other side.
        tolerance = 1e-5 if mine[name].dtype == torch.float32 else 1e-2
        torch.testing.assert_close(mine[name], its[name], atol=1e-5, rtol=tolerance)


@pytest.mark.parametrize(
    ("run", "strategy"),
    [
        ("lora", "ddp"),
        ("full", "fsdp2"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("full", "ddp"), ("lora", "fsdp2"), ("qlora", "fsdp2"))
        ),
    ],
)
def test_two_processes_train_as_one(overrides, alone, tmp_path, run, strategy):
    log = several.finish(run, overrides, tmp_path, count=2, strategy=strategy, edits=several.ending(0))
    assert_equal(run, tmp_path, alone(run))
    training = several.record(run, tmp_path)["training"]
    assert (training["processes"], training["strategy"].lower()) == (2, strategy)
    assert len(training["device_peak_bytes"]) == 2 and len(training["hosts"]) == 1
    assert training["articles"] == 84
    assert "Excluding from FSDP2 sharding" not in log


@pytest.mark.parametrize(
    ("run", "before", "after", "strategy"),
    [
        ("full", 2, 1, "fsdp2"),
        pytest.param("full", 1, 2, "fsdp2", marks=pytest.mark.slow),
        pytest.param("lora", 1, 2, "ddp", marks=pytest.mark.slow),
    ],
)
def test_a_training_goes_on_with_another_number_of_processes(overrides, alone, tmp_path, run, before, after, strategy):
    several.finish(run, overrides, tmp_path, count=before, strategy=strategy, edits=several.ending(MIDDLE))
    log = several.finish(run, overrides, tmp_path, count=after, strategy=strategy, edits=several.ending(0))
    assert f"Resuming from checkpoint-{MIDDLE}" in log
    assert_equal(run, tmp_path, alone(run))


def test_a_killed_process_ends_the_others_and_is_named_and_the_next_run_resumes(
    overrides, alone, tmp_path, monkeypatch
):
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(several.__file__).parent))
    edit = several.ending(MIDDLE, killed=1)
    with pytest.raises(UserError, match=r"process 1 on .* died \(SIGKILL\)"):
        launch(str(notebook(overrides, tmp_path, edit)), 2, "ddp", tmp_path)
    assert not list((tmp_path / "results").rglob("record.json"))
    log = several.finish("lora", overrides, tmp_path, edits=several.ending(0))
    assert f"Resuming from checkpoint-{MIDDLE}" in log
    assert_equal("lora", tmp_path, alone("lora"))


def notebook(overrides: dict, folder: Path, edits: dict[str, str]) -> Path:
    """A LoRA notebook's file as the runner gives it to the processes."""
    read = nbformat.read(FOLDER / "fine_tuning_lora.ipynb", as_version=4)
    for cell in read.cells:
        for old, new in edits.items():
            cell.source = cell.source.replace(old, new)
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = f"PROFILE, TASK, OVERRIDES = 'cpu', 'ag_news', {overrides!r}"
    file = folder / "processes.ipynb"
    driver(read, file, 2, "ddp")
    return file


def test_two_processes_evaluate_as_one(overrides, alone, tmp_path):
    found = []
    for count in (1, 2):
        home = tmp_path / str(count)
        shutil.copytree(alone("lora"), home)
        given = {name: overrides[name] for name in ("model", "test_rows", "generation_rows")}
        several.finish("lora_finetuning_performance", given, home, count=count)
        [file] = (home / "results").rglob("lora/" + predictions.FILE)
        record = several.record("lora", home)["evaluation"]
        rows = predictions.read(file.parent, record["predictions_digest"])
        found.append((rows, record))
    (one, first), (two, second) = found
    assert [(row.id, row.prediction, row.generated) for row in one] == [
        (row.id, row.prediction, row.generated) for row in two
    ]
    assert sum(row.generated is not None for row in two) == 9
    probabilities = [[list(row.probabilities.values()) for row in rows] for rows in (one, two)]
    np.testing.assert_allclose(*probabilities, atol=1e-5)
    assert first["scoring"] == second["scoring"] and first["generation"]["metrics"] == second["generation"]["metrics"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_rows_that_do_not_divide_are_each_counted_once(monkeypatch, count):
    rows, asked = list(range(5)), []
    monkeypatch.setattr(machine, "processes", lambda: count)

    def doubled(own):
        asked.append(len(own))
        return [2 * row for row in own]

    def of(rank):
        monkeypatch.setattr(machine, "rank", lambda: rank)
        monkeypatch.setattr(score, "gather_object", lambda own: own)
        due = -(-len(rows) // count)
        return score.divided(doubled, rows)[:due]

    everything = [value for rank in range(count) for value in of(rank)]
    assert everything[: len(rows)] == [2 * row for row in rows]
    assert len(set(asked)) == 1


def test_an_update_is_shared_out_or_refused_with_the_numbers_that_do():
    shares = {number: processes.share(8, 4, number) for number in (1, 2, 4, 8, 16, 32)}
    assert shares == {1: (8, 4), 2: (8, 2), 4: (8, 1), 8: (4, 1), 16: (2, 1), 32: (1, 1)}
    assert processes.share(6, 2, 4) == (3, 1) and processes.share(8, 3, 2) == (6, 2)
    with pytest.raises(UserError, match=r"1, 2, 4, 8, 16 or 32 processes"):
        processes.share(8, 4, 3)


def test_the_driver_runs_no_cell_that_trains_and_gives_the_processes_the_edited_ones(tmp_path):
    file, read = tmp_path / "given.ipynb", nbformat.read(FOLDER / "fine_tuning_lora.ipynb", as_version=4)
    cell = next(cell for cell in read.cells if "SFTConfig(" in cell.source)
    cell.source = cell.source.replace("weight_decay=recipe.weight_decay", "weight_decay=0.5")
    drives = driver(read, file, 2, "ddp")
    assert "weight_decay=0.5" in file.read_text()
    runs = [cell.source for cell in drives.cells if cell.cell_type == "code" and not skipped(cell)]
    assert sum("launch(" in source for source in runs) == 1
    rest = "\n".join(source for source in runs if "launch(" not in source)
    assert not any(text in rest for text in (*BEGINS, "trainer"))
    cell.source += "\n%time 1"
    with pytest.raises(UserError, match="begins with % or !"):
        driver(read, file, 2, "ddp")


def skipped(cell) -> bool:
    return "skip-execution" in cell.metadata.get("tags", [])


def test_a_sentence_of_a_process_is_the_sentence_of_all(tmp_path):
    said = "PROCESS FAILED the disk is too small\nFailures:\n  host      : a\n  rank      : 0 (local_rank: 0)\n"
    said += "  exitcode  : 1 (pid: 5)\nPROCESS FAILED process 1: RuntimeError: connection closed\n"
    assert _failure(said, tmp_path) == "the disk is too small"
    assert str(tmp_path) in _failure("nothing", tmp_path)


def test_processes_are_a_number_or_all_gpus(monkeypatch):
    assert processes_for("auto") >= 1
    if not machine.has_cuda():
        monkeypatch.setenv("FINETUNE_PROCESSES", "")
        assert processes_for("3") == 3
    with pytest.raises(UserError, match="whole number"):
        processes_for("two")


@pytest.mark.slow
def test_the_suite_trains_and_evaluates_on_two_processes(overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))
    monkeypatch.setenv("FINETUNE_PROCESSES", "2")
    outcomes = Suite("cpu", overrides, ("base", "lora"), shared=(2, "ddp")).execute()
    assert [outcome.status for outcome in outcomes] == ["done"] * 3, [outcome.reason for outcome in outcomes]
    record = several.record("lora", tmp_path)
    assert record["training"]["processes"] == 2 and record["evaluation"]["scoring"]["rows"] == 24
    [ran] = (tmp_path / "results").rglob("fine_tuning_lora.ipynb")
    shown = json.loads(ran.read_text())["cells"]
    assert any("image/png" in output.get("data", {}) for cell in shown for output in cell.get("outputs", []))
