"""Shapes of well-known chat models: what a plan needs to know of a model without asking the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.config.embedded import NAME

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _qwen(
    width: int, mlp: int, layers: int, heads: int, key_heads: int, words: int = 151_936, tied: bool = True
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": words,
        "tie_word_embeddings": tied,
    }


# By the last part of a hub name, in transformers' words, as in each model's config.json.
SHAPES: dict[str, dict[str, Any]] = {
    NAME: _qwen(576, 1_536, 30, 9, 3, 49_152) | {"model_type": "llama"},
    "Qwen2.5-0.5B-Instruct": _qwen(896, 4_864, 24, 14, 2),
    "Qwen2.5-1.5B-Instruct": _qwen(1_536, 8_960, 28, 12, 2),
    "Qwen2.5-3B-Instruct": _qwen(2_048, 11_008, 36, 16, 2),
    "Qwen2.5-7B-Instruct": _qwen(3_584, 18_944, 28, 28, 4, 152_064, tied=False),
    "Qwen2.5-14B-Instruct": _qwen(5_120, 13_824, 48, 40, 8, 152_064, tied=False),
}


def configuration(shape: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' configuration of a shape."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[shape["model_type"]](**shape)
