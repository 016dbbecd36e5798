"""What training and scoring of the 7B shape ask of a GPU, and how long that takes: a roofline per micro-batch.

A micro-batch takes the longer of two times: its matrix products at a share of the GPU's matrix peak, or the bytes that
those products read and write at the memory's bandwidth (Williams et al. 2009, "Roofline"). What kernels of their own
move (4-bit weights unpacked, fp32 weights cast, gradients added up, the optimiser) overlaps with nothing and comes on
top.

Only products that are done count: the input embeddings multiply nothing, and the head works where there is loss. So a
share is lower here than by the ladder's rule, which counts all N parameters for each token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

from pydantic import ValidationError

from data_prep import UserError
from finetune import memory
from finetune.recipes import Recipe
from finetune.settings import RUNS
from finetune.throughput import Row, Throughput

# With the embedded tokenizer: {"category":"World"} and its eos are 6 tokens, as of two more labels; Sci/Tech's are 8.
ANSWER_TOKENS = 6.5
# Scoring reads the logits before each label's first token, shared by all four, and before its others (1 + 1 + 1 + 3).
SCORED_POSITIONS = 7
# Bytes of a 4-bit weight with its block constants (Dettmers et al. 2023), and of the bf16 copy that is multiplied.
PACKED, UNPACKED = 4.127 / 8, 2
# Bytes/s by a part of the GPU's name, and where the figure comes from.
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
        flops: Of its matrix products.
        streamed: Bytes that these read and write.
        apart: Bytes that kernels of their own move, its part of the update's included.
    """

    flops: float
    streamed: float
    apart: float

    def seconds(self, machine: Machine, share: float) -> float:
        """How long it takes where matrix products reach a share of the peak."""
        products = max(self.flops / (machine.peak * share), self.streamed / machine.bandwidth)
        return products + self.apart / machine.bandwidth

    def share_apart(self, machine: Machine, share: float) -> float:
        """The share of the time that goes to kernels of their own."""
        return self.apart / machine.bandwidth / self.seconds(machine, share)


@functools.cache
def configuration():
    """Qwen2.5-7B's (config.json of Qwen/Qwen2.5-7B-Instruct)."""
    # Not at the top: Unsloth wants to come before it.
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=3_584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )


def shape() -> memory.Shape:
    return memory.shape_of(configuration())


def head() -> int:
    """Parameters of the head, and as many of the input embeddings."""
    return shape().vocabulary * shape().hidden


def in_layers(row: Row) -> int:
    """Parameters of a row's model without input embeddings and head."""
    return row.parameters - 2 * head()


def recipe_of(run: str, values: dict[str, Any]) -> Recipe:
    """A run's recipe with those of `values` that are a recipe's.

    Raises:
        UserError: One is none that this version's recipes may have.
    """
    names = {field.name for field in fields(Recipe)}
    try:
        return replace(RUNS[run], **{name: value for name, value in values.items() if name in names})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{first['loc'][0]}={first['input']!r} of a {run} row is not possible in this version: {first['msg']}; "
            "measure again"
        ) from error


def recomputes(recipe: Recipe) -> bool:
    """Whether the forward pass runs again in the backward one."""
    return recipe.gradient_checkpointing in ("plain", "unsloth")


def work_of(recipe: Recipe, articles: float, tokens: float) -> Work:
    """What one micro-batch asks for.

    Per parameter of the layers and computed token 2 FLOP forwards and 2 for the inputs' gradients, 2 more for the
    weights' where these are trained, and the forward ones again where activations are recomputed; the head likewise,
    at the positions that carry loss. Weights are read once in each of these, in bf16, and weights' gradients written;
    activations are written, read on, and read again in the backward pass. Attention's own products are left out: at
    270 tokens they are less than a hundredth.

    Args:
        recipe: What is trained, and how.
        articles: In the micro-batch.
        tokens: Computed for all of them.
    """
    layers = shape().in_layers
    supervised = tokens if recipe.supervise == "all" else ANSWER_TOKENS * articles
    reads = 3 if recomputes(recipe) else 2
    trained = 0 if recipe.adapter else 1
    flops = 2 * layers * tokens * (reads + trained) + 2 * head() * supervised * (2 + trained)
    weights = 2 * (layers * reads + head() * 2 + shape().parameters * trained)
    activations = (2 * reads - 1) * memory.activation_bytes(configuration(), tokens, "unsloth")
    return Work(flops, weights + activations, _bytes_apart(recipe, reads))


def _bytes_apart(recipe: Recipe, reads: int) -> float:
    """Bytes that kernels of their own move in a micro-batch."""
    update = _update_bytes(recipe) / recipe.gradient_accumulation_steps
    if recipe.load_in_4bit:
        # Each pass over the weights unpacks them anew.
        return update + shape().in_layers * reads * (PACKED + UNPACKED)
    if recipe.adapter:
        return update
    # Each weight to bf16 and its gradient back.
    casts = (4 + 2) + (2 + 4) if recipe.weights == "float32" else 0
    # The first micro-batch of an update leaves its gradients where they are; every other adds its own to them.
    added = 3 * memory.BYTES[recipe.weights] * (1 - 1 / recipe.gradient_accumulation_steps)
    return update + shape().parameters * (casts + added)


def _update_bytes(recipe: Recipe) -> float:
    """Bytes that an update moves: the gradients' norm, the clipped gradients, weights and moments."""
    trained = shape().adapter_parameters(recipe) if recipe.adapter else shape().parameters
    weights = trained * (4 if recipe.adapter else memory.BYTES[recipe.weights])
    moments = memory.still_needed_bytes(recipe, trained) - weights
    # Gradients are read three times and written once; weights and moments are read and written.
    return 4 * weights + 2 * (weights + moments)


def scoring_ceiling(row: Row) -> float | None:
    """Articles/s of scoring if its matrix products ran at the whole matrix peak; None where the row lacks a figure.

    2 FLOP a parameter of the layers for each computed token, and the head at the positions that predict a label.
    """
    if None in (row.parameters, row.computed_per_second, row.matrix_peak_tflops):
        return None
    flops = 2 * in_layers(row) * row.computed_per_article + 2 * head() * SCORED_POSITIONS
    return row.matrix_peak_tflops * 1e12 / flops


def bandwidth(found: Throughput) -> tuple[float, str]:
    """Bytes/s of the GPU that a file was measured on, and where the figure comes from.

    Raises:
        UserError: It is not known here.
    """
    gpu = str(found.environment.hardware["gpu"])
    known = next((figure for name, figure in BANDWIDTHS.items() if name in gpu), None)
    if known is None:
        raise UserError(f"the memory bandwidth of {gpu} is not known: add it to BANDWIDTHS in finetune/roofline.py")
    return known


def machine_of(found: Throughput, row: Row) -> Machine:
    """The GPU that a row was measured on."""
    return Machine(row.matrix_peak_tflops * 1e12, bandwidth(found)[0])


def micro_batch(row: Row) -> int:
    """Articles in a micro-batch of a row."""
    return recipe_of(row.run, row.overrides).batch_size


def work_of_row(row: Row) -> Work:
    """What a micro-batch of a row asked for."""
    return work_of(recipe_of(row.run, row.overrides), micro_batch(row), micro_batch(row) * row.computed_per_article)


def seconds_of(row: Row) -> float:
    """How long a micro-batch of a row took."""
    return micro_batch(row) / row.articles_per_second


def speed_in(row: Row, seconds: float) -> float:
    """Articles/s of a row if its micro-batches took so long."""
    return micro_batch(row) / seconds


def share_of(row: Row, machine: Machine) -> float:
    """The share of the matrix peak at which the roofline gives the speed that was measured.

    Raises:
        UserError: There is none: the row is of another model, or faster than the GPU can be.
    """
    if abs(row.parameters / shape().parameters - 1) > 0.02:
        raise UserError(f"{row.key} was measured on {row.parameters:,} parameters, not on all of the 7B shape")
    work = work_of_row(row)
    if seconds_of(row) < work.seconds(machine, 1):
        raise UserError(
            f"{row.key} is faster than {speed_in(row, work.seconds(machine, 1)):.0f} articles/s, all that this GPU "
            "could do: the measurement, or the model in finetune/roofline.py, is wrong"
        )
    return work.flops / (machine.peak * (seconds_of(row) - work.apart / machine.bandwidth))
