"""The notebooks, executed as the suite does it, on the tiny model: what runs, what is reused, what is refused."""

import os
import re
import shutil
import signal
import threading
from contextlib import nullcontext
from pathlib import Path

import nbformat
import pytest
from sources import imported

from data_prep import UserError
from finetune import keys, paths, records, runner
from finetune.__main__ import main
from finetune.compare import comparison, verdict
from finetune.config.methods import METHODS
from finetune.config.plan import plan
from finetune.kernels import Kernels
from finetune.runner import NOTEBOOKS, STEPS, Suite

SKIPPED = {"fine_tuning_full_unsloth", "full_unsloth_finetuning_performance"}

# What runs without being asked for by name: not DoRA.
BY_DEFAULT = [step.name for step in STEPS if step.run is None or METHODS[step.run].by_default]
ALL = set(BY_DEFAULT) - SKIPPED
TRAININGS = {name for name in ALL if name.startswith("fine_tuning")}
EVALUATIONS = {name for name in ALL if name.endswith("_performance")}


@pytest.fixture(scope="module", autouse=True)
def one_kernel_server():
    """The process that kernels are forked from imports the libraries once for the module, not once a suite."""
    with Kernels() as kernels, pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Kernels", lambda: nullcontext(kernels))
        yield


@pytest.fixture(scope="module")
def suite_home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("suite")


@pytest.fixture
def home(suite_home, monkeypatch) -> Path:
    """One output folder for the module: the second run finds what the first one made."""
    monkeypatch.setenv("FINETUNE_HOME", str(suite_home))
    return suite_home


@pytest.fixture
def overrides(tiny) -> dict[str, object]:
    return tiny | {"learning_rate": 3e-3, "num_train_epochs": 5}


@pytest.fixture
def finished(home, overrides, place) -> Path:
    """The whole suite, executed once."""
    if not (home / "results" / place / "report.html").exists():
        outcomes = Suite("cpu", overrides).execute()
        assert {outcome.step.name: outcome.status for outcome in outcomes} == {
            name: "skipped" if name in SKIPPED else "done" for name in BY_DEFAULT
        }
    return home / "results" / place


def executed(folder: Path, name: str) -> nbformat.NotebookNode:
    return nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4)


def text_of(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def test_without_a_terminal_each_step_says_when_it_starts_and_ends_and_figures_come_at_once(home, overrides, capsys):
    Suite("cpu", overrides).execute()
    lines = capsys.readouterr().out.splitlines()
    begun, ended = {}, {}
    for number, line in enumerate(lines):
        if found := re.match(r"running +(\w+) \(\d+ of \d+\)$", line):
            begun[found[1]] = number
        if found := re.match(r"done +[\d.]+ s  (\w+)$", line):
            ended[found[1]] = number
    assert begun.keys() == ended.keys() == ALL
    svm = next(number for number, line in enumerate(lines) if "baselines/svm: " in line)
    assert begun["base_model_performance"] < svm < ended["base_model_performance"]


def test_every_run_leaves_a_record_whose_numbers_its_predictions_give(finished):
    for run in ("base", "full", "lora", "qlora"):
        record = records.read(finished / run)
        rows = records.read_predictions(record, finished / run)
        assert len(rows) == 24 == record.evaluation.scoring.rows
        right = sum(row.prediction == row.label for row in rows)
        assert record.evaluation.scoring.accuracy == pytest.approx(right / 24)
        assert all(sum(row.probabilities.values()) == pytest.approx(1, abs=1e-6) for row in rows)
        assert [row.generated is not None for row in rows] == [True] * 8 + [False] * 16
        assert (record.training is None) == (run == "base")


def test_training_on_the_sample_learns_its_rows(finished):
    for run in ("full", "lora", "qlora"):
        losses = [point.loss for point in records.read(finished / run).training.history if point.loss is not None]
        assert losses[-1] < losses[0] / 2


def test_the_notebooks_show_what_the_records_hold(finished):
    for run in ("full", "lora", "qlora"):
        record = records.read(finished / run)
        tables = [
            output.get("data", {}).get("text/html", "")
            for cell in executed(finished, f"fine_tuning_{run}").cells
            for output in cell.get("outputs", [])
        ]
        last = [point.validation_accuracy for point in record.training.history if point.validation_accuracy is not None]
        assert any("validation accuracy" in table and f"<td>{last[-1]:.1%}</td>" in table for table in tables)
        shown = text_of(executed(finished, f"{run}_finetuning_performance"))
        assert f"{record.evaluation.scoring.accuracy:.1%}" in shown
        assert str(comparison.load(finished.name).pair(run, "base")) in shown
    assert verdict.decide(comparison.load(finished.name)).text in text_of(executed(finished, "compare_methods"))


def test_the_training_notebooks_draw_curves_and_the_comparison_pictures(finished):
    for name, pictures in {"fine_tuning_lora": 2, "lora_finetuning_performance": 1, "compare_methods": 5}.items():
        outputs = [output for cell in executed(finished, name).cells for output in cell.get("outputs", [])]
        assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures, name


def test_the_report_is_written_with_every_run(finished):
    html = (finished / "report.html").read_text()
    assert all(name in html for name in ("base model", "full", "LoRA", "QLoRA", "not AG News"))


def test_a_second_run_reuses_everything_and_says_why(finished, overrides, capsys):
    before = (finished / "report.html").stat().st_mtime_ns
    outcomes = {outcome.step.name: outcome for outcome in Suite("cpu", overrides).execute()}
    assert (finished / "report.html").stat().st_mtime_ns == before
    commit = records.read(finished / "lora").training.environment.short_commit
    assert {outcomes[name].status for name in ALL} == {"reused"}
    assert all(f"made by commit {commit}" in outcomes[name].reason for name in ALL)
    assert "Unsloth needs an NVIDIA GPU" in outcomes["fine_tuning_full_unsloth"].reason
    assert outcomes["full_unsloth_finetuning_performance"].reason == "fine_tuning_full_unsloth was skipped"
    assert "skipped            fine_tuning_full_unsloth: Unsloth needs" in capsys.readouterr().out


def reused(overrides: dict) -> set[str]:
    """The steps that a run with these overrides would not execute."""
    suite = Suite("cpu", overrides)
    return {step.name for step in suite.steps if step.name not in SKIPPED and suite._made(step)}


def test_a_lost_artefact_or_another_setting_is_not_reused(finished, overrides):
    assert reused(overrides) == ALL
    # The base model has no learning rate, and the comparison reads records.
    assert reused(overrides | {"learning_rate": 1e-3}) == {"base_model_performance", "compare_methods"}
    assert reused(overrides | {"generation_rows": 4}) == TRAININGS | {"compare_methods"}
    artefact = paths.artefact_folder(finished.name, "lora", is_adapter=True)
    artefact.rename(artefact.with_name("elsewhere"))
    assert reused(overrides) == ALL - {"fine_tuning_lora"}
    artefact.with_name("elsewhere").rename(artefact)
    adapter, predictions, record = "adapter_model.safetensors", "predictions.parquet", "record.json"
    for damaged, again in {
        artefact / adapter: {"fine_tuning_lora"},
        finished / "lora" / predictions: {"lora_finetuning_performance"},
        finished / "lora" / record: {"fine_tuning_lora", "lora_finetuning_performance", "compare_methods"},
        finished / "notebooks" / ".fine_tuning_qlora.json": {"fine_tuning_qlora"},
    }.items():
        content = damaged.read_bytes()
        damaged.write_bytes(content[: len(content) // 2])
        assert reused(overrides) == ALL - again
        damaged.write_bytes(content)


PARSED: dict[bytes, bytes] = {}


def parsed_once(path: Path, code=keys.code) -> bytes:
    """`keys.code`, for the same content once: parsing all sources three times a test takes seconds."""
    content = path.read_bytes()
    return PARSED.get(content) or PARSED.setdefault(content, code(path))


@pytest.mark.parametrize(
    ("module", "again"),
    [
        ("finetune/compare/plots.py", {"compare_methods"}),
        ("finetune/compare/templates/report.html", {"compare_methods"}),
        ("finetune/compare/tables.py", {"compare_methods"}),
        ("finetune/cards.py", set()),
        ("finetune/machine.py", set()),
        ("finetune/train/trainer.py", TRAININGS),
        ("finetune/train/save.py", TRAININGS),
        ("finetune/evaluate/run.py", EVALUATIONS),
        ("finetune/evaluate/score.py", TRAININGS | EVALUATIONS),
        ("finetune/model/encode.py", TRAININGS | EVALUATIONS),
        ("finetune/model/load.py", TRAININGS | EVALUATIONS),
        ("finetune/model/packing.py", TRAININGS | EVALUATIONS),
        ("finetune/model/precision.py", TRAININGS | EVALUATIONS),
        ("data_prep/clean.py", ALL),
    ],
)
def test_what_a_changed_file_computed_is_computed_again_and_nothing_else(
    finished, overrides, tmp_path, monkeypatch, module, again
):
    """The sources that keys are made of lie in a copy, where one of them gets another line."""
    monkeypatch.setattr(keys, "code", parsed_once)
    for package in ("data_prep", "finetune"):
        shutil.copytree(paths.PROJECT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(paths, "PROJECT", tmp_path)
    assert reused(overrides) == ALL
    path = tmp_path / module
    path.write_text(path.read_text() + ("\n# A comment.\n" if path.suffix == ".py" else ""))
    assert reused(overrides) == ALL
    path.write_text(path.read_text() + "\nCHANGED = True\n")
    assert reused(overrides) == ALL - again


# What trainings and evaluations import besides, without a result depending on it: values of the registries are in the
# settings, validation in a training is only shown, and the rest names, counts, writes or explains.
SHOWN_OR_WRITTEN = {
    "cards", "config.embedded", "config.methods", "config.plan", "config.profiles", "config.recipes", "files",
    "machine", "paths", "predictions", "records", "train.energy", "train.held", "train.memory", "train.simulate",
}  # fmt: skip


# A step's entries into the engine, its kind, and what they import of it that only shows.
ENTRIES = {
    "train.save": ("train", {"metrics", "resampling"}),
    "evaluate.run": ("evaluate", {"wording"}),
    "evaluate.baselines": ("evaluate", {"baseline_records", "wording"}),
}


def modules_behind(entry: str) -> set[str]:
    """The modules of the engine that this one imports, directly and through others, imports in functions included."""
    files = {
        ".".join(path.relative_to(paths.PROJECT).with_suffix("").parts): path
        for path in (paths.PROJECT / "finetune").rglob("*.py")
    }
    found, waiting = set(), {f"finetune.{entry}"}
    while waiting:
        new = imported(files[waiting.pop()]) & files.keys() - found
        waiting |= new
        found |= new
    return {name.removeprefix("finetune.") for name in found}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_module_that_computes_a_result_is_in_its_key(entry):
    """Whoever adds a module that a training imports decides whether it computes."""
    kind, shown = ENTRIES[entry]
    computing = {
        ".".join(path.relative_to(paths.PROJECT / "finetune").with_suffix("").parts)
        for path in keys.sources(kind)
        if path.is_relative_to(paths.PROJECT / "finetune")
    }
    behind = modules_behind(entry)
    assert len(behind) > 10 and behind <= computing | SHOWN_OR_WRITTEN | shown


def test_a_run_that_refuses_an_override_is_skipped_before_anything_runs(tiny):
    suite = Suite("cpu", tiny | {"dtype": "float32"})
    assert set(suite._refused) == SKIPPED | {"fine_tuning_qlora", "qlora_finetuning_performance"}
    outcome = suite._without_executing(next(step for step in STEPS if step.name == "fine_tuning_qlora"), [])
    assert (outcome.status, outcome.reason) == (
        "skipped",
        "load_in_4bit=True contradicts dtype=float32: set dtype=auto",
    )
    with pytest.raises(UserError, match="load_in_4bit=True contradicts"):
        Suite("cpu", tiny | {"dtype": "float32"}, only=("qlora",))


def test_without_its_artefact_a_notebook_names_the_one_that_makes_it(tiny, place, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))
    suite = Suite("cpu", tiny, only=("lora",))
    suite.steps = tuple(step for step in suite.steps if step.needs)
    [outcome] = suite.execute()
    assert outcome.status == "failed"
    assert outcome.reason == f"UserError: there is no lora model of {place} yet: run fine_tuning_lora.ipynb first"


def test_the_unsloth_notebook_stops_at_its_first_step_without_cuda(tiny, tmp_path, monkeypatch):
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))
    notebook = nbformat.read(NOTEBOOKS / "fine_tuning_full_unsloth.ipynb", as_version=4)
    with pytest.raises(CellExecutionError, match="Unsloth needs an NVIDIA GPU with CUDA and this machine has none"):
        NotebookClient(notebook, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    [error] = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert len(error.traceback) == 1, "one sentence, no traceback"


def test_an_unknown_run_is_refused_before_anything_is_executed(tiny):
    with pytest.raises(UserError, match=r"--only lora2: there is no such run; the runs are: base, full"):
        Suite("cpu", tiny, only=("lora2",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile", "laptop"], "unknown profile 'laptop'; the profiles are: auto, spark, gpu, cpu"),
        (["run", "--set", "lr=1"], "unknown parameter 'lr' (override); the parameters are: adapter, article_loss"),
        (["run", "--set", "learning_rate"], "--set learning_rate: write it as name=value"),
        (
            ["plan", "lora", "--set", "num_train_epochs=-1"],
            "num_train_epochs='-1' is not possible: Input should be greater than 0",
        ),
        (["plan", "svm"], "unknown run 'svm'; the runs are: base, full, full_unsloth, lora, qlora, dora, head"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_further_seeds_are_trainings_of_their_own_before_the_comparison():
    steps = Suite("cpu", {"learning_rate": 1e-3}, only=("base", "lora", "compare"), seeds=3).steps
    assert [step.name for step in steps] == [
        "base_model_performance",
        "fine_tuning_lora",
        "lora_finetuning_performance",
        "fine_tuning_lora_seed-43",
        "lora_finetuning_performance_seed-43",
        "fine_tuning_lora_seed-44",
        "lora_finetuning_performance_seed-44",
        "compare_methods",
    ]
    assert steps[4].needs == ("fine_tuning_lora_seed-43",)


def test_a_learning_curve_trains_on_fewer_rows_alone():
    suite = Suite("cpu", {"learning_rate": 1e-3}, only=("lora", "compare"), curve=(250, 1000))
    assert [step.name for step in suite.steps] == [
        "fine_tuning_lora_rows-250",
        "lora_finetuning_performance_rows-250",
        "fine_tuning_lora_rows-1000",
        "lora_finetuning_performance_rows-1000",
        "compare_methods",
    ]
    plan = suite._plans[suite.steps[2].name]
    assert (plan.experiment.train_rows, plan.recipe.learning_rate, plan.experiment.seed) == (1000, 1e-3, 42)
    assert suite._plans[suite.steps[3].name].run_folder == paths.run_folder("cpu", "lora", "rows-1000")


@pytest.mark.parametrize(
    "arguments",
    [["run", "--seeds", "0"], ["run", "--seeds", "x"], ["curve", "--rows", "-1"]],
)
def test_numbers_of_trainings_are_checked(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "is not a whole number from 1" in capsys.readouterr().err


def test_seeds_and_curve_are_trained_and_compared(finished, overrides):
    """After the whole suite: one more seed, and half the rows, of one method."""
    outcomes = Suite("cpu", overrides, only=("lora",), seeds=2).execute()
    assert [outcome.status for outcome in outcomes] == ["reused"] * 2 + ["done"] * 2
    outcomes = Suite("cpu", overrides, only=("lora", "compare"), curve=(16,)).execute()
    assert [outcome.status for outcome in outcomes] == ["done"] * 3
    compared = comparison.load(finished.name)
    first, second = compared.records["lora"], compared.seeds["lora"][0].record
    assert (first.seed, second.seed) == (42, 43)
    assert first.data.fingerprint == second.data.fingerprint
    assert first.training.artefact_digest != second.training.artefact_digest
    assert compared.curve["lora"][0].record.data.train_rows == 16
    assert "Pairs over all seeds" in (finished / "report.html").read_text()
    # The other tests of this module find the suite as it was.
    for variant in ("seed-43", "rows-16"):
        shutil.rmtree(finished / "lora" / variant)


def test_the_plan_command_prints_every_parameter_and_its_origin(capsys):
    assert main(["plan", "lora", "--profile", "cpu", "--set", "learning_rate=1e-4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [row] = [number for number, line in enumerate(lines) if line.split()[:1] == ["learning_rate"]]
    assert lines[row].split() == ["learning_rate", "0.0001", "override"] and max(map(len, lines)) <= 80
    assert all(f" {name} " in " ".join(lines) for name in plan("lora", "cpu").values)
    # What was chosen comes first.
    assert row < next(number for number, line in enumerate(lines) if line.split()[-1:] in (["default"], ["recipe"]))


def test_an_interrupted_suite_goes_on_where_it_was(finished, overrides, capfd):
    """The last test: LoRA is trained again with another rate, and Ctrl-C comes after its first steps."""
    command = ["run", "--profile", "cpu", "--only", "base", "--only", "lora"]
    for name, value in (overrides | {"learning_rate": 2e-3}).items():
        command += ["--set", f"{name}={value}"]
    adapter, state = (
        finished.parents[1] / "adapters" / f"{finished.name}-lora",
        finished.parents[1] / "checkpoints" / ".training",
    )
    made = adapter.stat().st_ino
    ended = threading.Event()

    def press_ctrl_c() -> None:
        while not (state / f"{finished.name}-lora" / "progress.json").exists():
            if ended.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGINT)

    # Where the tests run in the background, a shell has SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=press_ctrl_c).start()
    try:
        assert main(command) == 130
    finally:
        ended.set()
        signal.signal(signal.SIGINT, handler)
    assert adapter.stat().st_ino == made, "the adapter of before is as it was"
    capfd.readouterr()
    assert main(command) == 0
    assert "reused             base_model_performance" in capfd.readouterr().out
    assert "Resuming from checkpoint-" in text_of(executed(finished, "fine_tuning_lora"))
