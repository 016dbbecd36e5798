"""The recipes: one for each method, which differ only where the methods differ.

Defaults are the values of the experiment on a DGX Spark that this suite began with, but for `max_length`; a profile or
an override may replace any of them, and the table that every notebook prints says which one did.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from data_prep import UserError

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# Of training and evaluation alike. No article of AG News comes near it; a prompt with 77 classes takes 564 tokens.
MAX_LENGTH = 1024
# Parameters that mean nothing where all weights are trained.
ADAPTER_ONLY = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "task_type"}
# What makes a recipe one of its method, and no other: an override cannot change it.
DEFINING = ("adapter", "load_in_4bit", "use_dora", "task_type")
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit"]


def _names(value: Any) -> Any:
    """Names of modules; `q_proj,v_proj` is how a command line writes them."""
    if isinstance(value, str) and value != "all-linear":
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """How a model is trained. Frozen: a run's recipe is what its record says."""

    adapter: bool
    """Train a LoRA adapter (Hu et al. 2021) and leave the base weights alone; otherwise train all weights."""
    engine: Literal["auto", "transformers", "unsloth"] = "auto"
    """What trains: Unsloth, or transformers with TRL and PEFT; `auto`: Unsloth where there is CUDA."""
    load_in_4bit: bool = False
    """Hold the base weights in 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023)."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    num_train_epochs: Positive = 1.0
    """Passes over the training rows."""
    per_device_train_batch_size: Count = 8
    """Articles in one forward pass."""
    gradient_accumulation_steps: Count = 4
    """Forward passes per optimiser step. An update sees this many times per_device_train_batch_size articles."""
    max_length: Annotated[int, Field(ge=64)] = MAX_LENGTH
    """Most tokens of an article with its prompt and answer. We shorten a longer article, never its answer."""
    packing: bool = True
    """Join a batch into one row without padding, and compute the prompts' common beginning once; changes no result."""
    completion_only_loss: bool = True
    """Only the answer's tokens carry loss; False: all tokens do."""
    article_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an auxiliary loss: language modelling of the article (Radford et al. 2018). Both losses are means over
    their tokens."""
    label_smoothing_factor: Share = 0.0
    """Share of each target that goes to the other tokens of the vocabulary (Szegedy et al. 2016)."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the model's weights; `auto`: the type of the matrix products. An adapter's weights are always float32."""
    optim: Optimizer = "adamw_torch_fused"
    """AdamW; `adamw_8bit` (bitsandbytes) and `adamw_torch_8bit` (torchao) hold its two moments in a byte each,
    `adamw_torch_4bit` in half a byte."""
    optim_args: str | None = None
    """Options of the optimiser. torchao's have `bf16_stochastic_round=True`: bfloat16 weights are rounded up or down at
    random, so that small updates count on average."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Schedule of the learning rate after the warm-up."""
    warmup_steps: Share = 0.03
    """Share of all steps in which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    update_in_backward: bool = False
    """Update each weight in the backward pass, and free its gradient. That saves the gradients' memory; they are not
    clipped. For full fine-tuning with one pass per update."""
    gradient_checkpointing: Literal["auto", "unsloth", "plain", "off"] = "auto"
    """Recompute activations in the backward pass to save memory; `auto`: only if they would not fit."""
    cuda_graphs: bool = False
    """Replay each step as one CUDA graph. Small models get several times faster, large ones no faster."""
    use_liger_kernel: bool = True
    """Liger's fused kernels for norms, rotary embeddings and the MLP's activation, where transformers trains on CUDA;
    Unsloth has its own."""
    offload_embedding: Literal["auto", "on", "off"] = "auto"
    """Keep the frozen input embeddings in the host's memory (Unsloth; a gigabyte of a 7B model); `auto`: with gradient
    checkpointing, if the GPU has its own memory."""
    cudnn_benchmark: bool = True
    """Let cuDNN time its algorithms and keep the fastest; only for convolutions on a GPU."""
    r: Count = 16
    """Rank of the adapter's matrices."""
    lora_alpha: Count | None = None
    """The adapter's output is scaled by lora_alpha / r. Twice `r` if not given."""
    lora_dropout: Share = 0.0
    """Dropout before the adapter; Unsloth's kernels need 0."""
    target_modules: Annotated[list[str] | Literal["all-linear"], BeforeValidator(_names)] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    """Which projections get an adapter: their names, or `all-linear` for all but the output layer."""
    use_dora: bool = False
    """Train a magnitude for each output too (DoRA, Liu et al. 2024)."""
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
    """PEFT's name for what the model is: a language model that writes the label, or one with a classification head."""
    eval_steps: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the steps between two measurements of validation accuracy; we also measure at the end."""
    eval_on_start: bool = True
    """Measure validation accuracy before the first step too; with CUDA graphs we always do."""
    save_steps: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the steps between two checkpoints; 0: only when a training is interrupted."""
    load_best_model_at_end: bool = False
    """Keep the weights with the highest validation accuracy, not the last ones. We then save a checkpoint at each
    measurement."""
    early_stopping_patience: Count | None = None
    """End the training after so many measurements without a new highest validation accuracy; needs
    load_best_model_at_end."""


# bfloat16 has 8 bits of precision: an update below 1/256 of a weight is lost. With fp32 weights the same run ended
# 4.1 points higher on AG News (SmolLM2-135M, 514 steps, learning rate 5e-5).
FULL = Recipe(adapter=False, engine="transformers", learning_rate=2e-5, dtype="float32")
FULL_UNSLOTH = replace(FULL, engine="unsloth")
LORA = Recipe(adapter=True)
QLORA = replace(LORA, load_in_4bit=True)
# Unsloth has no kernels for the magnitudes.
DORA = replace(LORA, use_dora=True, engine="transformers")
# A head reads padded batches; Unsloth's layers here read packed rows.
HEAD = replace(LORA, task_type="SEQ_CLS", engine="transformers", packing=False)


def check(recipe: Recipe, run: str, its_own: Recipe) -> None:
    """Refuse a recipe that is not of its run's method, or that no engine can run.

    Args:
        recipe: What was asked for.
        run: The run's name.
        its_own: The recipe that the run is registered with.

    Raises:
        UserError: With what contradicts what.
    """
    for name in DEFINING:
        if getattr(recipe, name) != getattr(its_own, name):
            raise UserError(f"{name}={getattr(recipe, name)} is another method than {run}; choose another run instead")
    if recipe.load_in_4bit and recipe.dtype == "float32":
        raise UserError("load_in_4bit=True contradicts dtype=float32: set dtype=auto")
    if recipe.task_type == "SEQ_CLS":
        asked = {name: getattr(recipe, name) for name in ("packing", "article_loss", "cuda_graphs")}
        if wrong := [f"{name}={value}" for name, value in asked.items() if value]:
            raise UserError(f"{wrong[0]} is for models that write: leave it out for a classification head")
        if recipe.engine == "unsloth":
            raise UserError("a classification head needs engine=transformers: Unsloth's layers here read packed rows")
    if not recipe.packing and (recipe.article_loss or recipe.label_smoothing_factor):
        raise UserError("article_loss and label_smoothing_factor need packing=True: padded batches have TRL's own loss")
    if recipe.early_stopping_patience and not recipe.load_best_model_at_end:
        raise UserError("early_stopping_patience needs load_best_model_at_end=True: the last weights are not the best")
    if not recipe.update_in_backward:
        return
    if recipe.adapter:
        raise UserError("update_in_backward=True is for full fine-tuning: leave it out here")
    if recipe.gradient_accumulation_steps > 1:
        raise UserError("update_in_backward=True needs gradient_accumulation_steps=1: no gradient is kept to add to")
    if recipe.cuda_graphs or not recipe.packing:
        raise UserError("update_in_backward=True needs cuda_graphs=False and packing=True")
