"""The question whether a training fits, before it starts."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config
from trl import SFTConfig

from data_prep import UserError
from finetune import machine, plan
from finetune.config.recipes import FULL, LORA
from finetune.train import memory

SEVEN_BILLION = 7_615_616_512
ARGUMENTS = SFTConfig(use_cpu=True, bf16=False)


@pytest.mark.parametrize(
    ("recipe", "trainable", "gigabytes"),
    [
        # fp32 gradients and two fp32 moments: 12 bytes a weight.
        (FULL, SEVEN_BILLION, 91.4),
        # fp32 gradients and two moments of a byte: 6.
        (replace(FULL, optim="adamw_8bit"), SEVEN_BILLION, 45.7),
        (replace(FULL, dtype="bfloat16"), SEVEN_BILLION, 45.7),
        (replace(FULL, optim="adamw_8bit", update_in_backward=True), SEVEN_BILLION, 15.2),
        (LORA, 40_000_000, 0.48),
    ],
)
def test_bytes_a_weight(recipe, trainable, gigabytes):
    weight = 4 if recipe.adapter else memory.BYTES[recipe.dtype]
    needed = memory.still_needed_bytes(recipe.optim, weight, trainable, recipe.update_in_backward)
    assert needed / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_a_training_that_cannot_fit_is_refused_with_the_figures():
    too_many = torch.nn.Parameter(torch.empty(machine.available_memory_bytes(), device="meta"))
    with pytest.raises(UserError, match=r"cannot fit: [\d.]+ GB for gradients and optimiser.* GB free"):
        memory.require_room(ARGUMENTS, [too_many], update_in_backward=False)


def test_one_that_fits_says_what_is_free():
    few = [torch.nn.Parameter(torch.empty(1_000_000))]
    said = memory.require_room(ARGUMENTS, few, update_in_backward=False)
    assert said.startswith("0.0 GB for gradients and optimiser, activations on top; ")


@pytest.mark.parametrize(
    ("change", "free", "mode"),
    [
        # 32 articles of 100 tokens in the 7B shape: 19.9 GB of activations beside 15.9 for the model, 0.5 GB for the
        # loss on answers, or 4.9 on all tokens.
        ({}, 40.5e9, "off"),
        ({}, 37.5e9, "plain"),
        ({"completion_only_loss": False}, 40.5e9, "plain"),
        ({"article_loss": 0.5}, 40.5e9, "plain"),
        ({"completion_only_loss": False}, 46e9, "off"),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 24e9, "off"),
        ({"gradient_checkpointing": "off"}, 1e9, "off"),
    ],
)
def test_activations_are_kept_where_they_fit(monkeypatch, change, free, mode):
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: free)
    shape = Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    )  # fmt: skip
    settings = plan("lora", "spark", {"target_modules": "all-linear"} | change)
    chosen = memory.choose_checkpointing(settings, shape, [100] * 64)
    assert chosen.mode == mode, chosen.reason
