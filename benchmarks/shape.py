"""Sizes of a model by formula: what the roofline counts with. finetune/train/simulate.py is nearer, and slower."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.recipes import Recipe

# `auto` is the type of the products; on a GPU, where memory is short, bfloat16.
BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}
# AdamW's two moments: in the trained weights' precision, or in what the optimiser's name says.
MOMENTS = 2
MOMENT_BYTES = {"adamw_8bit": 1, "adamw_torch_8bit": 1, "adamw_torch_4bit": 0.5}
# Memory that nothing here foresees: the allocator's fragments, kernels' workspaces, the CUDA context.
RESERVE = 0.1


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
    gradient = 0 if recipe.update_in_backward else weight
    still = trainable * (gradient + MOMENTS * MOMENT_BYTES.get(recipe.optim, weight))
    return round(weights + sizes.adapter * 4 + round(still))


def activation_bytes(sizes: Sizes, tokens: int, engine: str) -> int:
    """What the forward pass of `tokens` leaves for the backward pass in bf16, without checkpointing.

    Measured for a 7B model on an H100: 4.0 MB a token with Unsloth (this formula: 4.5) and 5.8 with PEFT, whose
    adapters keep copies in fp32.
    """
    return round(tokens * sizes.kept * 2 * (1.0 if engine == "unsloth" else 1.4))
