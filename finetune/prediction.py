"""Hours on a GB10, predicted: its roofline, at the shares of the matrix peak that were measured on another GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from finetune import memory
from finetune.profiles import PROFILES
from finetune.recipes import Recipe
from finetune.roofline import (
    Machine,
    bandwidth,
    configuration,
    machine_of,
    micro_batch,
    recipe_of,
    recomputes,
    seconds_of,
    shape,
    share_of,
    speed_in,
    work_of,
    work_of_row,
)
from finetune.settings import RUNS
from finetune.throughput import Row, Throughput
from finetune.wording import listed, markdown

ARTICLES = 120_000
GIB = 2**30
# A large bf16 product as an owner measured it, 93 to 97 TFLOP/s; the data sheet's bandwidth, and the share of it that a
# copy reaches on an H100 (3.0 of 3.35 TB/s).
GB10_FAST, GB10_SLOW = Machine(97e12, 273e9), Machine(93e12, 273e9 * 3.0 / 3.35)
GB10_BYTES = 121.69 * GIB


@dataclass(frozen=True)
class Lengths:
    """Tokens of an article: those that all articles of a prompt begin with, and its own."""

    shared: float
    own: float

    def computed(self, articles: int) -> float:
        """Tokens to compute for so many articles at once, what they share once."""
        return self.shared + articles * self.own


@dataclass(frozen=True)
class Method:
    """A run of the spark profile, with `changes`.

    Attributes:
        kept: Rows to take its share of the peak from, where activations are kept; largest micro-batches first.
        recomputing: The same, where they are recomputed; best first.
        checks: Rows to hold the roofline against.
    """

    name: str
    run: str
    kept: tuple[str, ...]
    recomputing: tuple[str, ...]
    checks: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    def sources(self, found: Throughput, recipe: Recipe) -> list[Row]:
        """The measured rows that a recipe's share may come from: first at best, last at worst.

        Small micro-batches fill a large GPU less well. Where GB10, a small one, stands in between is not known.
        """
        measured = [row for row in map(found.measured, self.recomputing if recomputes(recipe) else self.kept) if row]
        if recomputes(recipe):
            return measured[:1]
        return measured[:1] + [row for row in measured[1:] if micro_batch(row) >= recipe.batch_size]


FULL_ROWS = {"kept": ("full", "full_checkpointing"), "recomputing": ("full_checkpointing", "full")}
METHODS = (
    Method(
        "LoRA",
        "lora",
        kept=("batch", "lora_graphs_16x4", "lora_graphs_8x8"),
        recomputing=("lora_unsloth_checkpointing", "lora_checkpointing", "batch"),
        checks=("kept", "lora_graphs_16x4", "lora_graphs_8x8", "lora_checkpointing"),
    ),
    Method(
        "QLoRA",
        "qlora",
        kept=("qlora", "qlora_graphs_16x4", "qlora_graphs_8x8"),
        recomputing=("qlora_checkpointing", "qlora"),
        checks=("qlora_graphs_16x4", "qlora_graphs_8x8", "qlora_checkpointing"),
    ),
    Method("full", "full", **FULL_ROWS, checks=("full_checkpointing",)),
    Method("full, bf16 weights", "full", **FULL_ROWS, changes={"weights": "bfloat16"}),
)
# For the lengths: the lean prompt, the same with its beginning shared, the verbose one; articles are the same.
LENGTH_ROWS = ("lean", "shared", "answer")
# The setup of the figures that others measured on a GB10: 1,965 updates of 8 x 4 rows of 512 tokens without padding.
OTHERS_SETUP = {"supervise": "all", "gradient_checkpointing": "plain", "weights": "bfloat16", "optimizer": "adamw_8bit"}
OTHERS_TOKENS = 8 * 512
OTHERS = {"full": "about 10 h; 8 h 36 min", "LoRA": "5 h 51 min"}


def text(found: Throughput, name: str) -> str:
    """The prediction in Markdown: hours, others' figures, how the roofline does where it can be checked, assumptions.

    Raises:
        UserError: The file's GPU, model or figures are none that this can be predicted from.
    """
    about = (
        "**A prediction, not a measurement: no run on a GB10 was made for this repository.** One epoch of AG News "
        f"({ARTICLES:,} articles) of Qwen2.5-7B on a DGX Spark, validation and start-up left out, with the recipes of "
        "the `spark` profile, whose update of 32 articles is one micro-batch, and with smaller and larger ones:"
    )
    missing = [f"`{key}`: {found.lacking(key)}" for key in LENGTH_ROWS if not found.measured(key)]
    if missing:
        return (
            f"{about}\n\nNot predicted: an article's tokens come from rows that are missing ({'; '.join(missing)}).\n"
        )
    parts = [
        about,
        markdown(hours_table(found)),
        "The same in the setup of others, who measured on a GB10 (their figures, not ours; that they recomputed "
        "activations, and their optimiser, are assumed):",
        markdown(others_table(found)),
        f"And on the {found.environment.hardware['gpu']} itself, at the share of each method's first row:",
        markdown(checks_table(found)),
        _assumptions(found, name),
    ]
    return "\n\n".join(parts) + "\n"


def lengths(found: Throughput) -> dict[str, Lengths]:
    """Each prompt's lengths, from the same articles with and without a shared beginning, and with the long prompt."""
    lean, shared, verbose = (found.measured(key).computed_per_article for key in LENGTH_ROWS)
    at_once = recipe_of("lora", found.measured("shared").overrides).batch_size
    beginning = (lean - shared) / (1 - 1 / at_once)
    own = lean - beginning
    return {"lean": Lengths(beginning, own), "verbose": Lengths(verbose - own, own)}


def host_seconds(found: Throughput) -> float:
    """What the host needs for a micro-batch: as long as one takes that is too small to keep the measured GPU busy."""
    return seconds_of(found.measured("shared"))


def share_at_best(found: Throughput, row: Row) -> float:
    """GB10's share of its peak if it is the measured one."""
    return share_of(row, machine_of(found, row))


def share_at_worst(found: Throughput, row: Row) -> float:
    """GB10's share of its peak if all that kept the measured GPU from its own is memory traffic.

    That grows as the memory falls behind the arithmetic.
    """
    measured = machine_of(found, row)
    return 1 / (1 + (1 / share_of(row, measured) - 1) * GB10_SLOW.ridge / measured.ridge)


def hours(found: Throughput, sources: list[Row], recipe: Recipe, articles: float, tokens: float) -> tuple[float, float]:
    """Hours of one epoch on a GB10, at best and at worst.

    Args:
        found: The measurements.
        sources: The rows to take the share of the peak from, the first at best and the last at worst.
        recipe: What is trained, and how.
        articles: In a micro-batch.
        tokens: Computed for them.
    """
    work = work_of(recipe, articles, tokens)
    best = work.seconds(GB10_FAST, share_at_best(found, sources[0]))
    worst = max(work.seconds(GB10_SLOW, share_at_worst(found, sources[-1])), host_seconds(found))
    return tuple(ARTICLES / articles * seconds / 3600 for seconds in (best, worst))


def needed_bytes(recipe: Recipe, tokens: float) -> float:
    """Memory of a training whose micro-batches have so many tokens."""
    engine = "transformers" if recipe.engine == "transformers" else "unsloth"
    activations = memory.activation_bytes(configuration(), tokens, engine)
    if recomputes(recipe):
        # Each layer's input, and all of one layer.
        activations = activations / shape().layers + 2 * tokens * shape().hidden * shape().layers
    return memory.model_bytes(recipe, configuration()) + activations


def settled(recipe: Recipe, tokens: float) -> Recipe:
    """The recipe with `auto` checkpointing decided as a training would on an idle DGX Spark."""
    if recipe.gradient_checkpointing != "auto":
        return recipe
    kept = replace(recipe, gradient_checkpointing="off")
    fits = needed_bytes(kept, tokens) * (1 + memory.RESERVE) < GB10_BYTES
    return kept if fits else replace(recipe, gradient_checkpointing="plain")


def hours_table(found: Throughput) -> pd.DataFrame:
    """Predicted hours of each method, for the profile's update in micro-batches of several sizes."""
    lines = []
    for method in METHODS:
        values = PROFILES["spark"].values_for(RUNS[method.run].method) | method.changes
        for recipe in _sizes(recipe_of(method.run, values)):
            batch = f"{recipe.batch_size} x {recipe.gradient_accumulation_steps}"
            lines.append({"": method.name, "articles": batch, **_hours_line(found, method, recipe)})
    return pd.DataFrame(lines).fillna("-")


def _sizes(recipe: Recipe) -> list[Recipe]:
    """The update in micro-batches of 8, as in the first experiment, at once, and twice as many articles at once."""
    update = recipe.batch_size * recipe.gradient_accumulation_steps
    return [
        replace(recipe, batch_size=count, gradient_accumulation_steps=max(1, update // count))
        for count in (8, update, 2 * update)
    ]


def _hours_line(found: Throughput, method: Method, asked: Recipe) -> dict[str, str]:
    """Memory, what else than products takes time, and hours with both prompts."""
    of, articles = lengths(found), asked.batch_size
    tokens = of["lean"].computed(articles)
    recipe = settled(asked, tokens)
    sources = method.sources(found, recipe)
    line = {"tokens, lean": f"{tokens:,.0f}", "memory": _memory(recipe, tokens)}
    if not sources:
        return line | {f"hours, {prompt} prompt": "not measured" for prompt in of}
    apart = work_of(recipe, articles, tokens).share_apart(GB10_FAST, share_at_best(found, sources[0]))
    line["other memory traffic"] = f"{apart:.0%} of the time"
    for prompt, each in of.items():
        line[f"hours, {prompt} prompt"] = _range(hours(found, sources, recipe, articles, each.computed(articles)))
    return line


def _memory(recipe: Recipe, tokens: float) -> str:
    return f"{needed_bytes(recipe, tokens) / GIB:.0f} GiB" + ", recomputing" * recomputes(recipe)


def others_table(found: Throughput) -> pd.DataFrame:
    """The setup of the figures that others measured on a GB10, predicted."""
    setup = f"8 x 4 rows of {OTHERS_TOKENS // 8} tokens, long prompt, loss on all tokens"
    articles = OTHERS_TOKENS / lengths(found)["verbose"].computed(1)
    lines = []
    for name, figures in OTHERS.items():
        method = next(method for method in METHODS if method.name == name)
        recipe = recipe_of(method.run, OTHERS_SETUP)
        sources = method.sources(found, recipe)
        predicted = _range(hours(found, sources, recipe, articles, OTHERS_TOKENS)) if sources else "not measured"
        lines.append({setup: name, "predicted hours": predicted, "measured by others": figures})
    return pd.DataFrame(lines)


def checks_table(found: Throughput) -> pd.DataFrame:
    """The roofline, at the share of a method's first row, against others; with what the whole peak would allow."""
    lines = []
    for method in METHODS:
        source = found.first_measured(method.kept)
        rows = filter(None, map(found.measured, method.checks))
        lines += [_check(found, source, row) for row in rows if source not in (None, row)]
    return pd.DataFrame(
        lines, columns=["", "measured articles/s", "roofline", "roofline / measured", "at the whole peak"]
    )


def _check(found: Throughput, source: Row, row: Row) -> dict[str, str]:
    machine, work = machine_of(found, row), work_of_row(row)
    # Refuses a row that is faster than the GPU could be.
    share_of(row, machine)
    waits = 0.0 if recipe_of(row.run, row.overrides).cuda_graphs else host_seconds(found)
    speed = speed_in(row, max(work.seconds(machine, share_of(source, machine_of(found, source))), waits))
    return {
        "": row.name,
        "measured articles/s": f"{row.articles_per_second:.1f}",
        "roofline": f"{speed:.1f}",
        "roofline / measured": f"{speed / row.articles_per_second:.2f}",
        "at the whole peak": f"{speed_in(row, work.seconds(machine, 1)):.0f}",
    }


def _range(of: tuple[float, float]) -> str:
    return f"{of[0]:.1f} to {of[1]:.1f}"


def _shares(found: Throughput) -> list[str]:
    """The shares of the peak that the prediction uses, each with its row."""
    rows: dict[str, Row] = {}
    for method in METHODS:
        measured = [row for row in map(found.measured, method.kept) if row]
        for row in (*measured, found.first_measured(method.recomputing)):
            if row:
                rows[row.key] = row
    return [f"{share_of(row, machine_of(found, row)):.0%} (`{key}`)" for key, row in rows.items()]


def _assumptions(found: Throughput, name: str) -> str:
    """What the figures rest on, as a list."""
    gpu = found.environment.hardware["gpu"]
    prompts = [f"{prompt} {each.own:.0f} and {each.shared:.0f} shared" for prompt, each in lengths(found).items()]
    lines = [
        f"GB10: {GB10_SLOW.peak / 1e12:.0f} to {GB10_FAST.peak / 1e12:.0f} TFLOP/s in a large bf16 product (measured "
        f"by an owner, not by us), {GB10_FAST.bandwidth / 1e9:.0f} GB/s (NVIDIA's data sheet; at worst "
        f"{GB10_SLOW.bandwidth / 1e9:.0f}, the part of it that a copy reaches on an H100), {GB10_BYTES / GIB:.2f} GiB. "
        f"At its peak it does {GB10_FAST.ridge:.0f} FLOP in the time of a byte: with fewer tokens at once than about "
        "that, times the share of the peak, products wait for the weights.",
        "A micro-batch takes the longer of its arithmetic and its products' memory traffic; then what else moves "
        "bytes: 4-bit weights unpacked in each pass, fp32 weights cast to bf16 and their gradients back, gradients "
        "added up over micro-batches, clipping and the optimiser.",
        f"Shares of the matrix peak, that traffic taken out: {listed(_shares(found))}. They are lower than by the "
        "ladder's rule, because only products that are done count: the layers', and the head's where there is loss.",
        "At best a GB10 reaches the share of large micro-batches at any size. At worst it reaches that of the next "
        f"larger ones that were measured, all that kept the {gpu} ({bandwidth(found)[1]}) from its peak is memory "
        f"traffic, and no micro-batch takes less than {host_seconds(found):.2f} s, which is what the host there needed "
        "for one of LoRA's. A GB10's own host was not timed.",
        f"Tokens of an article: {listed(prompts)}, on {found.data.title} with the embedded model's tokenizer. Adapters "
        "sit on all linear layers, as measured; the profile's, on attention alone, are a little cheaper.",
        "Memory is estimated for micro-batches of average length; activations are recomputed where they would not fit.",
        f"Made from `results/reference/throughput/{name}.json`.",
    ]
    return "\n".join(f"- {line}" for line in lines)
