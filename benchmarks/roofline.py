"""A roofline of the 7B shape: what a micro-batch asks of a GPU, and how long that takes.

A micro-batch takes the longer of two times (Williams et al. 2009, "Roofline"): its matrix products at a share of the
GPU's matrix peak, or the bytes that these products read and write at the memory's bandwidth. Other kernels move bytes
too: they unpack 4-bit weights, cast fp32 weights, add up gradients and update weights. Their time comes on top.

We count only products that are done. The input embeddings multiply nothing, and the head works only where there is
loss. So a share of the peak is lower here than in the ladder, which counts all N parameters for each token.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from benchmarks.ladder import QWEN_7B
from benchmarks.records import SpeedRecord
from data_prep import UserError
from finetune.config.recipes import Recipe

HIDDEN, INNER, LAYERS = (QWEN_7B[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
# Of keys and values, which several heads share.
SHARED = HIDDEN * QWEN_7B["num_key_value_heads"] // QWEN_7B["num_attention_heads"]
# Inputs and outputs of a layer's projections.
PROJECTIONS = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, SHARED), "v_proj": (HIDDEN, SHARED)}
PROJECTIONS |= {"o_proj": (HIDDEN, HIDDEN), "gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER)}
PROJECTIONS |= {"down_proj": (INNER, HIDDEN)}
# Parameters of all projections, which `load_in_4bit` holds in 4 bits.
LINEAR = LAYERS * sum(inputs * outputs for inputs, outputs in PROJECTIONS.values())
# Parameters of the head; the input embeddings have as many.
HEAD = QWEN_7B["vocab_size"] * HIDDEN
# With the biases of queries, keys and values, and the norms.
PARAMETERS = LINEAR + 2 * HEAD + LAYERS * (HIDDEN + 2 * SHARED) + (2 * LAYERS + 1) * HIDDEN
# Numbers that a token leaves for the backward pass: each projection's output, the inputs of both norms, attention's
# output, and the MLP's product before its last projection.
KEPT = LAYERS * (sum(outputs for _, outputs in PROJECTIONS.values()) + 3 * HIDDEN + INNER)
# `auto` is the type of the products; on a GPU, where memory is short, bfloat16.
BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}
# AdamW's two moments: in the trained weights' precision, or in what the optimiser's name says.
MOMENTS = 2
MOMENT_BYTES = {"adamw_8bit": 1, "adamw_torch_8bit": 1, "adamw_torch_4bit": 0.5}
# With the embedded tokenizer, {"category":"World"} and its eos are 6 tokens, as are two more labels; Sci/Tech has 8.
ANSWER_TOKENS = 6.5
# Scoring reads the logits before each label's first token, which all four share, and before its others (1 + 1 + 1 + 3).
SCORED_POSITIONS = 7
# Bytes of a 4-bit weight with its block constants (Dettmers et al. 2023), and of the bf16 copy that is multiplied.
PACKED, UNPACKED = 4.127 / 8, 2
# Memory bandwidth in bytes/s by a part of the GPU's name, and where the figure comes from.
BANDWIDTHS = {
    "H100": (3.0e12, "3.0 TB/s, measured with a device copy"),
    "H200": (4.3e12, "4.3 TB/s: the data sheet's 4.8, times the share of it that a copy reaches on an H100"),
}


@dataclass(frozen=True)
class Machine:
    """Matrix peak in FLOP/s, memory bandwidth in bytes/s."""

    peak: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """FLOP a byte from which on arithmetic takes longer than memory."""
        return self.peak / self.bandwidth


@dataclass(frozen=True)
class Work:
    """What a micro-batch asks of a GPU.

    Attributes:
        flops: FLOP of its matrix products.
        streamed: Bytes that these products read and write.
        apart: Bytes that other kernels move, with the micro-batch's part of the optimiser's update.
    """

    flops: float
    streamed: float
    apart: float

    def seconds(self, machine: Machine, share: float) -> float:
        """How long it takes where matrix products reach `share` of the peak."""
        products = max(self.flops / (machine.peak * share), self.streamed / machine.bandwidth)
        return products + self.apart / machine.bandwidth


def adapter_parameters(recipe: Recipe) -> int:
    """Parameters of a training's adapter; 0 without one."""
    targets = PROJECTIONS if recipe.target_modules == "all-linear" else recipe.target_modules
    return recipe.r * LAYERS * sum(sum(PROJECTIONS[name]) for name in targets) if recipe.adapter else 0


def activation_bytes(tokens: float, engine: str) -> int:
    """What the forward pass of `tokens` leaves for the backward pass in bf16, without checkpointing.

    Measured on an H100: 4.0 MB a token with Unsloth (this formula: 4.5) and 5.8 with PEFT, whose adapters keep copies
    in fp32.
    """
    return round(tokens * KEPT * 2 * (1.0 if engine == "unsloth" else 1.4))


def recomputes(recipe: Recipe) -> bool:
    """Whether the backward pass computes the activations again."""
    return recipe.gradient_checkpointing in ("plain", "unsloth")


def work_of(recipe: Recipe, articles: float, tokens: float) -> Work:
    """What one micro-batch asks for. Attention's own products are left out: at 270 tokens they are below 1 %.

    Args:
        recipe: What is trained, and how.
        articles: Articles in the micro-batch.
        tokens: Tokens computed for all of them.
    """
    layers, weights = LINEAR, PARAMETERS
    supervised = tokens if not recipe.completion_only_loss else ANSWER_TOKENS * articles
    # Forwards, backwards to the inputs, and forwards again where activations are recomputed.
    passes = 3 if recomputes(recipe) else 2
    # Backwards to the weights, where they are trained.
    trained = 0 if recipe.adapter else 1
    flops = 2 * layers * tokens * (passes + trained) + 2 * HEAD * supervised * (2 + trained)
    # Each pass reads the bf16 weights, and a trained weight's gradient is written. Activations are written, read on,
    # and read again in the backward pass.
    streamed = 2 * (layers * passes + HEAD * 2 + weights * trained)
    streamed += (2 * passes - 1) * activation_bytes(tokens, "unsloth")

    # An update reads the gradients three times (norm, clipping, optimiser) and writes them once. It reads and writes
    # weights and moments.
    updated = adapter_parameters(recipe) or weights
    each = 4 if recipe.adapter else BYTES[recipe.dtype]
    moments = MOMENTS * MOMENT_BYTES.get(recipe.optim, each)
    apart = updated * (4 * each + 2 * (each + moments)) / recipe.gradient_accumulation_steps
    if recipe.load_in_4bit:
        apart += layers * passes * (PACKED + UNPACKED)
    elif not recipe.adapter:
        # fp32 weights are cast to bf16, and their gradients back.
        apart += weights * 12 * (recipe.dtype == "float32")
        # The first micro-batch of an update leaves its gradients where they are; every other one adds its own.
        apart += weights * 3 * each * (1 - 1 / recipe.gradient_accumulation_steps)
    return Work(flops, streamed, apart)


def work_of_row(row: pd.Series) -> Work:
    """What a micro-batch of a measured training asked for."""
    articles = row.recipe.per_device_train_batch_size
    return work_of(row.recipe, articles, articles * row.computed_per_article)


def bandwidth(gpu: str) -> tuple[float, str]:
    """Bytes/s of a GPU's memory, and where the figure comes from.

    Raises:
        UserError: We do not know it.
    """
    for name, figure in BANDWIDTHS.items():
        if name in gpu:
            return figure
    raise UserError(f"the memory bandwidth of {gpu} is not known: add it to BANDWIDTHS in benchmarks/roofline.py")


def machine_of(record: SpeedRecord, row: pd.Series) -> Machine:
    """The GPU that a row was measured on, with the matrix peak of the row's own process."""
    return Machine(row.matrix_peak_tflops * 1e12, bandwidth(record.gpu)[0])


def share_of(record: SpeedRecord, row: pd.Series) -> float:
    """The share of the matrix peak at which the roofline gives the measured speed.

    Raises:
        UserError: The row was measured on another model, or is faster than the GPU can be.
    """
    if abs(row.parameters / PARAMETERS - 1) > 0.02:
        raise UserError(f"`{row.name}` was measured on {row.parameters:,.0f} parameters, not on all of the 7B shape")
    machine, work = machine_of(record, row), work_of_row(row)
    if row.seconds < work.seconds(machine, 1):
        limit = row.recipe.per_device_train_batch_size / work.seconds(machine, 1)
        raise UserError(
            f"`{row.name}` is faster than {limit:.0f} articles/s, all that this GPU could do: the measurement or the "
            "model in benchmarks/roofline.py is wrong"
        )
    return work.flops / (machine.peak * (row.seconds - work.apart / machine.bandwidth))


def scoring_ceiling(rows: pd.DataFrame) -> pd.Series:
    """Articles/s of scoring if its products ran at the whole matrix peak.

    2 FLOP a parameter of the layers for each computed token, and the head at the positions that predict a label.
    """
    flops = 2 * (rows.parameters - 2 * HEAD) * rows.computed_per_article + 2 * HEAD * SCORED_POSITIONS
    return rows.matrix_peak_tflops * 1e12 / flops
