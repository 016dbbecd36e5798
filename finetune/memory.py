"""Whether a training will fit, asked before it starts: on a machine whose GPU shares the host's memory, one that does
not fit freezes the host rather than fail."""

from __future__ import annotations

from data_prep import UserError
from finetune import hardware
from finetune.recipes import Recipe

BYTES = {"bfloat16": 2, "float32": 4}
# AdamW's two moments: in the trained weights' precision, or a byte each with bitsandbytes' 8-bit optimiser.
MOMENTS = 2


def still_needed_bytes(recipe: Recipe, trainable_parameters: int) -> int:
    """What gradients and optimiser will take, once the model is loaded; activations come on top.

    PEFT holds adapters in fp32 and TRL those of a 4-bit base in bf16; fp32 is the safe assumption for both.
    """
    weight = 4 if recipe.adapter else BYTES[recipe.weights]
    moment = 1 if recipe.optimizer == "adamw_8bit" else weight
    return trainable_parameters * (weight + MOMENTS * moment)


def require_room(recipe: Recipe, trainable_parameters: int) -> str:
    """What is needed and what is there, in words, with the model already loaded.

    Raises:
        UserError: It cannot fit, whatever the activations take.
    """
    needed, available = still_needed_bytes(recipe, trainable_parameters), hardware.available_memory_bytes()
    shared = ", shared by CPU and GPU" if hardware.is_unified() else ""
    text = (
        f"{needed / 1e9:.1f} GB for gradients and optimiser, activations on top; {available / 1e9:.1f} GB free{shared}"
    )
    if needed > available:
        raise UserError(
            f"this training cannot fit: {text}. Use LoRA or QLoRA, optimizer=adamw_8bit, or end other programs and "
            "kernels"
        )
    return text
