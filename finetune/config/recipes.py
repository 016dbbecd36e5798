"""The recipes: three siblings that differ only where the methods differ.

Defaults are the values of the experiment on a DGX Spark that this suite began with; a profile or an override may
replace any of them, and the table that every notebook prints says which one did.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from data_prep import UserError

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "adamw_8bit_stochastic", "adamw_4bit_stochastic"]


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """How a model is trained. Frozen: a run's recipe is what its record says."""

    adapter: bool
    """Train a LoRA adapter (Hu et al. 2021) and leave the base weights alone; otherwise train all weights."""
    engine: Literal["auto", "transformers", "unsloth"] = "auto"
    """What trains: Unsloth's kernels, transformers + TRL + PEFT; `auto`: Unsloth where CUDA is."""
    load_in_4bit: bool = False
    """Hold the base weights in 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023)."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    epochs: Positive = 1.0
    """Passes over the training rows."""
    batch_size: Count = 8
    """Articles in one forward pass."""
    gradient_accumulation_steps: Count = 4
    """Forward passes per optimiser step; an update sees batch_size x gradient_accumulation_steps articles."""
    max_length: Annotated[int, Field(ge=64)] = 512
    """Tokens of an article with its prompt and answer; a longer article is shortened, its answer never."""
    packing: bool = True
    """Join a batch into one row without padding, and compute once what all prompts begin with; changes no result."""
    supervise: Literal["answer", "all"] = "answer"
    """Which tokens carry loss: the answer's, or the prompt's and the article's too."""
    article_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the article's own loss beside the answer's, each a mean over tokens: language modelling as an auxiliary
    objective (Radford et al. 2018)."""
    label_smoothing: Share = 0.0
    """Share of each target that goes to the other tokens of the vocabulary (Szegedy et al. 2016)."""
    weights: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type that the model's weights are held in; `auto`: the type of the products. Adapters are always held in
    float32."""
    optimizer: Optimizer = "adamw_torch_fused"
    """AdamW; `adamw_8bit` (bitsandbytes) holds its two moments in a byte each, `adamw_8bit_stochastic` (torchao) also
    rounds bfloat16 weights up or down at random, so that small updates count on average; `adamw_4bit_stochastic` does
    the same with moments of half a byte."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_share: Share = 0.03
    """Share of the steps in which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    update_in_backward: bool = False
    """Update each weight as soon as the backward pass has its gradient, and free that (full fine-tuning, one pass per
    update): saves the memory of all gradients, and leaves them unclipped."""
    gradient_checkpointing: Literal["auto", "unsloth", "plain", "off"] = "auto"
    """Recompute activations in the backward pass to save memory; `auto`: only where they would not fit."""
    cuda_graphs: bool = False
    """Replay each step as one CUDA graph: several times the speed for small models, nothing for large ones."""
    fused_kernels: bool = True
    """Norms, rotary embeddings and the MLP's activation as one kernel each (Liger), where transformers trains on CUDA;
    Unsloth brings its own."""
    offload_embedding: Literal["auto", "on", "off"] = "auto"
    """Hold the frozen input embeddings in the host's memory (Unsloth; a gigabyte of a 7B model); `auto`: together with
    gradient checkpointing, where the GPU has a memory of its own."""
    cudnn_benchmark: bool = True
    """Let cuDNN time its algorithms and keep the fastest; it governs convolutions, and a GPU alone."""
    lora_rank: Count = 16
    """Rank of the adapter's matrices."""
    lora_alpha: Count = 32
    """The adapter's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: Share = 0.0
    """Dropout before the adapter; Unsloth's kernels need 0."""
    lora_targets: Literal["attention", "all-linear"] = "attention"
    """Which projections get an adapter: q, k, v and o, or the MLP's gate, up and down too."""
    evaluations: Count = 4
    """How often validation accuracy is measured during the training, the end included."""
    eval_on_start: bool = True
    """Measure it before the first step too; with CUDA graphs it always is."""
    saves: Annotated[int, Field(ge=0)] = 4
    """How often a checkpoint is written that an interrupted run resumes from; 0: never."""

    @property
    def method(self) -> str:
        if not self.adapter:
            return "full"
        return "qlora" if self.load_in_4bit else "lora"

    @property
    def target_modules(self) -> list[str]:
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        return attention if self.lora_targets == "attention" else [*attention, "gate_proj", "up_proj", "down_proj"]


# bfloat16 has 8 bits of precision: an update below 1/256 of a weight is lost. With fp32 weights the same run ended
# 4.1 points higher on AG News (SmolLM2-135M, 514 steps, learning rate 5e-5).
FULL = Recipe(adapter=False, engine="transformers", learning_rate=2e-5, weights="float32")
FULL_UNSLOTH = replace(FULL, engine="unsloth")
LORA = Recipe(adapter=True)
QLORA = replace(LORA, load_in_4bit=True)


def difference(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """The fields in which two recipes differ, with both values."""
    pairs = {field.name: (getattr(first, field.name), getattr(second, field.name)) for field in fields(Recipe)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check(recipe: Recipe, method: str) -> None:
    """Refuse a recipe that is not of its run's method, or that no engine can run."""
    if recipe.load_in_4bit and not recipe.adapter:
        raise UserError("load_in_4bit=True needs adapter=True: 4-bit weights cannot be trained themselves")
    if recipe.method != method:
        raise UserError(
            f"adapter={recipe.adapter} and load_in_4bit={recipe.load_in_4bit} make this a {recipe.method} run, "
            f"not {method}; choose the run instead"
        )
    if recipe.load_in_4bit and recipe.weights == "float32":
        raise UserError("load_in_4bit=True contradicts weights=float32")
    if not recipe.packing and (recipe.article_loss or recipe.label_smoothing):
        raise UserError("article_loss and label_smoothing need packing=True: the loss of padded batches is TRL's own")
    if recipe.update_in_backward:
        _check_update_in_backward(recipe)


def _check_update_in_backward(recipe: Recipe) -> None:
    if recipe.adapter:
        raise UserError("update_in_backward=True is for full fine-tuning: the gradients of an adapter are small")
    if recipe.gradient_accumulation_steps > 1:
        raise UserError("update_in_backward=True needs gradient_accumulation_steps=1: no gradient is kept to add to")
    if recipe.cuda_graphs or not recipe.packing:
        raise UserError("update_in_backward=True needs cuda_graphs=False and packing=True")
