"""How figures and runs are put into words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

# In the order of the tables.
NAMES = {
    "majority": "majority class",
    "svm": "TF-IDF + linear SVM",
    "base": "base model",
    "few_shot": "base, few-shot",
    "full": "full",
    "full_unsloth": "full (Unsloth)",
    "lora": "LoRA",
    "qlora": "QLoRA",
}
_SPOKEN = {
    "majority": "the majority class",
    "svm": "the linear SVM",
    "base": "the base model",
    "few_shot": "the base model with examples in its prompt",
    "full": "full fine-tuning",
    "full_unsloth": "full fine-tuning with Unsloth",
}
# What a parameter's value means, where name and value say little.
IN_WORDS = {
    "article_loss": {0.0: "no auxiliary loss", 0.5: "an auxiliary loss of weight 0.5"},
    "cuda_graphs": {True: "steps as CUDA graphs", False: "steps without CUDA graphs"},
    "engine": {"transformers": "training with transformers", "unsloth": "training with Unsloth"},
    "lora_targets": {"attention": "adapters on attention alone", "all-linear": "adapters on attention and MLP"},
    "normalise": {True: "repaired texts", False: "texts as they came"},
    "packing": {True: "packed rows", False: "padded batches"},
    "prompt": {"lean": "the lean prompt", "verbose": "the verbose prompt"},
    "supervise": {"answer": "loss on the answer alone", "all": "loss on all tokens"},
    "weights": {"bfloat16": "weights held in bfloat16", "float32": "weights held in float32"},
}


def spoken(run: str) -> str:
    """A run's or baseline's name within a sentence."""
    return _SPOKEN.get(run, NAMES[run])


def value_in_words(parameter: str, value: Any) -> str | None:
    """A parameter's value within a title; None where there are no plainer words than name and value."""
    return IN_WORDS.get(parameter, {}).get(value)


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def sentence(text: str) -> str:
    return capitalised(text) + "."


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def one_decimal(value: float, sign: str = "") -> str:
    """`0.4`, or `0.04`: with two decimals where one would show nothing. `sign`: "+" for both signs."""
    digits = 1 if value == 0 or round(abs(value), 1) else 2
    return f"{value:{sign}z.{digits}f}"


def interval_of(low: float, high: float, sign: str = "") -> str:
    """`-0.3 to +0.5`."""
    return f"{one_decimal(low, sign)} to {one_decimal(high, sign)}"


def extent(texts: Sequence[str]) -> str:
    """The first and the last of several figures: `32 s to 36 s`; one where they look alike."""
    first, last = texts[0], texts[-1]
    return first if first == last else f"{first} to {last}"


def span(texts: Sequence[str]) -> str:
    """The same of figures with their unit, which is said once if it is the same: `32 to 36 seconds`."""
    first, last = texts[0], texts[-1]
    if first == last:
        return first
    return extent([first.removesuffix(last.partition(" ")[2]).strip(), last])


def or_none(points: float | None) -> str:
    """A detectable difference in points; `none` where no difference could have been shown."""
    return "none" if points is None else one_decimal(points)


def duration(seconds: float) -> str:
    """Seconds as such up to two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def format_p(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, without its index."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
