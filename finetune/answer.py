"""The answer: a comparison in one paragraph, true whatever the figures are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.metrics import Metrics
from finetune.pairs import SIGNIFICANT, Pair
from finetune.records import RunRecord
from finetune.wording import listed, sentence, spoken

if TYPE_CHECKING:
    from finetune.comparison import Comparison


def paragraph(comparison: Comparison) -> str:
    """What was measured, who beats whom by how much, what cannot be told apart, and what it cost."""
    tuned = comparison.tuned()
    among = [pair for pair in comparison.pairs if {pair.first, pair.second} <= set(tuned)]
    sentences = [_setting(comparison), *_verdicts(comparison.pairs)]
    if among and all(pair.is_tie for pair in among):
        sentences.append("Between the tuned models, cost decides.")
    if comparison.pairs:
        sentences.append(_test(len(comparison.pairs)))
    if len(tuned) > 1:
        sentences.append(sentence(_costs(tuned)))
    return " ".join(sentences)


def _setting(comparison: Comparison) -> str:
    """What the untuned model and the baselines reach."""
    base, record = comparison.scoring["base"], comparison.any_record
    text = (
        f"On {base.rows:,} test rows of {record.data.title}, {record.model} without tuning gets "
        f"{base.accuracy:.1%} right {_interval(base)}"
    )
    if "few_shot" in comparison.scoring:
        shot = comparison.scoring["few_shot"]
        text += f", and {shot.accuracy:.1%} {_interval(shot)} with examples in its prompt"
    if "svm" in comparison.scoring:
        svm = comparison.scoring["svm"]
        text += f"; a linear SVM on TF-IDF, trained on the same rows, {svm.accuracy:.1%} {_interval(svm)}"
    return text + "."


def _interval(scoring: Metrics) -> str:
    return f"({scoring.accuracy_low:.1%} to {scoring.accuracy_high:.1%})"


def _verdicts(pairs: list[Pair]) -> list[str]:
    """A sentence per winner over each loser's group, then a sentence per tie, in the pairs' order."""
    sentences: list[str] = []
    told: set[Pair] = set()
    for pair in pairs:
        if pair in told:
            continue
        # Those who beat the same run share a sentence.
        group = [pair]
        if not pair.is_tie:
            group = [other for other in pairs if not other.is_tie and other.loser == pair.loser and other not in told]
        told.update(group)
        sentences.append(sentence(_beaten(group) if not pair.is_tie else str(pair)))
    return sentences


def _beaten(pairs: list[Pair]) -> str:
    """`LoRA beats the base model by 14.1 points (12.9 to 15.3, p < 0.001), QLoRA by ... and full by ...`."""
    first, *others = pairs
    return listed([str(first), *(f"{spoken(pair.winner)} by {pair.lead()}" for pair in others)])


def _test(count: int) -> str:
    corrected = f", corrected for {count} pairs by Holm's method" if count > 1 else ""
    return f"(Differences with 95 % intervals; exact McNemar test{corrected}, {SIGNIFICANT:.0%} level.)"


def _costs(tuned: dict[str, RunRecord]) -> str:
    """Who trained fastest and with the least memory, beside those at the other end."""
    by_time = sorted(tuned, key=lambda run: tuned[run].training.seconds)
    by_memory = sorted(tuned, key=lambda run: tuned[run].training.peak_memory_bytes)
    minutes = [f"{tuned[run].training.seconds / 60:.1f} minutes" for run in (by_time[0], by_time[-1])]
    memory = [f"{tuned[run].training.peak_memory_bytes / 1e9:.1f} GB" for run in (by_memory[0], by_memory[-1])]
    return (
        f"{spoken(by_time[0])} trained fastest ({minutes[0]}; {spoken(by_time[-1])} {minutes[1]}), and "
        f"{spoken(by_memory[0])} took the least memory ({memory[0]}; {spoken(by_memory[-1])} {memory[1]})"
    )
