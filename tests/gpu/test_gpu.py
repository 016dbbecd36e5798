"""On a real GPU with Unsloth: the same articles give the same loss, gradients and weights, however they are laid out.

Needs the embedded model, Unsloth, and AG News' CSV files in ../shared/ag_news or in the folder that AG_NEWS names.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.model import smollm2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU with CUDA on this machine"),
]
PROJECT = Path(__file__).resolve().parent.parent.parent
CSV = Path(os.environ.get("AG_NEWS", PROJECT.parent / "shared" / "ag_news"))
CASES = [
    ("transformers", "lora"),
    ("transformers", "qlora"),
    ("transformers", "full"),
    ("unsloth", "lora"),
    ("unsloth", "qlora"),
    ("unsloth", "full_unsloth"),
]


@cache
def examinations() -> dict[tuple[str, str], Future]:
    """All cases, side by side and shared out to the GPUs: they wait for Python more than for a GPU."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = chosen.split(",") if chosen else [str(number) for number in range(torch.cuda.device_count())]
    pool = ThreadPoolExecutor(len(CASES))
    return {case: pool.submit(examine, *case, gpus[number % len(gpus)]) for number, case in enumerate(CASES)}


def examined(engine: str, run: str) -> dict:
    """What tests/gpu/examine.py found; `loaded`: what plain libraries then found."""
    if not CSV.is_dir():
        pytest.skip(f"no AG News rows in {CSV}")
    return examinations()[engine, run].result()


def examine(engine: str, run: str, gpu: str) -> dict:
    # In a folder of its own: the user's models and records stay as they are.
    with tempfile.TemporaryDirectory() as home:
        result = result_of(home, gpu, engine, run)
        return result | {"loaded": result_of(home, gpu, engine, "--load", run)}


def result_of(home: str, gpu: str, *arguments: str) -> dict:
    """A process of its own: Unsloth changes transformers for the whole process."""
    command = [sys.executable, "tests/gpu/examine.py", str(smollm2.ensure().resolve()), str(CSV), *arguments]
    search = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": search, "FINETUNE_HOME": home, "CUDA_VISIBLE_DEVICES": gpu}
    # Or each compiles into the same folder, and finds another's files there.
    own["UNSLOTH_COMPILE_LOCATION"] = str(Path(home, "unsloth"))
    done = subprocess.run(command, cwd=PROJECT, env=os.environ | own, stdout=subprocess.PIPE, text=True, check=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize(("engine", "run"), CASES)
def test_packed_articles_are_apart(engine, run):
    assert examined(engine, run)["choices"]["rows"].startswith("packed rows: ")
    assert examined(engine, run)["choices"]["attention"].startswith("flash")


@pytest.mark.parametrize(("engine", "run"), CASES)
def test_packed_and_padded_batches_have_the_same_loss_and_gradients(engine, run):
    result = examined(engine, run)
    assert result["loss"] == pytest.approx(result["padded_loss"], rel=1e-2)
    assert result["padded"]["cosine"] == pytest.approx(1, abs=5e-3)
    assert result["padded"]["norms"] == pytest.approx(1, abs=2e-2)


@pytest.mark.parametrize(("engine", "run"), CASES)
def test_one_batch_of_32_equals_32_of_one(engine, run):
    result = examined(engine, run)
    assert result["loss"] == pytest.approx(result["small_loss"], rel=1e-2)
    assert result["small"]["cosine"] == pytest.approx(1, abs=5e-3)
    assert result["small"]["norms"] == pytest.approx(1, abs=2e-2)


@pytest.mark.parametrize(("engine", "run"), CASES)
def test_a_pass_as_cuda_graph_equals_the_pass_itself(engine, run):
    """Added up over two batches of one shape, so that a replay is among them."""
    result = examined(engine, run)
    assert result["graphed_loss"] == pytest.approx(result["halves_loss"], rel=1e-2)
    assert result["graphed"]["cosine"] == pytest.approx(1, abs=5e-3)
    assert result["graphed"]["norms"] == pytest.approx(1, abs=2e-2)


@pytest.mark.parametrize(("engine", "run"), CASES)
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(engine, run):
    """Gradients of attention are added up in no fixed order: two uninterrupted trainings may differ by rounding."""
    result = examined(engine, run)
    assert result["resumed"] <= 2 * result["again"] + 0.05


@pytest.mark.parametrize(("ours", "theirs"), [("lora", "lora"), ("qlora", "qlora"), ("full_unsloth", "full")])
def test_unsloth_and_transformers_begin_with_the_same_loss(ours, theirs):
    first, second = examined("unsloth", ours)["loss"], examined("transformers", theirs)["loss"]
    assert first == pytest.approx(second, rel=1e-2)


@pytest.mark.parametrize(("engine", "run"), CASES)
def test_plain_libraries_load_what_was_trained(engine, run):
    """transformers and peft, without Unsloth, give the probabilities that the model had when its training ended, but
    for bf16's rounding: far closer to them than the base model's."""
    result = examined(engine, run)
    trained = np.array(result["probabilities"])
    loaded, base = np.array(result["loaded"]["probabilities"]), np.array(result["loaded"]["base"])
    assert np.abs(trained - base).mean() > 0.05, "nothing was learned"
    assert np.abs(trained - loaded).mean() < 0.2 * np.abs(trained - base).mean()
    assert (trained.argmax(axis=1) == loaded.argmax(axis=1)).mean() > 0.9


@pytest.mark.parametrize(("engine", "run"), [case for case in CASES if case[1] in ("lora", "qlora")])
def test_a_merged_adapter_answers_as_apart(engine, run):
    merged = examined(engine, run)["loaded"]["merged"]
    # Merged weights are rounded to bf16.
    assert merged["largest_difference"] < 0.2
    assert merged["agreement"] > 0.9


def test_flash_and_padded_attend_alike():
    from finetune.model import packing

    forest = packing.Forest()
    root = forest.add(range(27))
    for length in (40, 70, 33, 128, 5):
        forest.add(range(length), root)
    row = forest.row().to("cuda")
    torch.manual_seed(0)
    shape = (row.input_ids.shape[1],)
    states = [torch.randn(*shape, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (28, 4, 4)]
    results = []
    for kernel in (packing._flash, packing._padded):
        inputs = [state.clone().requires_grad_() for state in states]
        output = kernel(*inputs, row, None)
        output.backward(states[0])
        results.append([output.detach(), *(state.grad for state in inputs)])
    for flash, padded in zip(*results, strict=True):
        assert (flash.float() - padded.float()).norm() < 1e-2 * padded.float().norm()
