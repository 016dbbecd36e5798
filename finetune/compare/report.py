"""The report: one HTML file with its pictures inside, made from records alone."""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from data_prep import find_task, known_tasks
from data_prep.files import FEW, replacing
from data_prep.rows import some
from finetune import metrics
from finetune.baseline_records import Baseline
from finetune.compare import mistakes, plots, tables, verdict
from finetune.compare.ablation import Ablation
from finetune.compare.comparison import Comparison
from finetune.config import embedded
from finetune.machine import PACKAGES
from finetune.wording import NAMES, percent, sentence, spoken

# A page that lists thousands of rows is slow on a phone, and nobody reads them.
LISTED_ERRORS = 400
# Of a GPU, by their keys in a record's hardware.
DRIVERS = {"CUDA": "cuda", "GPU driver": "driver"}


def write_report(comparison: Comparison, path: Path, articles: Mapping[str, str], **asked: Any) -> Path:
    """Write the report of a comparison; returns its path.

    Args:
        comparison: The runs.
        path: The file to write.
        articles: Texts of the test rows by id (`mistakes.articles`, or `mistakes.publishable_articles` where the report
            leaves this machine); may be empty.
        asked: Besides, as in `render`.

    Raises:
        UserError: As `verdict.decide`.
    """
    html = render(comparison, articles, **asked)
    with replacing(path) as file:
        file.write(html)
    return path


def render(
    comparison: Comparison,
    articles: Mapping[str, str],
    ablations: Sequence[Ablation] = (),
    refused: Mapping[str, str] | None = None,
    margin: float = verdict.MARGIN,
    save: str = "time",
) -> str:
    """The report as HTML.

    Args:
        comparison: The runs.
        articles: Texts of the test rows by id; may be empty.
        ablations: Other folders of records that differ from this one in one setting.
        refused: Those that might, by name, and why they do not.
        margin, save: What the verdict asks, as in `verdict.decide`.
    """
    environment = Environment(
        loader=PackageLoader("finetune.compare"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["code"] = _with_code
    environment.globals["pictured"] = data_address
    differing, shared = tables.recipes(comparison)
    suspects, wrong = mistakes.suspects(comparison), mistakes.mistakes(comparison, articles)
    data = comparison.any_record.data
    return environment.get_template("report.html").render(
        comparison=comparison,
        verdict=verdict.decide(comparison, margin, save),
        colours=plots.COLOURS,
        names=NAMES,
        labels=comparison.classes,
        most=metrics.MOST_CLASSES,
        guess=(1 - 1 / len(comparison.classes), math.log(len(comparison.classes))),
        tables=tables,
        plots=plots,
        notes=notes(comparison),
        ablations=ablations,
        refused=refused or {},
        judged=mistakes.judged(comparison),
        mistakes=wrong,
        # Rows without their text tell a reader nothing.
        listed=[mistake for mistake in wrong if mistake.text is not None][:LISTED_ERRORS],
        suspects=suspects,
        listed_suspects=_suspected(comparison, articles, suspects),
        differing=differing,
        shared=shared,
        # Empty where the code has the prompt no more.
        prompt=find_task(data.task).form(data.prompt) if data.task in known_tasks() else [],
        software=_software(comparison),
    )


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know of the figures, in sentences; each only where it is so."""
    record, tuned = comparison.any_record, comparison.tuned()
    data, found = record.data, []
    task = find_task(data.task) if data.task in known_tasks() else None
    if data.source == "sample":
        found.append(
            "We wrote the built-in sample for this project. It shows that everything works and what the methods cost "
            f"here. These are not {task.title if task else data.task} results."
        )
    else:
        train_rows = next(iter(tuned.values()), record).data.train_rows + data.validation_rows
        if task and task.published_rows and data.title == task.title:
            whole = task.published_rows
            possessive = f"{data.title}'" if data.title.endswith("s") else f"{data.title}'s"
            found.append(
                f"Training and validation used {train_rows:,} of {possessive} {whole['train']:,} rows, the test "
                f"{data.test_rows:,} of {whole['test']:,}."
            )
        else:
            found.append(f"Training and validation used {train_rows:,} rows, the test {data.test_rows:,}.")
    rows_of = {label: of.rows for label, of in record.evaluation.scoring.classes.items()}
    if absent := [label for label, rows in rows_of.items() if not rows]:
        found.append(f"No test row has the class {some(absent)}: macro-F1 is the mean of the other classes.")
    counts = {label: rows for label, rows in rows_of.items() if 0 < rows < FEW}
    if counts:
        named = some([f"{label} ({counts[label]})" for label in sorted(counts, key=counts.__getitem__)])
        found.append(f"Fewer than {FEW} test rows, too few to judge a class by: {named}.")
    if repeated := sum(comparison.repeated):
        best = max(comparison.answering(), key=lambda name: comparison.scoring[name].accuracy)
        alone = comparison.without_duplicates[best]
        rest = f": without them, {spoken(best)} gets {percent(alone.accuracy)} %" if alone else ""
        found.append(f"{repeated:,} test rows repeat a {comparison.repeated_splits} row, exactly or nearly{rest}.")
    if record.settings.get("model") == "embedded":
        found.append(
            f"{record.model} comes from a 4-bit file ({embedded.QUANTISATION}), so every method starts from weights "
            "that were rounded once."
        )
        if "qlora" in comparison.records:
            found.append("QLoRA rounds them a second time.")
    generation = comparison.records["base"].evaluation.generation
    if generation:
        rows = generation.metrics.rows
        found.append(
            f"In generation, the base model gave a valid answer to {round(generation.valid_share * rows):,} of "
            f"{rows:,} test rows."
        )
    for name in ("base", "few_shot"):
        if name in comparison.predictions:
            label, share = comparison.most_frequent(name)
            found.append(f"{sentence(spoken(name))} answers {label} most often: for {share:.0%} of the rows.")
    jobs = max((one.environment.jobs for run in tuned for one in comparison.trainings(run)), default=1)
    if jobs > 1:
        found.append(
            f"Up to {jobs} notebooks ran at once and shared the processor, so seconds are upper bounds. A few seconds "
            "are no difference."
        )
    return found


def _suspected(comparison: Comparison, articles: Mapping[str, str], suspects: Sequence[int]) -> pd.DataFrame:
    """The rows whose label is in doubt and whose text is at hand: label, what all judged runs say instead, text."""
    answers = comparison.predictions[mistakes.judged(comparison)[0]]
    rows = [answers[row] for row in suspects if answers[row].id in articles][:LISTED_ERRORS]
    lines = {row.id: {"label": row.label, "all say": row.prediction, "article": articles[row.id]} for row in rows}
    return pd.DataFrame.from_dict(lines, orient="index")


def _software(comparison: Comparison) -> dict[str, str]:
    """Versions of packages, Python, CUDA and the GPU's driver over all records, those that differ beside each other."""
    counts: dict[str, Counter] = {}
    for of in tables.all_records(comparison).values():
        for where in [of.environment] if isinstance(of, Baseline) else of.environments:
            drivers = DRIVERS if where.hardware["gpu"] else {}
            versions = {name: where.packages.get(name) for name in PACKAGES}
            versions |= {"Python": where.hardware.get("python")}
            versions |= {name: where.hardware.get(key) for name, key in drivers.items()}
            for name, version in versions.items():
                counts.setdefault(name, Counter())[version or "not recorded"] += 1
    return {name: " or ".join(sorted(map(str, of))) for name, of in counts.items() if set(of) != {"not recorded"}}


def _with_code(text: str) -> Markup:
    """A sentence of a docstring as HTML: `names` in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def data_address(figure: Figure) -> str:
    """The figure as a data address, so that the report is one file."""
    return "data:image/svg+xml;base64," + base64.b64encode(plots.as_svg(figure)).decode()
