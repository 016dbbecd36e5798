"""How figures and runs are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.config.methods import ALL

if TYPE_CHECKING:
    import pandas as pd

NAMES = {run: method.title for run, method in ALL.items()}


def spoken(run: str) -> str:
    """A run's or baseline's name within a sentence."""
    return ALL[run].spoken


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def one_decimal(value: float, sign: str = "") -> str:
    """`0.4`, or `0.04`: with two decimals where one would show nothing. `sign`: "+" for both signs."""
    digits = 1 if abs(value) < 0.005 or round(abs(value), 1) else 2
    return f"{value:{sign}z.{digits}f}"


def interval_of(low: float, high: float, sign: str = "") -> str:
    """`-0.3 to +0.5`."""
    return f"{one_decimal(low, sign)} to {one_decimal(high, sign)}"


def percent(share: float) -> str:
    """A share in percent, without the sign: `92.6`."""
    return f"{100 * share:.1f}"


def percent_interval(low: float, high: float) -> str:
    """An interval of shares in percent: `94.9 to 95.9`."""
    return f"{percent(low)} to {percent(high)}"


def percent_estimate(share: float, low: float, high: float) -> str:
    """A share with its interval, in percent: `95.4 (94.9 to 95.9)`."""
    return f"{percent(share)} ({percent_interval(low, high)})"


def extent(texts: Sequence[str]) -> str:
    """The first and the last of several figures: `32 s to 36 s`; one where they look alike."""
    first, last = texts[0], texts[-1]
    return first if first == last else f"{first} to {last}"


def duration(seconds: float) -> str:
    """Seconds as such up to two minutes, then minutes, then hours."""
    if seconds < 1:
        return "< 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_p(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, without its index."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
