"""Tiny models of many families with random weights, in their own configuration classes."""

from __future__ import annotations

from transformers import PreTrainedModel

from benchmarks.families import EXPERTS, tiny_model

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
    "chunks": (
        "llama4_text",
        {"attention_chunk_size": 16, "layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2}
        | {"head_dim": 8, "intermediate_size_mlp": 64},
    ),
    "sinks": ("gpt_oss", {"num_local_experts": 4, "head_dim": 8, "tie_word_embeddings": False}),
    "own attention": ("falcon", {"new_decoder_architecture": True}),
}
FAMILIES = PACKED | PADDED


def tiny_family(name: str, tokenizer) -> PreTrainedModel:
    """The model of this name in fp32, in evaluation mode."""
    return tiny_model(*FAMILIES[name], tokenizer)
