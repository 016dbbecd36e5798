"""Unsloth: its import, its loading, and its attention sent to packed rows. The only module that knows its API."""

from __future__ import annotations

import functools
import os

import torch

from data_prep import UserError
from finetune import machine, paths
from finetune.config.plan import Settings
from finetune.config.recipes import Recipe
from finetune.model import packing
from finetune.model.hub import loading, model_path

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


def load_for_training(settings: Settings, checkpointing: str | bool):
    """The model as its method trains it; `checkpointing`: Unsloth's `use_gradient_checkpointing`."""
    from unsloth import FastLanguageModel

    recipe, path = settings.recipe, model_path(settings)
    with loading(path):
        model, _ = FastLanguageModel.from_pretrained(
            model_name=path,
            # Or it takes its own 4-bit file of a hub model, which quantises other layers than evaluation's base does.
            use_exact_model_name=True,
            max_seq_length=recipe.max_length,
            load_in_4bit=recipe.load_in_4bit,
            full_finetuning=not recipe.adapter,
            dtype=torch.bfloat16,
            # Unsloth's name for fp32 weights under bf16 products.
            float32_mixed_precision=recipe.dtype == "float32",
            use_gradient_checkpointing=checkpointing,
            offload_embedding=_offloads_embedding(recipe, bool(checkpointing)),
        )
    if not recipe.adapter:
        return model
    return FastLanguageModel.get_peft_model(
        model,
        r=recipe.r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        # It knows `all-linear` by other names.
        target_modules=ALL_LINEAR if recipe.target_modules == "all-linear" else recipe.target_modules,
        use_gradient_checkpointing=checkpointing,
        random_state=settings.experiment.seed,
    )


def _offloads_embedding(recipe: Recipe, checkpointing: bool) -> bool:
    if recipe.offload_embedding == "auto":
        # Where memory is short enough for checkpointing.
        return checkpointing and recipe.adapter and not machine.is_unified()
    return recipe.offload_embedding == "on"


class UnslothBackbone(packing.Backbone):
    """Unsloth's layers take no mask of four dimensions, and cut rows that are longer than max_seq_length, unless they
    are told that a row is packed."""

    def _keywords(self, row: packing.Row) -> dict[str, torch.Tensor]:
        return {"packed_seq_lengths": _one_document(row.input_ids.shape[1])}


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
