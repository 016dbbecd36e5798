"""Whether a training will fit, before it starts: where GPU and host share memory, a training too large freezes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from data_prep import UserError
from finetune import machine
from finetune.config.plan import Settings
from finetune.config.recipes import Recipe

if TYPE_CHECKING:
    import torch
    from trl import SFTConfig

# `auto` is the type of the products; on a GPU, where memory is short, bfloat16.
BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}
# AdamW's two moments: in the trained weights' precision, or in what the optimiser's name says.
MOMENTS = 2
MOMENT_BYTES = {"adamw_8bit": 1, "adamw_torch_8bit": 1, "adamw_torch_4bit": 0.5}
# Tokens of an answer.
ANSWER = 10
# Memory that nothing here foresees: the allocator's fragments, kernels' workspaces, the CUDA context.
RESERVE = 0.1


@dataclass(frozen=True)
class Checkpointing:
    """Whether activations are kept or computed again in the backward pass, and why."""

    mode: Literal["unsloth", "plain", "off"]
    reason: str


def choose_checkpointing(settings: Settings, configuration, lengths: Sequence[int]) -> Checkpointing:
    """Keep activations where they fit into the memory that is free, before the model is loaded.

    Args:
        settings: The run; a recipe that names a mode is followed.
        configuration: The model's, of transformers.
        lengths: Tokens of every training row.
    """
    recipe = settings.recipe
    thrifty = "unsloth" if settings.engine == "unsloth" else "plain"
    if recipe.gradient_checkpointing == "unsloth" and settings.engine != "unsloth":
        return Checkpointing("plain", "Unsloth's needs the Unsloth engine")
    if recipe.gradient_checkpointing != "auto":
        return Checkpointing(recipe.gradient_checkpointing, f"set by {settings.origins['gradient_checkpointing']}")
    longest = sum(sorted(lengths)[-recipe.per_device_train_batch_size :])
    sizes = sizes_of(recipe, configuration)
    held = model_bytes(recipe, sizes)
    predicts_articles = not recipe.completion_only_loss or recipe.article_loss > 0
    positions = longest if predicts_articles else ANSWER * recipe.per_device_train_batch_size
    activations = activation_bytes(sizes, longest, settings.engine)
    activations += logit_bytes(configuration.get_text_config().vocab_size, positions)
    available = machine.available_memory_bytes()
    fits = (held + activations) * (1 + RESERVE) < available
    return Checkpointing(
        "off" if fits else thrifty,
        f"activations of the {recipe.per_device_train_batch_size} longest articles take about "
        f"{activations / 1e9:.1f} GB beside "
        f"{held / 1e9:.1f} GB for the model, and {available / 1e9:.1f} GB are free",
    )


@dataclass(frozen=True)
class Sizes:
    """What a model's modules say of its memory.

    Attributes:
        parameters: All of them.
        quantized: Those of the linear layers, which `load_in_4bit` holds in 4 bits.
        adapter: Parameters of an adapter, 0 without one.
        kept: Numbers that the forward pass of one token leaves for the backward pass.
    """

    parameters: int
    quantized: int
    adapter: int
    kept: int


def sizes_of(recipe: Recipe, configuration) -> Sizes:
    """Counted on the meta device, which allocates nothing: any architecture that transformers builds.

    A layer leaves the output of each projection, the inputs of both norms and the attention's output (3 hidden), and
    the MLP's product before its last projection. A mixture of experts leaves so much for each expert of a token.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    text = configuration.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration)
    linear = {
        name: module
        for name, module in model.named_modules()
        # GPT-2's Conv1D is a linear layer, its weight transposed.
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    }
    everywhere = recipe.adapter and recipe.target_modules == "all-linear"
    adapted = [
        module
        for name, module in linear.items()
        if recipe.adapter and (everywhere or name.rpartition(".")[2] in recipe.target_modules)
    ]
    kept = 3 * text.hidden_size * text.num_hidden_layers
    for module in linear.values():
        inputs, outputs = reversed(module.weight.shape) if isinstance(module, torch.nn.Linear) else module.weight.shape
        kept += outputs + (inputs if inputs != text.hidden_size else 0)
    for name, parameter in model.named_parameters():
        # The experts of a layer are one tensor: experts x outputs x inputs. Where a configuration does not say how
        # many of them a token sees, we assume all.
        if ".experts." in name and parameter.dim() == 3:
            kept += getattr(text, "num_experts_per_tok", len(parameter)) * sum(parameter.shape[1:])
    return Sizes(
        parameters=model.num_parameters(),
        quantized=sum(module.weight.numel() for module in linear.values()),
        adapter=recipe.r * sum(sum(module.weight.shape) for module in adapted) if adapted else 0,
        kept=kept,
    )


def model_bytes(recipe: Recipe, sizes: Sizes) -> int:
    """Weights, gradients and optimiser of a training."""
    trainable = sizes.adapter or sizes.parameters
    if recipe.load_in_4bit:
        # Half a byte and the block constants (Dettmers et al. 2023: 0.127 bit a parameter with double quantisation).
        weights = sizes.quantized * (4.127 / 8) + (sizes.parameters - sizes.quantized) * 2
    else:
        # Of fp32 weights, autocast holds copies in bf16 until the backward pass is over.
        weights = sizes.parameters * (BYTES[recipe.dtype] + (2 if recipe.dtype == "float32" else 0))
    weight = 4 if recipe.adapter else BYTES[recipe.dtype]
    still = still_needed_bytes(recipe.optim, weight, trainable, recipe.update_in_backward)
    return round(weights + sizes.adapter * 4 + still)


def activation_bytes(sizes: Sizes, tokens: int, engine: str) -> int:
    """What the forward pass of `tokens` leaves for the backward pass in bf16, without checkpointing.

    Measured for a 7B model on an H100: 4.0 MB a token with Unsloth (this formula: 4.5) and 5.8 with PEFT, whose
    adapters keep copies in fp32.
    """
    return round(tokens * sizes.kept * 2 * (1.0 if engine == "unsloth" else 1.4))


def logit_bytes(vocabulary: int, positions: int) -> int:
    """What the loss at `positions` tokens holds: logits in bf16 and fp32, and their gradients in fp32."""
    return positions * vocabulary * (2 + 4 + 4)


def still_needed_bytes(optim: str, weight: int, trainable_parameters: int, update_in_backward: bool = False) -> int:
    """What gradients and optimiser will take, once the model is loaded; activations come on top.

    Args:
        optim: The optimiser's name.
        weight: Bytes of a trained weight, and so of its gradient.
        trainable_parameters: How many are trained.
        update_in_backward: Gradients are used and freed one by one.
    """
    gradient = 0 if update_in_backward else weight
    return round(trainable_parameters * (gradient + MOMENTS * MOMENT_BYTES.get(optim, weight)))


def require_room(args: SFTConfig, trained: Sequence[torch.nn.Parameter], update_in_backward: bool) -> str:
    """What is needed and what is there, in words, with the model already loaded.

    Raises:
        UserError: It cannot fit, whatever the activations take.
    """
    parameters = sum(parameter.numel() for parameter in trained)
    weight = max((parameter.element_size() for parameter in trained), default=4)
    needed = still_needed_bytes(args.optim.value, weight, parameters, update_in_backward)
    available = machine.available_memory_bytes()
    shared = ", shared by CPU and GPU" if machine.is_unified() else ""
    text = (
        f"{needed / 1e9:.1f} GB for gradients and optimiser, activations on top; {available / 1e9:.1f} GB free{shared}"
    )
    if needed > available:
        raise UserError(
            f"this training cannot fit: {text}. Use LoRA or QLoRA, optim=adamw_8bit, or end other programs and kernels"
        )
    return text
