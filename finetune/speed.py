"""The README's tables of speed and memory, made from measurements alone: ladder, methods, scoring, start-up."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from data_prep import UserError
from data_prep.store import replacing
from finetune import claims, prediction, roofline
from finetune.compare import plots
from finetune.throughput import Row, Throughput, read_published
from finetune.wording import listed, markdown

# Each rung adds one thing to the one before it; the first is what a user sets up without a thought.
LADDER = (
    "trl_seed",
    "trl_cudnn",
    "trl_packed",
    "unsloth_seed",
    "flash",
    "kept",
    "answer",
    "lean",
    "shared",
    "batch",
    "batch_128",
)
PEERS = ("peer_checkpointing", "peer", "peer_liger")
METHODS = {
    "LoRA": (
        "batch",
        "batch_128",
        "lora_graphs_16x4",
        "lora_graphs_8x8",
        "lora_checkpointing",
        "lora_checkpointing_128",
        "lora_unsloth_checkpointing",
        "lora_unsloth_checkpointing_128",
    ),
    "QLoRA": (
        "qlora",
        "qlora_128",
        "qlora_graphs_16x4",
        "qlora_graphs_8x8",
        "qlora_checkpointing",
        "qlora_checkpointing_128",
        "qlora_unsloth_checkpointing_96",
        "qlora_unsloth_checkpointing_128",
    ),
    "full": (
        "full_plain",
        "full",
        "full_64x4",
        "full_unsloth",
        "full_checkpointing",
        "full_in_backward",
        "full_in_backward_checkpointing",
        "full_4bit_checkpointing",
    ),
}
SCORING = ("scoring_lean_128_plain", "scoring_lean_128", "scoring_lean_512", "scoring_verbose_128")
GENERATION = ("generation_lean_128", "generation_verbose_128")
STARTS = ("start", "start_transformers")
# How much slower than the fastest a way to save memory may be.
KEPT_SPEED = 0.7
COUNTING = (
    "articles/s count whole articles, tokens/s their own tokens, prompt and answer included, and TFLOP/s the tokens "
    "that were computed: 4 N a token where the base is frozen, 6 N where it is trained, 2 N for scoring (N: all "
    "parameters; recomputation does not count). Share of peak: of a large bf16 matrix product of the same process."
)


def throughput_text(found: Throughput, name: str) -> str:
    """All tables of a file in Markdown, with where they come from."""
    parts = [
        markdown(ladder_table(found)),
        f"![Articles a second on each rung of the ladder](results/reference/throughput/{name}.svg)",
        f"Methods and memory; **bold**: the fastest of its method, and the one with the least memory that keeps "
        f"{KEPT_SPEED:.0%} of its speed.",
        markdown(methods_table(found)),
        "Scoring and generation of test articles. The ceiling is the arithmetic alone at the whole matrix peak: 2 a "
        "parameter of the layers for each computed token, and the head at the positions that predict a label.",
        markdown(evaluation_table(found)),
        start_sentence(found),
        *_others(found),
        provenance(found, name),
    ]
    return "\n\n".join(parts) + "\n"


def ladder_table(found: Throughput) -> pd.DataFrame:
    """Each rung with its factor against the one before it and against the first; then the peers."""
    speeds = {key: row.articles_per_second for key in (*LADDER, *PEERS) if (row := found.measured(key))}
    first, before = speeds.get(LADDER[0]), None
    lines = []
    for key in (*LADDER, *PEERS):
        speed = speeds.get(key)
        factors = {
            "x the rung before": _factor(speed, before) if key in LADDER else "-",
            "x the first": _factor(speed, first),
        }
        lines.append(_line(found, key, factors))
        before = speed or before
    return pd.DataFrame(lines)


def methods_table(found: Throughput) -> pd.DataFrame:
    """Every way of each method, with its share of the method's best speed."""
    lines = []
    for method, keys in METHODS.items():
        best, thrifty = fastest(found, keys), thriftiest(found, keys)
        for key in keys:
            row = found.measured(key)
            share = f"{row.articles_per_second / best.articles_per_second:.0%}" if row else "-"
            line = {"method": method, **_line(found, key, {"of the best": share})}
            if row and row in (best, thrifty):
                line[""] = f"**{line['']}**"
            lines.append(line)
    return pd.DataFrame(lines)


def fastest(found: Throughput, keys: tuple[str, ...]) -> Row | None:
    """The row with the most articles a second; None if none was measured."""
    measured = [row for row in map(found.measured, keys) if row]
    return max(measured, key=lambda row: row.articles_per_second, default=None)


def thriftiest(found: Throughput, keys: tuple[str, ...]) -> Row | None:
    """The row with the least memory of those that keep `KEPT_SPEED` of the fastest's speed."""
    best = fastest(found, keys)
    measured = [row for row in map(found.measured, keys) if row]
    quick = [row for row in measured if row.articles_per_second >= KEPT_SPEED * best.articles_per_second]
    return min(quick, key=lambda row: row.peak_gib, default=None)


def evaluation_table(found: Throughput) -> pd.DataFrame:
    """Scoring beside its arithmetic ceiling, and generation."""
    lines = []
    for key in (*SCORING, *GENERATION):
        row = found.measured(key)
        ceiling = roofline.scoring_ceiling(row) if row and key in SCORING else None
        line = {
            "": _name(found, key),
            "articles/s": _speed(found, key),
            "ceiling": _shown(ceiling, "{:,.0f}"),
            "of the ceiling": f"{row.articles_per_second / ceiling:.0%}" if ceiling else "-",
            "peak GiB": _shown(row and row.peak_gib, "{:.1f}"),
        }
        lines.append(line)
    return pd.DataFrame(lines)


def start_sentence(found: Throughput) -> str:
    """How long it takes on each engine until a training's first step is done."""
    measured = [f"{row.seconds_to_first_step:.1f} s ({row.name})" for row in map(found.measured, STARTS) if row]
    return f"Start-up: {'; '.join(measured) or found.lacking(STARTS[0])}."


def provenance(found: Throughput, name: str) -> str:
    """Where the figures come from, and how they are counted."""
    where = found.environment
    packages = listed([f"{package} {version}" for package, version in where.packages.items() if version])
    peaks = sorted({f"{row.matrix_peak_tflops:.0f}" for row in found.results if row.matrix_peak_tflops}, key=int)
    peak = f", matrix peak {' to '.join(dict.fromkeys((peaks[0], peaks[-1])))} TFLOP/s" if peaks else ""
    return (
        f"{found.model}, on {found.data.title} (fingerprint `{found.data.fingerprint}`); "
        f"{where.hardware['gpu']}{peak}; commit `{(where.commit or 'none')[:10]}`"
        f"{' with changes' * bool(where.dirty)}; `{where.command}`; {packages}; "
        f"`results/reference/throughput/{name}.json`. {COUNTING}"
    )


def _others(found: Throughput) -> list[str]:
    """Rows that no table above has a place for: what was measured is shown."""
    placed = {*LADDER, *PEERS, *SCORING, *GENERATION, *STARTS, *(key for keys in METHODS.values() for key in keys)}
    keys = [row.key for row in found.results if row.key not in placed]
    return [markdown(pd.DataFrame([_line(found, key, {}) for key in keys]))] if keys else []


def _line(found: Throughput, key: str, more: dict[str, str]) -> dict[str, str]:
    """A training's row of a table, with `more` behind its speed."""
    row = found.measured(key)
    return {
        "": _name(found, key),
        "articles/s": _speed(found, key),
        **more,
        "tokens/s": _shown(row and row.tokens_per_second, "{:,.0f}"),
        "TFLOP/s": _shown(row and row.tflops, "{:.0f}"),
        "share of peak": _shown(row and row.share_of_peak, "{:.1%}"),
        "peak GiB": _shown(row and row.peak_gib, "{:.1f}"),
    }


def _name(found: Throughput, key: str) -> str:
    row = found.row(key)
    return row.name if row else f"`{key}`"


def _speed(found: Throughput, key: str) -> str:
    """Articles a second, or why there are none."""
    row = found.measured(key)
    return f"{row.articles_per_second:.1f}" if row else found.lacking(key)


def _factor(speed: float | None, base: float | None) -> str:
    return f"{speed / base:.2f}" if speed and base else "-"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


RENDERERS: dict[str, Callable[[Throughput, str], str]] = {
    "throughput": throughput_text,
    "spark": prediction.text,
    "claims": claims.text,
}


def with_blocks(page: str, folder: Path) -> str:
    """A page with each of its blocks, `<!-- KIND:NAME -->` to `<!-- /KIND -->`, made anew from `folder/NAME.json`.

    Raises:
        DataError: A block's file is missing, or not fit to be published.
        UserError: A block has no end.
    """
    for kind, render in RENDERERS.items():

        def block(match: re.Match, render=render) -> str:
            return match[1] + render(read_published(folder / f"{match['name']}.json"), match["name"]) + match[3]

        pattern = rf"(<!-- {kind}:(?P<name>[\w-]+) -->\n)(?:(?!<!-- {kind}:).)*?(<!-- /{kind} -->)"
        page, made = re.subn(pattern, block, page, flags=re.DOTALL)
        if made != page.count(f"<!-- {kind}:"):
            raise UserError(f"a block that begins with <!-- {kind}:NAME --> does not end with <!-- /{kind} -->")
    return page


def draw_ladders(folder: Path) -> list[Path]:
    """Draw the ladder of every file in a folder beside it, as SVG; returns the pictures that changed."""
    changed = []
    for path in sorted(folder.glob("*.json")):
        picture = plots.as_svg(plots.ladder(read_published(path), LADDER, PEERS))
        place = path.with_suffix(".svg")
        if not place.is_file() or place.read_bytes() != picture:
            with replacing(place, "wb") as file:
                file.write(picture)
            changed.append(place)
    return changed
