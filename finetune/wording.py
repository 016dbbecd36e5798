"""How figures and runs are put into words."""

from __future__ import annotations

from collections.abc import Sequence

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


def spoken(run: str) -> str:
    """A run's or baseline's name within a sentence."""
    return _SPOKEN.get(run, NAMES[run])


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def format_p(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, without its index."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
