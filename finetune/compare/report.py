"""The report: one HTML file with its pictures inside, made from records alone."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from data_prep import LABELS
from data_prep.store import replacing
from finetune import records
from finetune.baselines import Baseline
from finetune.compare import captions, plots
from finetune.compare import mistakes as errors
from finetune.compare import tables as costs
from finetune.compare.ablation import Contrast
from finetune.compare.comparison import Comparison, percent_interval
from finetune.metrics import accuracy_interval
from finetune.recipes import Recipe
from finetune.wording import NAMES, format_p, one_decimal, or_none

RATES = ("articles/s", "real tokens/s")
DECIMALS = {
    "articles/s": "{:,.1f}",
    "real tokens/s": "{:,.1f}",
    "trained parameters": "{:,.0f}",
    "seeds": "{:.0f}",
    "mean accuracy %": "{:.2f}",
    "standard deviation": "{:.2f}",
    "lowest %": "{:.2f}",
    "highest %": "{:.2f}",
    "share of parameters %": "{:.2f}",
    "against base": "{:+z.1f}",
    "macro-F1 against base": "{:+z.1f}",
}


# A page that lists thousands of rows is slow on a phone, and nobody reads them.
LISTED_ERRORS = 400


def write_report(comparison: Comparison, path: Path, articles: Mapping[str, str]) -> Path:
    """Write the report of a comparison; returns its path.

    Args:
        comparison: The runs.
        path: The file to write.
        articles: Texts of the test rows by id (`errors.articles`, or `errors.publishable_articles` where the report
            leaves this machine); may be empty.
    """
    html = render(comparison, articles)
    with replacing(path) as file:
        file.write(html)
    return path


def render(
    comparison: Comparison,
    articles: Mapping[str, str],
    contrasts: Sequence[Contrast] = (),
    refused: Mapping[str, str] | None = None,
) -> str:
    """The report as HTML.

    Args:
        comparison: The runs.
        articles: Texts of the test rows by id; may be empty.
        contrasts: Other folders of records that differ from this one in one thing.
        refused: Those that might, by name, and why they do not.
    """
    environment = Environment(
        loader=PackageLoader("finetune.compare"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["code"] = _with_code
    sources = provenance(comparison)
    return environment.get_template("report.html").render(
        comparison=comparison,
        captions=captions,
        names=NAMES,
        labels=LABELS,
        format_p=format_p,
        one_decimal=one_decimal,
        or_none=or_none,
        articles=articles,
        listed_errors=LISTED_ERRORS,
        judged=errors.judged(comparison),
        mistakes=errors.mistakes(comparison, articles),
        suspects=_suspected(comparison, articles),
        without_suspects=errors.without_suspects(comparison),
        provenance=sources,
        environments=[where for source in sources for where in source.environments],
        share_interval=_share_interval,
        pictures=_pictures(comparison),
        contrasts=contrasts,
        refused=refused or {},
        recipes=_recipes(comparison),
        **_tables(comparison),
    )


@dataclass(frozen=True)
class Source:
    """A record that figures of the report come from.

    Attributes:
        anchor: What the tables link to, None for a variant's.
        trained, evaluated: The commits; `-` where nothing was trained.
        trained_on, evaluated_on: The machines.
    """

    name: str
    record: str
    anchor: str | None
    seed: str
    trained: str
    evaluated: str
    trained_on: str
    evaluated_on: str
    environments: list[records.Environment]

    @property
    def environment(self) -> records.Environment:
        """Of the evaluation."""
        return self.environments[-1]


def provenance(comparison: Comparison) -> list[Source]:
    """Every record of the comparison: baselines, runs, and the variants of each."""
    found = []
    for name in comparison.predictions:
        if name in comparison.baselines:
            places = comparison.baselines | comparison.svm_curve
            found.extend(_source_of_baseline(place, of) for place, of in places.items() if of.name == name)
            continue
        found.append(_source(comparison.records[name], name))
        variants = [*comparison.seeds.get(name, []), *comparison.curve.get(name, [])]
        found.extend(_source(variant.record, None) for variant in variants)
    return found


def _source(record: records.RunRecord, anchor: str | None) -> Source:
    training, where = record.training, record.evaluation.environment
    return Source(
        name=record.run,
        record="/".join(filter(None, (record.run, record.variant, records.RECORD))),
        anchor=anchor,
        seed=str(record.seed) if training else "-",
        trained=training.environment.short_commit if training else "-",
        evaluated=where.short_commit,
        trained_on=_machine(training.environment) if training else "-",
        evaluated_on=_machine(where),
        environments=record.environments,
    )


def _source_of_baseline(place: str, baseline: Baseline) -> Source:
    where = baseline.environment
    return Source(
        name=baseline.name,
        record=f"baselines/{place}/{records.RECORD}",
        anchor=baseline.name if place == baseline.name else None,
        seed="-",
        trained="-",
        evaluated=where.short_commit,
        trained_on="-",
        # What is no language model runs on the processor, whatever else is there.
        evaluated_on=_machine(where) if baseline.model else _processor(where),
        environments=[where],
    )


def _machine(where: records.Environment) -> str:
    gpu = where.hardware["gpu"]
    return f"{gpu}, {where.hardware['cores']} cores" if gpu else _processor(where)


def _processor(where: records.Environment) -> str:
    return f"{where.hardware['cpu']}, {where.hardware['cores']} cores"


def _share_interval(share: float, rows: int) -> str:
    """Wilson's interval of a share of rows, in percent."""
    return percent_interval(*accuracy_interval(round(share * rows), rows))


def _tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    tables = {
        "classes": comparison.class_table(),
        "calibration": comparison.calibration_table().T.fillna(""),
        "confused": comparison.confusion_table(),
        "cost": comparison.cost_table(),
        "seeds": comparison.seeds_table(),
        "merged": comparison.merged_table(),
        "curve": costs.curve_table(comparison),
        "time_to_accuracy": costs.time_to_accuracy(comparison),
    }
    return {name: table if name == "confused" else formatted(table) for name, table in tables.items()}


def _recipes(comparison: Comparison) -> tuple[pd.DataFrame, dict[str, str]]:
    """How the runs were trained: the settings that differ, a line each and a column a run, and those that do not."""
    tuned = comparison.tuned()
    known = [field.name for field in fields(Recipe) if any(field.name in of.settings for of in tuned.values())]
    columns = {NAMES[run]: [_setting(name, record) for name in known] for run, record in tuned.items()}
    table = pd.DataFrame(columns, index=known, dtype=str)
    differs = table.nunique(axis=1) > 1
    return table[differs], {name: line.iloc[0] for name, line in table[~differs].iterrows()}


def _setting(name: str, record: records.RunRecord) -> str:
    if name.startswith("lora_") and not record.settings.get("adapter"):
        return "-"
    # What ran, where it was left to the suite.
    return str(record.engine if name == "engine" else record.settings.get(name, "-"))


def _pictures(comparison: Comparison) -> dict[str, str]:
    """The pictures as data addresses, by the names that the page knows."""
    drawings = {
        "accuracy": plots.accuracy_bars,
        "tuned": plots.tuned_accuracy,
        "classes": plots.f1_by_class,
        "pareto": plots.pareto,
        "curve": plots.learning_curve,
        "reliability": plots.reliability,
        "coverage": plots.accuracy_against_coverage,
        "confusion": plots.confusion_grid,
    }
    return {name: _embedded(draw(comparison)) for name, draw in drawings.items()}


def _suspected(comparison: Comparison, articles: Mapping[str, str]) -> list[dict[str, str]]:
    """The rows whose label is doubted: id, label, what all judged runs say instead, and the text."""
    answers = comparison.predictions[errors.judged(comparison)[0]]
    return [
        {
            "id": answers[row].id,
            "label": answers[row].label,
            "instead": answers[row].prediction,
            "text": articles.get(answers[row].id, ""),
        }
        for row in errors.suspects(comparison)
    ]


def _with_code(text: str) -> Markup:
    """A sentence of a docstring as HTML: `names` in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """A table of figures as text: one decimal (of rates from 100 on none), signs on differences, thousands apart.

    A second decimal where one would make nothing of something.
    """
    columns = {}
    for column in table:
        default = "{:+z.1f}" if column.endswith("against base") else "{:.1f}"
        numeric = pd.api.types.is_numeric_dtype(table[column])
        is_large = column in RATES and table[column].min() >= 100
        form = "{:,.0f}" if is_large else DECIMALS.get(column, default)
        columns[column] = table[column].map(partial(_written, form)) if numeric else table[column]
    return pd.DataFrame(columns, index=table.index)


def _written(form: str, value: float) -> str:
    text = form.format(value)
    # Less than half of a hundredth may be a sum's last digit.
    is_lost = abs(value) >= 0.005 and float(text.replace(",", "")) == 0
    return form.replace(".1f", ".2f").format(value) if is_lost else text


def _embedded(figure: Figure) -> str:
    """The figure as a data address, so that the report is one file."""
    return "data:image/svg+xml;base64," + base64.b64encode(plots.as_svg(figure)).decode()
