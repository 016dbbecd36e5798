"""The embedded model as a Qwen2: the same weights, and biases of zero, so that Qwen2's code runs on real weights.

    python -m benchmarks.as_qwen2 FOLDER    # then: --set model=FOLDER

Qwen2 is Llama with biases on queries, keys and values; both give the same logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from finetune.files import replacing_folder
from finetune.model import smollm2

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "eos_token_id",
    "pad_token_id",
)


def main() -> None:
    """Write the folder."""
    source = smollm2.ensure()
    with replacing_folder(Path(sys.argv[1])) as beside:
        convert(AutoModelForCausalLM.from_pretrained(source)).save_pretrained(beside)
        AutoTokenizer.from_pretrained(source).save_pretrained(beside)


def convert(llama) -> Qwen2ForCausalLM:
    """A Llama's weights in a Qwen2, with biases of zero."""
    config = Qwen2Config(**{name: getattr(llama.config, name) for name in SHARED})
    model = Qwen2ForCausalLM(config).to(llama.dtype)
    model.load_state_dict(llama.state_dict() | _zero_biases(model))
    return model


def _zero_biases(model) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(bias) for name, bias in model.state_dict().items() if name.endswith("proj.bias")}


if __name__ == "__main__":
    main()
