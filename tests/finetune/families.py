"""Tiny models of many families with random weights, in their own configuration classes."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    # Large, so that a random model's answers depend on the article.
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Name to model type and configuration. Packed rows suit the first ones: each has a path of its own to its logits, or a
# router.
PACKED = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "capped": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "divided": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "multiplied": ("cohere", {"logit_scale": 0.3}),
    "learned positions": ("gpt2", {"attn_pdrop": 0.0}),
    "experts": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "experts of mixtral": ("mixtral", {"num_local_experts": 4}),
}
# In these, articles of one row would see each other, or further than their window.
PADDED = {
    "window": ("mistral", {"sliding_window": 16}),
    "state space": ("mamba", {"state_size": 4}),
    "convolution": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "hybrid": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    ),
    "own attention": ("falcon", {"new_decoder_architecture": True}),
}
FAMILIES = PACKED | PADDED


def tiny_family(name: str, tokenizer) -> PreTrainedModel:
    """The model of this name in fp32, in evaluation mode."""
    kind, changes = FAMILIES[name]
    tokens = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**COMMON | tokens | changes)).eval()
