"""The type of products follows what is measured, and results in either type agree."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from data_prep import UserError
from finetune import machine, paths, plan, records
from finetune.model import load, precision
from finetune.notebooks import run_cells

# What a CPU without bf16 instructions has, on one that has them.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("bfloat16", "float32", "chosen"), [(400.0, 100.0, "bfloat16"), (110.0, 100.0, "float32"), (8.0, 45.0, "float32")]
)
def test_the_choice_follows_the_measurement(monkeypatch, bfloat16, float32, chosen):
    speeds = {"bfloat16": bfloat16, "float32": float32}
    monkeypatch.setattr(precision, "_gflops", lambda name, *_: speeds[name])
    found = precision.choose("auto", 576)
    assert found.name == chosen
    assert f"{bfloat16:.0f} GFLOP/s in bfloat16" in found.reason and f"{float32:.0f} GFLOP/s in float32" in found.reason
    assert precision.choose("bfloat16", 576).name == "bfloat16"


def test_without_bf16_instructions_the_choice_is_float32():
    """Measured for real, with the instructions taken away where there are any."""
    script = "from finetune.model import precision; print(precision.choose('auto', 576).name)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | AVX2, text=True, capture_output=True, check=True
    )
    assert done.stdout.split() == ["float32"]


def test_as_many_threads_as_cores_that_may_be_used():
    script = """
import os, torch
from finetune import machine
from finetune.model import precision
every = os.sched_getaffinity(0)
for cores in ({min(every)}, every):
    os.sched_setaffinity(0, cores)
    precision.use_physical_cores.__wrapped__()
    print(torch.get_num_threads(), machine.usable_cores())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines() == ["1 1", " ".join([str(machine.usable_cores())] * 2)]


@pytest.mark.parametrize("run", ["full", "lora", "qlora"])
def test_products_weights_and_records_are_of_the_chosen_type_and_results_agree(tiny, tmp_path, monkeypatch, run):
    """One epoch on 32 rows in each type. The tolerance: a label's probability within 0.03 in the mean and 0.2 at most,
    which is what bf16's 8 bits do to this model, whose random weights are large."""
    probabilities = {}
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / name))
        overrides = tiny | {"compute_dtype": name, "learning_rate": 1e-4}
        names = run_cells(f"fine_tuning_{run}", "trainer.train(", PROFILE="cpu", OVERRIDES=overrides)
        model = names["model"]
        read = {
            parameter.dtype
            for parameter in model.parameters()
            if parameter.is_floating_point() and not parameter.requires_grad
        }
        trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert trained == {torch.float32}
        assert read == (set() if run == "full" else {precision.DTYPES[name]})
        four_bit = getattr(model.config, "quantization_config", None)
        assert (four_bit is not None) == (run == "qlora")
        assert four_bit is None or four_bit.bnb_4bit_compute_dtype == precision.DTYPES[name]
        assert names["args"].bf16 == (name == "bfloat16")
        record = run_cells(f"fine_tuning_{run}", "plots.training_curves", PROFILE="cpu", OVERRIDES=overrides)["record"]
        assert f"{name} products: asked for" in record.training.choices["precision"]
        given = {"model": tiny["model"], "test_rows": 24, "generation_rows": 0}
        evaluated = run_cells(f"{run}_finetuning_performance", "class_table", PROFILE="cpu", OVERRIDES=given)["record"]
        assert (evaluated.evaluation.dtype, evaluated.evaluation.precision) == (name, f"{name} products: asked for")
        rows = records.read_predictions(evaluated, paths.run_folder(evaluated.profile, run))
        probabilities[name] = np.array([list(row.probabilities.values()) for row in rows])
    differences = np.abs(probabilities["float32"] - probabilities["bfloat16"])
    assert 0 < differences.mean() < 0.03 and differences.max() < 0.2


def test_types_that_contradict_each_other_are_refused(home):
    with pytest.raises(UserError, match="compute_dtype=float32 contradicts dtype=bfloat16"):
        plan("lora", "cpu", {"compute_dtype": "float32", "dtype": "bfloat16"})


def test_bfloat16_weights_multiply_in_bfloat16(tiny):
    assert load.choose_precision(plan("lora", "cpu", tiny).experiment, "bfloat16").name == "bfloat16"
