"""Whether a training will fit, asked before it starts: on a machine whose GPU shares the host's memory, one that does
not fit freezes the host rather than fail.
"""

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
    held = model_bytes(recipe, configuration)
    activations = activation_bytes(configuration, longest, settings.engine)
    activations += logit_bytes(
        configuration, longest if _predicts_articles(recipe) else ANSWER * recipe.per_device_train_batch_size
    )
    available = machine.available_memory_bytes()
    fits = (held + activations) * (1 + RESERVE) < available
    return Checkpointing(
        "off" if fits else thrifty,
        f"activations of the {recipe.per_device_train_batch_size} longest articles take about "
        f"{activations / 1e9:.1f} GB beside "
        f"{held / 1e9:.1f} GB for the model, and {available / 1e9:.1f} GB are free",
    )


def model_bytes(recipe: Recipe, configuration) -> int:
    """Weights, gradients and optimiser of a training, from the model's configuration alone."""
    shape = shape_of(configuration)
    adapter = shape.adapter_parameters(recipe) if recipe.adapter else 0
    trainable = adapter or shape.parameters
    if recipe.load_in_4bit:
        # Half a byte and the block constants (Dettmers et al. 2023: 0.127 bit a parameter with double quantisation).
        weights = shape.in_layers * (4.127 / 8) + (shape.parameters - shape.in_layers) * 2
    else:
        # Of fp32 weights, autocast holds copies in bf16 until the backward pass is over.
        weights = shape.parameters * (BYTES[recipe.dtype] + (2 if recipe.dtype == "float32" else 0))
    weight = 4 if recipe.adapter else BYTES[recipe.dtype]
    still = still_needed_bytes(recipe.optim, weight, trainable, recipe.update_in_backward)
    return round(weights + adapter * 4 + still)


def activation_bytes(configuration, tokens: int, engine: str) -> int:
    """What the forward pass of `tokens` leaves for the backward pass, without checkpointing.

    Per token and layer, in bf16: the inputs of both norms and of the three groups of projections and the attention's
    output (6 hidden), keys and values, and three of the MLP's width. Measured for a 7B model on an H100: 4.0 MB a
    token with Unsloth (this formula: 4.5) and 5.8 with PEFT, whose adapters keep copies in fp32.
    """
    shape = shape_of(configuration)
    elements = shape.layers * (6 * shape.hidden + 2 * shape.keys + 3 * shape.intermediate)
    return round(tokens * elements * 2 * (1.0 if engine == "unsloth" else 1.4))


def logit_bytes(configuration, positions: int) -> int:
    """What the loss at `positions` tokens holds: logits in bf16 and fp32, and their gradients in fp32."""
    return positions * configuration.vocab_size * (2 + 4 + 4)


def _predicts_articles(recipe: Recipe) -> bool:
    return not recipe.completion_only_loss or recipe.article_loss > 0


@dataclass(frozen=True)
class Shape:
    """A Llama-like model's sizes."""

    hidden: int
    intermediate: int
    keys: int
    layers: int
    vocabulary: int
    tied: bool

    @property
    def in_layers(self) -> int:
        """Parameters of all projections."""
        return self.layers * (2 * self.hidden * (self.hidden + self.keys) + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        return self.in_layers + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(self, recipe: Recipe) -> int:
        """Two thin matrices beside each targeted projection: rank x (inputs + outputs)."""
        sides = {"q_proj": 2 * self.hidden, "k_proj": self.hidden + self.keys}
        sides |= {"v_proj": sides["k_proj"], "o_proj": sides["q_proj"]}
        sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), self.hidden + self.intermediate)
        names = sides if recipe.target_modules == "all-linear" else recipe.target_modules
        return self.layers * recipe.r * sum(sides[name] for name in names)


def shape_of(configuration) -> Shape:
    """The sizes of a Llama-like model, from its configuration."""
    return Shape(
        hidden=configuration.hidden_size,
        intermediate=configuration.intermediate_size,
        keys=configuration.hidden_size // configuration.num_attention_heads * configuration.num_key_value_heads,
        layers=configuration.num_hidden_layers,
        vocabulary=configuration.vocab_size,
        tied=configuration.tie_word_embeddings,
    )


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
