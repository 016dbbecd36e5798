"""Unsloth: its import, its loading, and its attention sent to packed rows. The only module that knows its API."""

from __future__ import annotations

import functools
import os
import weakref
from typing import TYPE_CHECKING, Literal

import torch

from data_prep import UserError
from finetune import paths
from finetune.model import packing
from finetune.model.hub import loading

if TYPE_CHECKING:
    from peft import LoraConfig

# `use_gradient_checkpointing` of Unsloth.
CHECKPOINTING = {"unsloth": "unsloth", "plain": True, "off": False}
# It knows `all-linear` by the projections' names.
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@functools.cache
def import_unsloth() -> None:
    """Import Unsloth, which patches transformers, peft and trl: before they are imported elsewhere.

    Raises:
        UserError: It is not installed.
    """
    # It writes the trainers that it generates to the working folder otherwise, beside the notebooks.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(paths.home().resolve() / "checkpoints" / ".unsloth"))
    try:
        import unsloth  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"CUDA is present but Unsloth cannot be imported ({error}); use the container (./start_docker.sh start "
            "finetune) or install requirements/gpu.txt"
        ) from error
    _route_unsloth_attention()


# Models that Unsloth loaded, with the gradient checkpointing that they were loaded for.
_LOADED: weakref.WeakKeyDictionary[torch.nn.Module, str | bool] = weakref.WeakKeyDictionary()


def has_loaded(model: torch.nn.Module) -> bool:
    """Whether Unsloth loaded a model, or the one that an adapter was put on."""
    return checkpointing(model) is not None


def checkpointing(model: torch.nn.Module) -> str | bool | None:
    """Unsloth's gradient checkpointing that a model was loaded for; None if Unsloth did not load it."""
    return next((_LOADED[module] for module in model.modules() if module in _LOADED), None)


def from_pretrained(
    path: str,
    dtype: str,
    load_in_4bit: bool,
    *,
    max_length: int,
    full_finetuning: bool,
    gradient_checkpointing: Literal["unsloth", "plain", "off"],
    offload_embedding: bool,
):
    """A model with Unsloth's layers.

    Args:
        path: A hub name or a folder.
        dtype: `float32`: weights in fp32 under bf16 products.
        load_in_4bit: Hold the weights in 4-bit NormalFloat.
        max_length: Tokens of the longest row.
        full_finetuning: Train all weights; otherwise an adapter will be added.
        gradient_checkpointing: Recompute activations, with Unsloth's own or PyTorch's checkpointing, or not.
        offload_embedding: Hold the input embeddings in the host's memory.
    """
    from unsloth import FastLanguageModel

    with loading(path):
        model, _ = FastLanguageModel.from_pretrained(
            model_name=path,
            # Or it takes its own 4-bit file of a hub model, which quantises other layers than evaluation's base does.
            use_exact_model_name=True,
            max_seq_length=max_length,
            load_in_4bit=load_in_4bit,
            full_finetuning=full_finetuning,
            dtype=torch.bfloat16,
            # Unsloth's name for fp32 weights under bf16 products.
            float32_mixed_precision=dtype == "float32",
            use_gradient_checkpointing=CHECKPOINTING[gradient_checkpointing],
            offload_embedding=offload_embedding,
        )
    _LOADED[model] = CHECKPOINTING[gradient_checkpointing]
    return model


def add_lora(model, config: LoraConfig):
    """Unsloth's `get_peft_model`; the adapter begins at the seed that torch was given last."""
    from unsloth import FastLanguageModel

    all_linear = config.target_modules == "all-linear"
    return FastLanguageModel.get_peft_model(
        model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=ALL_LINEAR if all_linear else sorted(config.target_modules),
        use_rslora=config.use_rslora,
        use_gradient_checkpointing=_LOADED[model],
        random_state=torch.initial_seed(),
    )


class UnslothBackbone(packing.Backbone):
    """Unsloth's layers take no mask of four dimensions, and cut rows that are longer than max_seq_length, unless they
    are told that a row is packed."""

    runs_in_fp32 = False

    def _logits(self, row: packing.Row, **tokens: torch.Tensor) -> torch.Tensor:
        # Not through its CausalLM: that rounds fp32 logits to bf16.
        documents = _one_document(row.input_ids.shape[1])
        output = self.decoder(**tokens, position_ids=row.position_ids, use_cache=False, packed_seq_lengths=documents)
        return self.head(output.last_hidden_state)


@functools.cache
def _one_document(tokens: int) -> torch.Tensor:
    # The same tensor for the same length: Unsloth copies what it derives from it to the GPU when it sees a new one,
    # which a CUDA graph cannot record.
    return torch.tensor([tokens], dtype=torch.int32)


def _route_unsloth_attention() -> None:
    """Send packed rows from Unsloth's layers to `packing`; everything else stays as it is.

    Unsloth (2026.10.9) has no switch for it: without flash-attn and xformers, and with a torch older than 2.12, it runs
    one kernel per article and layer, which on an H100 made LoRA of a 7B model slower than plain TRL; and its own
    rows know no common beginning. Its layers of Llama and Qwen2 call this function; a model of another family fails the
    isolation check.
    """
    from unsloth.models import llama

    unsloth_attention = llama.run_attention

    def run_attention(*, config, context, Q, K, V):
        row = packing.active()
        if row is None:
            return unsloth_attention(config=config, context=context, Q=Q, K=K, V=V)
        return packing.attend(Q, K, V, row, scale=None)

    llama.run_attention = run_attention
