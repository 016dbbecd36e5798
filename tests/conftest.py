"""What the tests share: an output folder of their own, and a tiny model with a real chat template."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# A test that reached for the hub would be slow here and fail elsewhere.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors gain nothing from threads, and lose much where other processes want the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

AG_NEWS = Path(__file__).resolve().parent.parent.parent / "shared" / "ag_news"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An output folder of the test's own."""
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))
    return tmp_path


def pytest_collection_modifyitems(items):
    """Files that take minutes begin first: xdist hands out whole files, and one that began late would end late."""
    items.sort(key=lambda item: item.path.name not in ("test_runner.py", "test_training.py"))


@pytest.fixture
def memory_group():
    """A real control group of 1 GB. Its path; a process joins by its number in `cgroup.procs`."""
    base, limit = Path("/sys/fs/cgroup"), "memory.max"
    if not (base / "cgroup.controllers").is_file():
        base, limit = base / "memory", "memory.limit_in_bytes"
    group = base / f"finetune-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not (group / limit).is_file():
            pytest.skip(f"{base} hands no memory controller to its groups")
        (group / limit).write_text("1000000000")
        yield group
    finally:
        group.rmdir()


@pytest.fixture(scope="session")
def ag_news() -> Path:
    """The folder with real AG News rows."""
    if not AG_NEWS.is_dir():
        pytest.skip(f"no real AG News rows in {AG_NEWS}")
    return AG_NEWS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Llama of two layers with random weights, and a BPE tokenizer learnt from the sample, in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.families import tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            tie_word_embeddings=True,
            # Large, so that the random model's answers depend on the article.
            initializer_range=0.2,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Each training collects garbage, which takes 0.7 s where it passes over all that the libraries hold.
    gc.freeze()
    return folder


@pytest.fixture
def place(tiny_model) -> str:
    """The name of the folders of results with the tiny model."""
    from finetune.config import profiles

    return profiles.place("cpu", "ag_news", str(tiny_model))


@pytest.fixture
def tiny(home, tiny_model) -> dict[str, object]:
    """Overrides that make any run a matter of seconds: the tiny model on a few rows of the sample."""
    return {
        "model": str(tiny_model),
        "train_rows": 32,
        "test_rows": 24,
        "generation_rows": 8,
        "num_train_epochs": 1,
        "eval_steps": 0.5,
    }
