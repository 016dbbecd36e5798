"""The answer: a comparison in one paragraph, true whatever the figures are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from finetune.compare.stats import SIGNIFICANT, Pair
from finetune.metrics import Metrics
from finetune.wording import duration, extent, format_p, interval_of, listed, one_decimal, sentence, span, spoken

if TYPE_CHECKING:
    from finetune.compare.comparison import Comparison

# Winners over the same run that are told of together; the table of pairs has each.
SEVERAL = 3


def paragraph(comparison: Comparison) -> str:
    """What was measured, who beats whom by how much, what cannot be told apart, and what it cost."""
    tuned = comparison.tuned()
    among = [pair for pair in comparison.pairs if {pair.first, pair.second} <= set(tuned)]
    sentences = [_setting(comparison), *([_reached(comparison)] if tuned else []), *_verdicts(comparison.pairs)]
    if among and all(pair.is_tie for pair in among):
        sentences.append(_what_may_decide(among))
    if comparison.pairs:
        sentences.append(test(comparison.pairs))
    if len(tuned) > 1:
        sentences.append(_costs(comparison))
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
    return f"Tuned, the model gets {listed(parts)}{_over_seeds(comparison)}."


def _over_seeds(comparison: Comparison) -> str:
    """Of how many seeds the accuracies are means, by run where that differs; empty where each is of one."""
    seeds = {run: len(comparison.right(run)) for run in comparison.tuned()}
    counts = set(seeds.values())
    if counts == {1}:
        return ""
    if len(counts) == 1:
        return f" (means over {counts.pop()} seeds)"
    return f" (means over seeds: {listed([f'{count} of {spoken(run)}' for run, count in seeds.items()])})"


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
    is_whole = len(ties) == math.comb(len(runs), 2) and all(pair.judged.detectable is not None for pair in ties)
    if len(runs) > 2 and is_whole:
        return _all_alike(runs, ties)
    parts = [f"{pair.tie()}, {detectable(pair)}" for pair in ties]
    return (
        "Cannot be told apart, each with the true difference that would have been found four times in five: "
        f"{'; '.join(parts)}."
    )


def _all_alike(runs: list[str], ties: list[Pair]) -> str:
    """Several runs of which no two can be told apart, in one sentence; the table of pairs has the rest."""
    widest = _widest(ties)
    seeds = f" over {widest.over_seeds.seeds} seeds" if widest.over_seeds else ""
    points = max(abs(pair.judged.points) for pair in ties)
    apart = f"{spoken(widest.first)} minus {spoken(widest.second)}"
    detected = max(pair.judged.detectable for pair in ties)
    return (
        f"No two of {listed([spoken(run) for run in runs])} can be told apart: they differ by up to "
        f"{one_decimal(points)} points (least p {format_p(min(pair.judged.corrected_p for pair in ties))}; the widest "
        f"interval, of {apart}, is {interval_of(widest.judged.low, widest.judged.high, '+')}{seeds}), and a true "
        f"difference of {one_decimal(detected)} points would have been found four times in five between any two."
    )


def _widest(pairs: list[Pair]) -> Pair:
    return max(pairs, key=lambda pair: pair.judged.high - pair.judged.low)


def _what_may_decide(among: list[Pair]) -> str:
    """Ties are no proof of equality: how far the tuned models may still be apart."""
    farthest = max(max(abs(pair.judged.low), abs(pair.judged.high)) for pair in among)
    return (
        "That does not make them equal: taken one by one, the intervals allow differences of up to "
        f"{one_decimal(farthest)} points. Where that does not matter, cost decides between the tuned models."
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
    points = extent([one_decimal(choose(lead for lead, _, _ in shown)) for choose in (min, max)])
    lows, highs = [low for _, low, _ in shown], [high for _, _, high in shown]
    seeds = {pair.over_seeds.seeds if pair.over_seeds else 1 for pair in pairs}
    over = f" over {listed([str(count) for count in sorted(seeds)])} seeds" if seeds != {1} else ""
    p_value = format_p(max(pair.judged.corrected_p for pair in pairs))
    return f"{points} points (intervals within {interval_of(min(lows), max(highs))}{over}, p {p_value})"


def detectable(pair: Pair) -> str:
    """The true difference that the test would have found four times in five."""
    found = pair.judged.detectable
    return f"none, {pair.what_tells_apart()}" if found is None else f"{one_decimal(found)} points"


def _beaten(pairs: list[Pair]) -> str:
    """`LoRA beats the base model by 14.1 points (12.9 to 15.3, p < 0.001), QLoRA by ... and full by ...`."""
    first, *others = pairs
    return listed([str(first), *(f"{spoken(pair.winner)} by {pair.lead()}" for pair in others)])


def test(pairs: list[Pair]) -> str:
    """How the verdicts were reached, in parentheses."""
    corrected = f", corrected for {len(pairs)} pairs by Holm's method" if len(pairs) > 1 else ""
    tests = {True: "t test over seeds and test rows", False: "exact McNemar test"}
    used = [tests[is_over] for is_over in (True, False) if any(bool(pair.over_seeds) == is_over for pair in pairs)]
    where = " where there is one training" if len(used) > 1 else ""
    tested = f"{', '.join(used)}{where}{corrected}, level {100 * SIGNIFICANT:.0f} %"
    return f"(Differences with 95 % intervals, each pair's own; {tested}.)"


def _costs(comparison: Comparison) -> str:
    """Training time and peak memory of each, the least first; over several seeds their ranges."""
    trainings = {run: comparison.trainings(run) for run in comparison.tuned()}
    seconds = {run: sorted(one.seconds for one in of) for run, of in trainings.items()}
    memory = {run: sorted(one.peak_memory_bytes for one in of) for run, of in trainings.items()}
    times = _ranges(seconds, duration)
    peaks = _ranges(memory, lambda held: f"{held / 1e9:.1f} GB")
    return f"Training took {times}{_always_fastest(seconds)}; its peak memory was {peaks}."


def _ranges(values: dict[str, list[float]], shown: Callable[[float], str]) -> str:
    """`32 to 59 seconds with full fine-tuning and ...`, by the middle values."""
    by_middle = sorted(values, key=lambda run: statistics.median(values[run]))
    return listed([f"{span([shown(value) for value in values[run]])} with {spoken(run)}" for run in by_middle])


def _always_fastest(seconds: dict[str, list[float]]) -> str:
    """Of several seeds, which run's slowest training was faster than any other run's; one training says nothing."""
    if any(len(of) == 1 for of in seconds.values()):
        return ""
    fastest, second = sorted(seconds, key=lambda run: seconds[run][0])[:2]
    if seconds[fastest][-1] < seconds[second][0]:
        return f" ({spoken(fastest)} was always the fastest)"
    return " (none was always the fastest)"
