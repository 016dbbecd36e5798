"""Hours on a GB10 (DGX Spark), predicted: its roofline, at the shares of the matrix peak that another GPU reached."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from benchmarks.records import SpeedRecord, recipe_of
from benchmarks.roofline import (
    BYTES,
    HIDDEN,
    LAYERS,
    LINEAR,
    MOMENT_BYTES,
    MOMENTS,
    PACKED,
    PARAMETERS,
    Machine,
    activation_bytes,
    adapter_parameters,
    bandwidth,
    machine_of,
    recomputes,
    share_of,
    work_of,
    work_of_row,
)
from data_prep import UserError
from finetune.config.profiles import PROFILES
from finetune.config.recipes import Recipe

GIB = 2**30
# Articles of an epoch of AG News.
ARTICLES = 120_000
# An owner measured 93 to 97 TFLOP/s in a large bf16 product. The data sheet gives 273 GB/s; at worst a copy reaches the
# share of it that it reaches on an H100 (3.0 of 3.35 TB/s).
FAST, SLOW = Machine(97e12, 273e9), Machine(93e12, 273e9 * 3.0 / 3.35)
MEMORY_BYTES = 121.69 * GIB
# Memory that nothing here foresees: the allocator's fragments, kernels' workspaces, the CUDA context.
RESERVE = 0.1
# The same articles with the lean prompt, with its beginning shared, and with the verbose prompt: they give the lengths.
LENGTH_ROWS = ("lean", "shared", "answer")
# What others trained on a GB10, and their hours: 8 x 4 rows of 512 tokens without padding.
OTHERS_SETUP = {
    "completion_only_loss": False,
    "gradient_checkpointing": "plain",
    "dtype": "bfloat16",
    "optim": "adamw_8bit",
}
OTHERS_TOKENS = 8 * 512
OTHERS = {"full": "about 10 h; 8 h 36 min", "LoRA": "5 h 51 min"}


@dataclass(frozen=True)
class Method:
    """A run of the `spark` profile, with `changes`.

    Attributes:
        kept: Keys of rows that give its share of the peak where activations are kept; largest micro-batches first.
        recomputing: The same where activations are recomputed; best first.
        checks: Keys of rows that the roofline is checked against.
    """

    run: str
    kept: tuple[str, ...]
    recomputing: tuple[str, ...]
    checks: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    def sources(self, record: SpeedRecord, recipe: Recipe) -> list[pd.Series]:
        """The rows that a recipe's share comes from: the first at best, the last at worst.

        Small micro-batches fill a large GPU less well. How well they fill a GB10, a small one, is not known.
        """
        if recomputes(recipe):
            return record.measured(*self.recomputing)[:1]
        rows = record.measured(*self.kept)
        return rows[:1] + [
            row for row in rows[1:] if row.recipe.per_device_train_batch_size >= recipe.per_device_train_batch_size
        ]


FULL_ROWS = {"kept": ("full", "full_checkpointing"), "recomputing": ("full_checkpointing", "full")}
METHODS = {
    "LoRA": Method(
        "lora",
        kept=("batch", "lora_graphs_16x4", "lora_graphs_8x8"),
        recomputing=("lora_unsloth_checkpointing", "lora_checkpointing", "batch"),
        checks=("kept", "lora_graphs_16x4", "lora_graphs_8x8", "lora_checkpointing"),
    ),
    "QLoRA": Method(
        "qlora",
        kept=("qlora", "qlora_graphs_16x4", "qlora_graphs_8x8"),
        recomputing=("qlora_checkpointing", "qlora"),
        checks=("qlora_graphs_16x4", "qlora_graphs_8x8", "qlora_checkpointing"),
    ),
    "full": Method("full", **FULL_ROWS, checks=("full_checkpointing",)),
    "full, bf16 weights": Method("full", **FULL_ROWS, changes={"dtype": "bfloat16"}),
}


def prediction(record: SpeedRecord) -> dict[str, Any]:
    """All that the page says of a GB10: tables, and the figures that they rest on.

    Raises:
        UserError: The record's rows, GPU or model are not enough to predict from.
    """
    keys = dict.fromkeys(key for method in METHODS.values() for key in (*method.kept, *method.recomputing[:1]))
    return {
        "lengths": lengths(record),
        "hours": hours_table(record),
        "others": others_table(record),
        "checks": checks_table(record),
        "shares": {row.name: share_of(record, row) for row in record.measured(*keys)},
        "fast": FAST,
        "slow": SLOW,
        "memory_gib": MEMORY_BYTES / GIB,
        "bandwidth": bandwidth(record.gpu)[1],
        "host_seconds": host_seconds(record),
    }


def lengths(record: SpeedRecord) -> dict[str, tuple[float, float]]:
    """By prompt: the tokens that all articles begin with, and an article's own."""
    if missing := record.lacking(*LENGTH_ROWS):
        raise UserError(f"an article's tokens come from rows that have no figures ({missing})")
    lean, shared, verbose = record.measured(*LENGTH_ROWS)
    at_once = shared.recipe.per_device_train_batch_size
    beginning = (lean.computed_per_article - shared.computed_per_article) / (1 - 1 / at_once)
    own = lean.computed_per_article - beginning
    return {"lean": (beginning, own), "verbose": (verbose.computed_per_article - own, own)}


def host_seconds(record: SpeedRecord) -> float:
    """Seconds that the measured GPU's host needs to launch a micro-batch: those of one too small to fill the GPU."""
    return record.rows.seconds["shared"]


def hours(record: SpeedRecord, sources: list[pd.Series], recipe: Recipe, articles: float, tokens: float) -> str:
    """Hours of one epoch on a GB10, at best and at worst.

    At best it reaches the measured share of its peak. At worst, all that kept the measured GPU from its peak is memory
    traffic, which weighs more where memory is slower beside the arithmetic; and its host is as slow as ours.

    Args:
        record: The measurements.
        sources: The rows that give the share of the peak, the first at best and the last at worst.
        recipe: What is trained, and how.
        articles: Articles in a micro-batch.
        tokens: Tokens computed for them.
    """
    if not sources:
        return "not measured"
    work = work_of(recipe, articles, tokens)
    best = work.seconds(FAST, share_of(record, sources[0]))
    slower = SLOW.ridge / machine_of(record, sources[-1]).ridge
    share = 1 / (1 + (1 / share_of(record, sources[-1]) - 1) * slower)
    worst = max(work.seconds(SLOW, share), host_seconds(record))
    return " to ".join(f"{ARTICLES / articles * seconds / 3600:.1f}" for seconds in (best, worst))


def needed_bytes(recipe: Recipe, tokens: float) -> float:
    """Memory of a training whose micro-batches have so many tokens."""
    activations = activation_bytes(tokens, "transformers" if recipe.engine == "transformers" else "unsloth")
    if recomputes(recipe):
        # Each layer's input, and all of one layer.
        activations = activations / LAYERS + 2 * tokens * HIDDEN * LAYERS
    if recipe.load_in_4bit:
        weights = LINEAR * PACKED + (PARAMETERS - LINEAR) * 2
    else:
        # Of fp32 weights, autocast holds copies in bf16 until the backward pass is over.
        weights = PARAMETERS * (BYTES[recipe.dtype] + (2 if recipe.dtype == "float32" else 0))
    adapter, weight = adapter_parameters(recipe), 4 if recipe.adapter else BYTES[recipe.dtype]
    gradient = 0 if recipe.update_in_backward else weight
    still = (adapter or PARAMETERS) * (gradient + MOMENTS * MOMENT_BYTES.get(recipe.optim, weight))
    return round(weights + adapter * 4 + round(still)) + activations


def settled(recipe: Recipe, tokens: float) -> Recipe:
    """The recipe with `auto` checkpointing decided as a training would decide it on an idle DGX Spark."""
    if recipe.gradient_checkpointing != "auto":
        return recipe
    kept = replace(recipe, gradient_checkpointing="off")
    fits = needed_bytes(kept, tokens) * (1 + RESERVE) < MEMORY_BYTES
    return kept if fits else replace(recipe, gradient_checkpointing="plain")


def hours_table(record: SpeedRecord) -> pd.DataFrame:
    """Predicted hours of each method: micro-batches of 8, the profile's update at once, and twice as many articles."""
    lines = []
    for name, method in METHODS.items():
        profile = recipe_of(method.run, PROFILES["spark"].values_for(method.run) | method.changes)
        update = profile.per_device_train_batch_size * profile.gradient_accumulation_steps
        for articles in (8, update, 2 * update):
            tokens = {prompt: shared + articles * own for prompt, (shared, own) in lengths(record).items()}
            passes = max(1, update // articles)
            recipe = replace(profile, per_device_train_batch_size=articles, gradient_accumulation_steps=passes)
            recipe = settled(recipe, tokens["lean"])
            sources, apart = method.sources(record, recipe), "-"
            if sources:
                work = work_of(recipe, articles, tokens["lean"])
                share = work.apart / FAST.bandwidth / work.seconds(FAST, share_of(record, sources[0]))
                apart = f"{share:.0%} of the time"
            memory_of = f"{needed_bytes(recipe, tokens['lean']) / GIB:.0f} GiB" + ", recomputing" * recomputes(recipe)
            predicted = [hours(record, sources, recipe, articles, count) for count in tokens.values()]
            lines.append([name, f"{articles} x {passes}", f"{tokens['lean']:,.0f}", memory_of, apart, *predicted])
    columns = ["method", "articles", "tokens, lean", "memory", "other memory traffic"]
    return pd.DataFrame(lines, columns=[*columns, "hours, lean prompt", "hours, verbose prompt"])


def others_table(record: SpeedRecord) -> pd.DataFrame:
    """The setup that others measured on a GB10, predicted."""
    articles, lines = OTHERS_TOKENS / sum(lengths(record)["verbose"]), []
    for name, figures in OTHERS.items():
        recipe = recipe_of(METHODS[name].run, OTHERS_SETUP)
        sources = METHODS[name].sources(record, recipe)
        lines.append([name, hours(record, sources, recipe, articles, OTHERS_TOKENS), figures])
    return pd.DataFrame(lines, columns=["method", "predicted hours", "measured by others"])


def checks_table(record: SpeedRecord) -> pd.DataFrame:
    """The roofline on the measured GPU: the share of a method's first row must give the speed of its other rows."""
    lines = []
    for method in METHODS.values():
        for source in record.measured(*method.kept)[:1]:
            for row in record.measured(*method.checks):
                # Refuses a row that is faster than the GPU can be.
                share_of(record, row)
                machine, work, articles = (
                    machine_of(record, row),
                    work_of_row(row),
                    row.recipe.per_device_train_batch_size,
                )
                waits = 0 if row.recipe.cuda_graphs else host_seconds(record)
                speed = articles / max(work.seconds(machine, share_of(record, source)), waits)
                limit, measured = articles / work.seconds(machine, 1), row.articles_per_second
                factor = speed / measured
                lines.append([row.setting, f"{measured:.1f}", f"{speed:.1f}", f"{factor:.2f}", f"{limit:.0f}"])
    columns = ["setting", "measured articles/s", "roofline", "roofline / measured", "at the whole peak"]
    return pd.DataFrame(lines, columns=columns)
