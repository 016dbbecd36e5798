"""The question whether a training fits, before it starts."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, tiny_family
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen2Config, Qwen3MoeConfig
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


# PEFT puts no adapter on a state space's layers, and turns Mixtral's experts into targets of its own.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"state space", "experts of mixtral"}))
def test_the_meta_device_counts_what_a_loaded_model_and_peft_have(tiny_model, family):
    model = tiny_family(family, AutoTokenizer.from_pretrained(tiny_model))
    recipe = replace(LORA, target_modules="all-linear")
    sizes = memory.sizes_of(recipe, model.config)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=recipe.r, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sizes.adapter == sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def test_all_experts_are_held_and_eight_of_them_computed():
    """Qwen3-30B-A3B: 30.5 billion parameters by its model card."""
    configuration = Qwen3MoeConfig(
        vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    sizes = memory.sizes_of(FULL, configuration)
    assert sizes.parameters / 1e9 == pytest.approx(30.5, abs=0.05)
    # Queries, keys, values and output; 8 experts' two matrices; a router.
    each = 3 * 2048 + (4096 + 2 * 512 + 2048 + 4096) + 8 * ((1536 + 2048) + (2048 + 768))
    assert sizes.kept == pytest.approx(48 * each, rel=0.02)


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
