"""The report: one HTML file with its pictures inside, made from records alone."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from data_prep import LABELS
from data_prep.store import replacing
from finetune import costs, errors, plots
from finetune.comparison import Comparison
from finetune.wording import NAMES, format_p

DECIMALS = {
    "trained parameters": "{:,.0f}",
    "seeds": "{:.0f}",
    "mean accuracy %": "{:.2f}",
    "standard deviation": "{:.2f}",
    "lowest %": "{:.2f}",
    "highest %": "{:.2f}",
    "share of parameters %": "{:.2f}",
    "Brier": "{:.3f}",
    "log loss": "{:.3f}",
    "against base": "{:+.1f}",
    "macro-F1 against base": "{:+.1f}",
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
    environment = Environment(
        loader=PackageLoader("finetune"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("report.html").render(
        comparison=comparison,
        names=NAMES,
        format_p=format_p,
        quality=formatted(comparison.quality_table()).T.to_html(border=0),
        calibration=formatted(comparison.calibration_table()).T.to_html(border=0),
        confused=comparison.confusion_table().to_html(border=0),
        labels=LABELS,
        judged=errors.judged(comparison),
        mistakes=errors.mistakes(comparison, articles),
        listed_errors=LISTED_ERRORS,
        articles=articles,
        suspects=_suspected(comparison, articles),
        without_suspects=errors.without_suspects(comparison),
        cost=formatted(comparison.cost_table()).T.to_html(border=0),
        time_to_accuracy=costs.time_to_accuracy(comparison),
        curve=formatted(costs.curve_table(comparison)),
        seeds=formatted(comparison.seeds_table()),
        pictures={
            name: _embedded(draw(comparison))
            for name, draw in {
                **({"pareto": plots.pareto} if comparison.tuned() else {}),
                **({"curve": plots.learning_curve} if any(comparison.curve.values()) else {}),
                "accuracy": plots.accuracy_bars,
                "classes": plots.f1_by_class,
                "reliability": plots.reliability,
                "coverage": plots.accuracy_against_coverage,
                "confusion": plots.confusion_grid,
            }.items()
        },
    )
    with replacing(path) as file:
        file.write(html)
    return path


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


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """A table of figures as text: one decimal, signs on differences, thousands apart."""
    columns = {}
    for column in table:
        default = "{:+.1f}" if column.endswith("against base") else "{:.1f}"
        form = DECIMALS.get(column, default)
        numeric = pd.api.types.is_numeric_dtype(table[column])
        columns[column] = table[column].map(form.format) if numeric else table[column]
    return pd.DataFrame(columns, index=table.index)


def _embedded(figure: Figure) -> str:
    """The figure as a data address, so that the report is one file."""
    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()
