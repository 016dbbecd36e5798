"""The answer: a comparison in one paragraph, true whatever the figures are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from finetune.metrics import Metrics
from finetune.pairs import SIGNIFICANT, Pair
from finetune.records import RunRecord
from finetune.wording import duration, format_p, listed, sentence, spoken

if TYPE_CHECKING:
    from finetune.comparison import Comparison

# Winners over the same run that are told of together; the table of pairs has each.
SEVERAL = 3


def paragraph(comparison: Comparison) -> str:
    """What was measured, who beats whom by how much, what cannot be told apart, and what it cost."""
    tuned = comparison.tuned()
    among = [pair for pair in comparison.pairs if {pair.first, pair.second} <= set(tuned)]
    sentences = [_setting(comparison), *([_reached(comparison)] if tuned else []), *_verdicts(comparison.pairs)]
    if among and all(pair.is_tie for pair in among):
        sentences.append("Between the tuned models, cost decides.")
    if comparison.pairs:
        sentences.append(test(comparison.pairs))
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


def _reached(comparison: Comparison) -> str:
    """What the tuned models reach, each the mean over its seeds."""
    shares = {run: float(comparison.right(run).mean()) for run in comparison.tuned()}
    by_share: dict[str, list[str]] = {}
    for run, share in sorted(shares.items(), key=lambda item: item[1]):
        by_share.setdefault(f"{share:.1%}", []).append(spoken(run))
    parts = [f"{share} with {listed(runs)}" for share, runs in by_share.items()]
    seeds = {len(comparison.right(run)) for run in shares}
    over = f" (means over {seeds.pop()} seeds)" if len(seeds) == 1 and seeds != {1} else ""
    return f"Tuned, the model gets {listed(parts)}{over}."


def _interval(scoring: Metrics) -> str:
    return f"({scoring.accuracy_low:.1%} to {scoring.accuracy_high:.1%})"


def _verdicts(pairs: list[Pair]) -> list[str]:
    """A sentence for each run that is beaten, with all who beat it, and one for the ties."""
    sentences = [sentence(text) for text in _victories([pair for pair in pairs if not pair.is_tie])]
    ties = [pair for pair in pairs if pair.is_tie]
    if len(ties) == 1:
        sentences.append(sentence(str(ties[0])))
    elif ties:
        sentences.append(_ties(ties))
    return sentences


def _ties(ties: list[Pair]) -> str:
    """What cannot be told apart, and for each the difference that could have been shown."""
    runs = list(dict.fromkeys(run for pair in ties for run in (pair.first, pair.second)))
    is_whole = len(ties) == math.comb(len(runs), 2) and all(pair.detectable is not None for pair in ties)
    if len(runs) > 2 and is_whole:
        return _all_alike(runs, ties)
    parts = [f"{pair.tie()}, {detectable(pair)}" for pair in ties]
    return (
        "Cannot be told apart, each with the true difference that would have been found four times in five: "
        f"{'; '.join(parts)}."
    )


def _all_alike(runs: list[str], ties: list[Pair]) -> str:
    """Several runs of which no two can be told apart, in one sentence; the table of pairs has the rest."""
    shown = [pair.over_seeds or pair for pair in ties]
    widest = max(shown, key=lambda one: one.high - one.low)
    seeds = "" if isinstance(widest, Pair) else f" over {widest.seeds} seeds"
    return (
        f"No two of {listed([spoken(run) for run in runs])} can be told apart: they differ by up to "
        f"{max(abs(one.points) for one in shown):.1f} points (widest interval {widest.low:+z.1f} to "
        f"{widest.high:+z.1f}{seeds}; least p {format_p(min(pair.corrected_p for pair in ties))}), and a true "
        f"difference of {max(pair.detectable for pair in ties):.1f} points would have been found four times in five "
        "between any."
    )


def _victories(clear: list[Pair]) -> list[str]:
    """Who beats whom: from three winners on in one clause for each loser, and losers to the same winners together."""
    by_loser: dict[str, list[Pair]] = {}
    for pair in clear:
        by_loser.setdefault(pair.loser, []).append(pair)
    by_winners: dict[tuple[str, ...], list[list[Pair]]] = {}
    for found in by_loser.values():
        by_winners.setdefault(tuple(pair.winner for pair in found), []).append(found)
    texts = []
    for winners, losers in by_winners.items():
        if len(winners) >= SEVERAL:
            beaten = [f"{spoken(found[0].loser)} by {_leads(found)}" for found in losers]
            texts.append(f"{listed([spoken(run) for run in winners])} beat {listed(beaten)}")
        else:
            texts += [_beaten(found) for found in losers]
    return texts


def _leads(pairs: list[Pair]) -> str:
    """How far several lead before one: `31.4 to 31.6 points (intervals within 30.5 to 32.5 over 3 seeds, p < 0.001)`;
    of the p-values the largest."""
    shown = [pair.lead_interval() for pair in pairs]
    least, most = (f"{choose(points for points, _, _ in shown):.1f}" for choose in (min, max))
    lows, highs = [low for _, low, _ in shown], [high for _, _, high in shown]
    seeds = {pair.over_seeds.seeds if pair.over_seeds else 1 for pair in pairs}
    over = f" over {listed([str(count) for count in sorted(seeds)])} seeds" if seeds != {1} else ""
    return (
        f"{least if least == most else f'{least} to {most}'} points (intervals within {min(lows):.1f} to "
        f"{max(highs):.1f}{over}, p {format_p(max(pair.corrected_p for pair in pairs))})"
    )


def detectable(pair: Pair) -> str:
    """The true difference that the test would have found four times in five."""
    return "none could have been" if pair.detectable is None else f"{pair.detectable:.1f} points"


def _beaten(pairs: list[Pair]) -> str:
    """`LoRA beats the base model by 14.1 points (12.9 to 15.3, p < 0.001), QLoRA by ... and full by ...`."""
    first, *others = pairs
    return listed([str(first), *(f"{spoken(pair.winner)} by {pair.lead()}" for pair in others)])


def test(pairs: list[Pair]) -> str:
    """How the verdicts were reached, in parentheses."""
    corrected = f", corrected for {len(pairs)} pairs by Holm's method" if len(pairs) > 1 else ""
    seeds = ", on the first seed; the interval over seeds must agree" if any(pair.over_seeds for pair in pairs) else ""
    return f"(Differences with 95 % intervals; exact McNemar test{corrected}, level {100 * SIGNIFICANT:.0f} %{seeds}.)"


def _costs(tuned: dict[str, RunRecord]) -> str:
    """Who trained fastest and with the least memory, beside those at the other end."""
    by_time = sorted(tuned, key=lambda run: tuned[run].training.seconds)
    by_memory = sorted(tuned, key=lambda run: tuned[run].training.peak_memory_bytes)
    times = [duration(tuned[run].training.seconds) for run in (by_time[0], by_time[-1])]
    memory = [f"{tuned[run].training.peak_memory_bytes / 1e9:.1f} GB" for run in (by_memory[0], by_memory[-1])]
    and_who = "and" if by_time[0] == by_memory[0] else f"and {spoken(by_memory[0])}"
    return (
        f"{spoken(by_time[0])} trained fastest ({times[0]}; {spoken(by_time[-1])} {times[1]}), "
        f"{and_who} took the least memory ({memory[0]}; {spoken(by_memory[-1])} {memory[1]})"
    )
