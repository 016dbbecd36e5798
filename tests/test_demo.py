"""The demo as a user runs it: the real embedded model on the built-in sample. Minutes, so marked slow."""

import os
import subprocess
from itertools import combinations

import pytest

from finetune import paths, records
from finetune.compare import comparison, verdict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`make demo` with outputs of its own: (finished process, results folder)."""
    home = tmp_path_factory.mktemp("demo")
    # As a user's shell has it: without what the other tests set.
    ours = ("FINETUNE_", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    process = subprocess.run(
        ["make", "demo", "PROFILE=cpu"],
        cwd=paths.PROJECT,
        env=environment | {"FINETUNE_HOME": str(home)},
        text=True,
        capture_output=True,
        check=False,
    )
    print(process.stdout)
    assert process.returncode == 0, process.stderr[-3000:]
    return process, home / "results" / "cpu"


def test_every_step_is_done_but_unsloths(demo):
    process, _ = demo
    lines = [
        line for line in process.stdout.splitlines() if line.startswith(("done ", "reused ", "skipped ", "failed "))
    ]
    assert [line.split()[0] for line in lines].count("done") == 8
    assert [line.split()[1].rstrip(":") for line in lines if line.startswith("skipped")] == [
        "fine_tuning_full_unsloth",
        "full_unsloth_finetuning_performance",
    ]


def test_each_tuned_method_beats_the_base_by_a_paired_test(demo):
    _, folder = demo
    compared = comparison.load_folder(folder, "cpu")
    for run in ("full", "lora", "qlora"):
        pair = compared.pair(run, "base")
        assert pair.points > 0 and pair.p_value < 0.05, str(pair)


def test_tuned_models_answer_in_valid_json_and_agree_with_scoring(demo):
    _, folder = demo
    for run in ("full", "lora", "qlora"):
        generation = records.read(folder / run).evaluation.generation
        assert generation.valid_share >= 0.95
        assert generation.agreement_with_scoring >= 0.9


def test_the_runs_are_different_models(demo):
    _, folder = demo
    digests = [records.read(folder / run).evaluation.predictions_digest for run in ("base", "full", "lora", "qlora")]
    assert all(first != second for first, second in combinations(digests, 2))


def test_the_report_and_the_answer_are_there(demo):
    process, folder = demo
    text = verdict.decide(comparison.load_folder(folder, "cpu")).text
    assert text in " ".join(process.stdout.split())
    assert (folder / "report.html").stat().st_size > 50_000
    assert len(list((folder / "notebooks").glob("*.ipynb"))) == 8
