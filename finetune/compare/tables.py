"""Every table, built once as text: for the notebook, the command line, the report and the docs.

A line a method, unless said otherwise. Intervals are 95 %; of several seeds costs are medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields

import pandas as pd

from finetune import metrics, records
from finetune.baseline_records import Baseline
from finetune.compare.calibration import COVERAGES, Calibration, Scores
from finetune.compare.comparison import Comparison, CurvePoint
from finetune.compare.stats import Pair
from finetune.config.recipes import ADAPTER_ONLY, Recipe
from finetune.metrics import accuracy_interval
from finetune.records import Environment, RunRecord, Training
from finetune.wording import (
    NAMES,
    duration,
    extent,
    format_p,
    interval_of,
    one_decimal,
    percent,
    percent_estimate,
    percent_interval,
)

TARGETS = (0.90, 0.92, 0.93, 0.94)


def summary(comparison: Comparison) -> pd.DataFrame:
    """What matters: accuracy (of several seeds the mean) and costs, of what answers the task; fits a terminal."""
    lines = {}
    for name in comparison.answering():
        accuracy, low, high = comparison.accuracy(name)
        lines[NAMES[name]] = {"accuracy %": percent(accuracy), "95 % interval": percent_interval(low, high)}
        if comparison.over_seeds:
            lines[NAMES[name]]["seeds"] = str(len(comparison.right(name))) if name in comparison.tuned() else "-"
        if name in comparison.tuned():
            trainings = comparison.trainings(name)
            cells = (
                duration(median(trainings, "seconds")),
                f"{median(trainings, 'peak_memory_bytes') / 1e9:.1f}",
                f"{trainings[0].artefact_bytes / 1e6:,.0f}",
            )
        else:
            fitted = comparison.baselines.get(name)
            cells = (duration(fitted.fit_seconds) if fitted and fitted.fit_seconds else "-", "-", "-")
        lines[NAMES[name]] |= dict(zip(("training", "memory GB", "artefact MB"), cells, strict=True))
    return _lines(lines)


def quality(comparison: Comparison) -> pd.DataFrame:
    """Accuracy and all METRICS of the first seed with their intervals, and accuracy on the rows whose article is in no
    training or validation row."""
    lines = {}
    for name, of in comparison.scoring.items():
        figures, alone = list(metrics.figures(of).items()), comparison.without_duplicates[name]
        pairs = zip(figures[::2], figures[1::2], strict=True)
        lines[NAMES[name]] = {
            "accuracy % (95 % interval)": percent_estimate(*of.estimate),
            **{title: f"{value} ({interval})" for (title, value), (_, interval) in pairs},
            "rows without a duplicate": f"{alone.rows:,}" if alone else "0",
            "accuracy on these %": percent_estimate(*alone.estimate) if alone else "-",
        }
    return _lines(lines)


def classes(comparison: Comparison) -> pd.DataFrame:
    """F1 of each class in percent, with its interval; of many classes the worst: a column a method."""
    shown = metrics.shown_classes(comparison.scoring.values())
    figures = {NAMES[name]: [of.classes[label] for label in shown] for name, of in comparison.scoring.items()}
    cells = {
        name: [percent_estimate(one.f1, one.f1_low, one.f1_high) if one.rows else "no test row" for one in of]
        for name, of in figures.items()
    }
    return pd.DataFrame(cells, index=shown)


def seeds(comparison: Comparison) -> pd.DataFrame:
    """Mean and spread over the seeds of each run that has several, and the interval over seeds and rows."""
    lines = {}
    for run, mean in comparison.over_seeds.items():
        shares = comparison.right(run).mean(axis=1)
        lines[NAMES[run]] = {
            "seeds": str(len(shares)),
            "mean accuracy %": f"{100 * mean.mean:.2f}",
            "95 % interval": percent_interval(*mean.interval()),
            "standard deviation": f"{100 * shares.std(ddof=1):.2f}",
            "lowest %": f"{100 * shares.min():.2f}",
            "highest %": f"{100 * shares.max():.2f}",
        }
    return _lines(lines)


def pairs_over_seeds(comparison: Comparison) -> pd.DataFrame:
    """The pairs that were trained with the same seeds: difference in points, and the t test over seeds and rows."""
    lines = {}
    for pair in comparison.pairs:
        if over := pair.over_seeds:
            lines[_pair(pair)] = {
                "seeds": str(over.seeds),
                "points": f"{over.points:+z.2f}",
                "95 % interval": f"{over.low:+z.2f} to {over.high:+z.2f}",
                "p, corrected": format_p(over.corrected_p),
                "result": "tie" if pair.is_tie else "different",
                "p, uncorrected": format_p(over.p_value),
            }
    return _lines(lines)


def pairs(comparison: Comparison) -> pd.DataFrame:
    """The pairs of the first seed: differences in points, and the exact McNemar test."""
    lines = {}
    for pair in comparison.pairs:
        several = {"below 5 %": "yes" if pair.corrected_p < 0.05 else "no"}
        lines[_pair(pair)] = {
            "points": one_decimal(pair.points, "+"),
            "95 % interval": interval_of(pair.low, pair.high, "+"),
            "p, corrected": format_p(pair.corrected_p),
            **(several if comparison.over_seeds else {"result": "tie" if pair.is_tie else "different"}),
            "only the first right": str(pair.only_first),
            "only the second right": str(pair.only_second),
            "p, uncorrected": format_p(pair.p_value),
            "macro-F1 points": one_decimal(pair.f1_points, "+"),
            "macro-F1 interval": interval_of(pair.f1_low, pair.f1_high, "+"),
        }
    return _lines(lines)


def _pair(pair: Pair) -> str:
    return f"{NAMES[pair.first]} against {NAMES[pair.second]}"


def costs(record: RunRecord, *others: Training) -> pd.DataFrame:
    """What a run's training cost, as a table of one line; `-` where it was not measured.

    Args:
        record: The run's.
        others: Its trainings with other seeds, if any: the time then has its range.
    """
    training, trainings = record.training, (record.training, *others)
    energy = median(trainings, "energy_joules")
    line = {
        "training": _median_and_range([one.seconds for one in trainings]),
        "samples/s": _rate(median(trainings, "articles_per_second")),
        "tokens/s": _rate(median(trainings, "tokens_per_second")),
        "peak memory GB": f"{median(trainings, 'peak_memory_bytes') / 1e9:.1f}",
        "energy kJ": "-" if energy is None else f"{energy / 1000:.1f}",
        "trained parameters": f"{training.trainable_parameters:,}",
        "share of parameters %": f"{100 * training.trainable_parameters / training.parameters:.2f}",
        "artefact MB": f"{training.artefact_bytes / 1e6:.1f}",
        "engine": record.engine,
    }
    if training.processes > 1:
        line |= {"device-seconds": f"{median(trainings, 'device_seconds'):,.0f}", "processes": str(training.processes)}
    return _lines({NAMES[record.run]: line})


def all_costs(comparison: Comparison) -> pd.DataFrame:
    """The costs of every tuned run, without those that none of them measured."""
    lines = [costs(record, *comparison.trainings(run)[1:]) for run, record in comparison.tuned().items()]
    table = pd.concat(lines).fillna("-") if lines else pd.DataFrame()
    return table.loc[:, (table != "-").any()]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def median(trainings: Sequence[Training], what: str) -> float | None:
    """The median of a cost over trainings; None where one of them did not measure it."""
    values = [getattr(training, what) for training in trainings]
    return None if None in values else statistics.median(values)


def seconds_to(training: Training, target: float) -> float | None:
    """Seconds of training until a validation first showed this accuracy; None if none did, or was not timed."""
    reached = [
        point.training_seconds
        for point in training.history
        if point.validation_accuracy is not None and point.validation_accuracy >= target
    ]
    return reached[0] if reached else None


def time_to_accuracy(comparison: Comparison) -> pd.DataFrame:
    """Training time until each target was first seen on the validation rows, a column a target; of several seeds the
    median and the range. Runs that were validated once, or not timed, are left out."""
    lines = {}
    for run in comparison.tuned():
        trainings = comparison.trainings(run)
        timed = [sum(None not in (p.training_seconds, p.validation_accuracy) for p in one.history) for one in trainings]
        if min(timed) > 1:
            lines[NAMES[run]] = {f"{target:.0%}": _reached(trainings, target) for target in TARGETS}
    svm = comparison.baselines.get("svm")
    if lines and svm:
        best = svm.validation_accuracy
        lines[NAMES["svm"]] = {
            f"{target:.0%}": duration(svm.fit_seconds) if best >= target else _never(best) for target in TARGETS
        }
    return _lines(lines)


def _reached(trainings: Sequence[Training], target: float) -> str:
    reached = [found for training in trainings if (found := seconds_to(training, target)) is not None]
    if not reached:
        accuracies = [point.validation_accuracy for training in trainings for point in training.history]
        return _never(max(accuracy for accuracy in accuracies if accuracy is not None))
    if len(reached) < len(trainings):
        return f"{len(reached)} of {len(trainings)} seeds ({_range(reached)})"
    return _median_and_range(reached)


def _never(best: float) -> str:
    return f"never (best {percent(best)} %)"


def _median_and_range(seconds: Sequence[float]) -> str:
    """`32 s (32 s to 59 s)`; of values that are written alike only one of them."""
    middle, reach = duration(statistics.median(seconds)), _range(seconds)
    return middle if middle == reach else f"{middle} ({reach})"


def _range(seconds: Sequence[float]) -> str:
    return extent([duration(min(seconds)), duration(max(seconds))])


def learning_curve(comparison: Comparison) -> pd.DataFrame:
    """Accuracy in percent with its interval, and training time: a line a number of training rows, a column a method."""

    def cell(point: CurvePoint) -> str:
        return f"{percent_estimate(*point.scoring.estimate)}, {duration(point.seconds)}"

    curves = comparison.learning_curve()
    columns = {NAMES[run]: {point.train_rows: cell(point) for point in points} for run, points in curves.items()}
    table = pd.DataFrame(columns).sort_index().fillna("-")
    return table.set_axis([f"{count:,} rows" for count in table.index])


def calibration(comparison: Comparison) -> pd.DataFrame:
    """Calibration errors before and after the temperature, and accuracy when abstaining: a column a run."""

    def scores(of: Scores, when: str) -> dict[str, str]:
        error = of.error
        return {
            f"ECE %, {when}": percent_estimate(error.value, error.low, error.high),
            **{
                f"{name}, {when}": f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"
                for name, figure in (("Brier", of.brier), ("log loss", of.log_loss))
            },
        }

    def column(of: Calibration) -> dict[str, str]:
        cells = scores(of.scores, "as it is")
        cells["temperature"] = of.temperature if isinstance(of.temperature, str) else f"{of.temperature:.2f}"
        if of.scaled:
            cells |= scores(of.scaled, "with the temperature")
        for share in COVERAGES:
            at = of.accuracy_at(share)
            cells[f"accuracy % of the most confident {share:.0%}"] = percent_estimate(at.value, at.low, at.high)
        return cells

    lines = {NAMES[run]: column(of) for run, of in comparison.calibration.items()}
    return pd.DataFrame(lines).fillna("")


def generation(comparison: Comparison) -> pd.DataFrame:
    """Answers that the models wrote freely, beside scoring; `-` where none were generated."""

    lines = {}
    for run, record in comparison.records.items():
        of = record.evaluation.generation
        shares = {
            "valid JSON %": of and of.valid_share,
            "accuracy %": of and of.metrics.accuracy,
            "agrees with scoring %": of and of.agreement_with_scoring,
        }
        lines[NAMES[run]] = {"generated rows": f"{of.metrics.rows:,}" if of else "-"}
        for name, value in shares.items():
            rows = of.metrics.rows if of else 0
            ends = accuracy_interval(round(value * rows), rows) if of else ()
            lines[NAMES[run]][name] = percent_estimate(value, *ends) if of else "-"
        lines[NAMES[run]]["scored samples/s"] = f"{record.evaluation.articles_per_second:.1f}"
    return _lines(lines)


def merged(comparison: Comparison) -> pd.DataFrame:
    """Accuracy of merged models beside their adapters' own, and how far the two agree."""
    return _lines(
        {
            NAMES[run]: {
                "merged into": of.base,
                "adapter %": percent(of.adapter_accuracy),
                "merged %": percent(of.scoring.accuracy),
                "95 % interval": percent_interval(*of.scoring.estimate[1:]),
                "same label %": percent(of.agreement),
                "largest difference in probability": f"{of.largest_difference:.3f}",
                "merged model MB": f"{of.artefact_bytes / 1e6:.1f}",
            }
            for run, of in comparison.merged.items()
        }
    )


def recipes(comparison: Comparison) -> tuple[pd.DataFrame, dict[str, str]]:
    """How the runs were trained: the settings that differ, a line each and a column a run, and those that do not."""
    tuned = comparison.tuned()
    # What a notebook's edited cell adds to a recipe comes last.
    names = [*(field.name for field in fields(Recipe)), "callbacks", "other_arguments"]
    known = [name for name in names if any(of.settings.get(name) not in (None, [], {}) for of in tuned.values())]

    def value(name: str, record: RunRecord) -> str:
        if name in ADAPTER_ONLY and not record.settings.get("adapter"):
            return "-"
        # What ran, where it was left to the suite.
        return str(record.engine if name == "engine" else record.settings.get(name, "-"))

    columns = {NAMES[run]: [value(name, record) for name in known] for run, record in tuned.items()}
    table = pd.DataFrame(columns, index=known, dtype=str)
    differs = table.nunique(axis=1) > 1
    return table[differs], {name: line.iloc[0] for name, line in table[~differs].iterrows()}


def sources(comparison: Comparison) -> pd.DataFrame:
    """Every record that figures come from, a line each, by its place in the folder: commits, machines, command."""
    lines = {}
    for place, of in all_records(comparison).items():
        training = of.training if isinstance(of, RunRecord) else None
        where = of.evaluation.environment if isinstance(of, RunRecord) else of.environment
        # What is no language model runs on the processor, whatever else is there.
        on_gpu = isinstance(of, RunRecord) or of.model or of.name == "encoder"
        lines[place] = {
            "seed": str(of.seed) if training else "-",
            "trained": f"{training.environment.short_commit}; {_machine(training.environment)}" if training else "-",
            "evaluated": f"{where.short_commit}; {_machine(where, bool(on_gpu))}; {where.created}",
            "command": where.command,
        }
    return _lines(lines)


def all_records(comparison: Comparison) -> dict[str, RunRecord | Baseline]:
    """Every record of the comparison by its place in the folder: baselines, runs, and the variants of each."""
    found: dict[str, RunRecord | Baseline] = {}
    fewer = comparison.baselines | comparison.svm_curve
    for name in comparison.predictions:
        if name in comparison.baselines:
            found |= {f"baselines/{place}/{records.RECORD}": of for place, of in fewer.items() if of.name == name}
            continue
        variants = [*comparison.seeds.get(name, []), *comparison.curve.get(name, [])]
        for record in (comparison.records[name], *(variant.record for variant in variants)):
            found["/".join(filter(None, (name, record.variant, records.RECORD)))] = record
    return found


def _machine(where: Environment, on_gpu: bool = True) -> str:
    return f"{(on_gpu and where.hardware['gpu']) or where.hardware['cpu']}, {where.hardware['cores']} cores"


def _lines(lines: dict[str, dict[str, str]]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(lines, orient="index")
