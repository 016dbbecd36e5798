"""What the first experiment on a DGX Spark claimed of each optimisation, beside what the ladder measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from finetune.prediction import GIB
from finetune.roofline import in_layers
from finetune.throughput import Throughput
from finetune.wording import markdown

# (What was found, whether the claim holds).
Finding = tuple[str, str]
UNKNOWN = "not measured here"


@dataclass(frozen=True)
class Claim:
    """A claim, and how a file of measurements answers it."""

    text: str
    finding: Callable[[Throughput], Finding]


def text(found: Throughput, name: str) -> str:
    """The claims and their answers in Markdown."""
    rows = []
    for claim in CLAIMS:
        measured, verdict = claim.finding(found)
        rows.append({"the first experiment says": claim.text, "measured here": measured, "holds?": verdict})
    return (
        f"{markdown(pd.DataFrame(rows))}\n\n"
        f"Measured on one {found.environment.hardware['gpu']}, not on a GB10, with random weights of the 7B shape;"
        f" every ratio is made from `results/reference/throughput/{name}.json`.\n"
    )


def _speed_up(key: str, against: str, low: int, high: int) -> Callable[[Throughput], Finding]:
    """Answers a claim that `key` is `low` to `high` percent faster than `against`."""

    def finding(found: Throughput) -> Finding:
        row, base = found.measured(key), found.measured(against)
        if not (row and base):
            return _lacking(found, key, against), UNKNOWN
        # Judged as it is shown.
        gain = round(100 * (row.articles_per_second / base.articles_per_second - 1), 1)
        shown = f"{base.articles_per_second:.1f} to {row.articles_per_second:.1f} articles/s: {gain:+z.1f} %"
        return shown, _verdict(gain, low, high)

    return finding


def _verdict(gain: float, low: float, high: float) -> str:
    if gain < low:
        return "no: less"
    return "yes" if gain <= high else "yes, and more"


def _container(found: Throughput) -> Finding:
    return "needs a GB10 with and without the container", UNKNOWN


def _memory(found: Throughput) -> Finding:
    """Memory of Unsloth's checkpointing against none, and against PyTorch's."""
    kept, row, plain = map(found.measured, CHECKPOINTING)
    if not (kept and row):
        return _lacking(found, *CHECKPOINTING[:2]), UNKNOWN
    saved = round(100 * (1 - row.peak_gib / kept.peak_gib), 1)
    speed = row.articles_per_second / kept.articles_per_second
    shown = f"{kept.peak_gib:.1f} to {row.peak_gib:.1f} GiB: {saved:.1f} % less, at {speed:.2f} of the speed"
    if plain:
        shown += f"; PyTorch's own checkpointing: {plain.peak_gib:.1f} GiB, {plain.articles_per_second:.1f} articles/s"
        shown += f" (Unsloth's {row.articles_per_second:.1f})"
    return shown, "yes" if saved >= 30 else "no: less"


def _twice_the_batch(found: Throughput) -> Finding:
    """Whether twice the articles fit into the memory that they take without checkpointing.

    Computed: what does not grow with the batch is at least the layers' weights, so twice the articles take at most
    twice the peak less those.
    """
    kept, row, _ = map(found.measured, CHECKPOINTING)
    if not (kept and row):
        return _lacking(found, *CHECKPOINTING[:2]), UNKNOWN
    fixed = 2 * in_layers(row) / GIB
    twice = max(2 * row.peak_gib - fixed, row.peak_gib)
    shown = f"computed: twice the articles take at most {twice:.1f} GiB with it; these take {kept.peak_gib:.1f} without"
    return shown, "yes" if twice <= kept.peak_gib else "not shown"


def _lacking(found: Throughput, *keys: str) -> str:
    return "; ".join(f"`{key}`: {found.lacking(key)}" for key in keys if not found.measured(key))


# Without, with Unsloth's, with PyTorch's.
CHECKPOINTING = ("batch", "lora_unsloth_checkpointing", "lora_checkpointing")
CLAIMS = (
    Claim("the container instead of pip in a venv: 4.5 to 38.2 TFLOP/s", _container),
    Claim("cuDNN's benchmark mode: 5 to 10 % faster", _speed_up("trl_cudnn", "trl_seed", 5, 10)),
    Claim("sequence packing: 30 to 40 % faster", _speed_up("trl_packed", "trl_seed", 30, 40)),
    Claim("flash attention: 10 to 15 % faster", _speed_up("flash", "unsloth_seed", 10, 15)),
    Claim("Unsloth's checkpointing: 30 % less memory", _memory),
    Claim("Unsloth's checkpointing: twice the batch", _twice_the_batch),
)
