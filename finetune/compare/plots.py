"""The pictures. Colours are Okabe and Ito's, told apart by colour-blind readers; each picture reads in grey too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.compare import tables
from finetune.compare.comparison import Comparison
from finetune.compare.verdict import Verdict, cost
from finetune.config.methods import ALL
from finetune.metrics import MOST_CLASSES, Metrics
from finetune.records import RunRecord, Training
from finetune.wording import NAMES

COLOURS = {run: look.color for run, look in ALL.items()}
LINES = {run: look.line for run, look in ALL.items()}
MARKERS = {run: look.marker for run, look in ALL.items()}

# A share with the ends of its 95 % interval.
Estimate = tuple[float, float, float]
# The band of the margin.
BAND = "#EEEEEE"
AXES = {"time": "training time", "memory": "peak memory of the training", "artefact size": "size of the artefact"}
# Points of accuracy below the best, as a share.
FARTHEST = 0.06
# Panels in a row: with more, their text is too small to read on a page.
COLUMNS = 3

plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 110,
        "font.size": 10,
        "svg.hashsalt": "finetune",
    }
)


def as_svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes each time; closes it."""
    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    plt.close(figure)
    return content.getvalue()


def training_curves(record: RunRecord) -> Figure:
    """Loss of the answer's tokens, and validation accuracy, by step."""
    history, colour = record.training.history, COLOURS[record.run]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    losses = [(point.step, point.loss) for point in history if point.loss is not None]
    left.plot(*zip(*losses, strict=True), color=colour)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss", ylim=(0, None))
    accuracies = [(p.step, 100 * p.validation_accuracy) for p in history if p.validation_accuracy is not None]
    right.plot(*zip(*accuracies, strict=True), color=colour, marker=MARKERS[record.run])
    right.set(xlabel="step", ylabel="accuracy (%)", title="Validation accuracy", xlim=(0, None))
    return figure


def memory(parts: Mapping[str, int] | None, available: int) -> Figure:
    """What a training takes of the memory, part by part in one bar, beside what is there."""
    if parts is None:
        return _nothing("The memory of this model's training is not known.")
    figure, axes = plt.subplots(figsize=(7.2, 1.6), layout="constrained")
    left, colours = 0.0, plt.get_cmap("tab20c")
    for number, (name, size) in enumerate(parts.items()):
        axes.barh(0, size / 1e9, left=left, height=0.6, color=colours(2 * number), edgecolor="white", label=name)
        left += size / 1e9
    axes.axvline(available / 1e9, color="black", linestyle="--", label=f"there: {available / 1e9:.1f} GB")
    axes.set(xlabel=f"memory (GB); together {left:.1f}", yticks=[], xlim=(0, 1.05 * max(left, available / 1e9)))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def confusion(metrics: Metrics, run: str) -> Figure:
    """A run's confusion matrix; of many classes its largest errors."""
    if len(metrics.classes) > MOST_CLASSES:
        figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
        _draw_confused(axes, metrics, NAMES[run])
        return figure
    figure, axes = plt.subplots(figsize=(4, 3.6), layout="constrained")
    _draw_confusion(axes, metrics, NAMES[run])
    return figure


def confusion_grid(comparison: Comparison) -> Figure:
    """The confusion matrices of all runs; of many classes their largest errors."""
    if len(comparison.classes) > MOST_CLASSES:
        count = len(comparison.records)
        figure, panels = plt.subplots(count, 1, figsize=(9, 2.6 * count), layout="constrained", squeeze=False)
        for axes, (run, record) in zip(panels.flat, comparison.records.items(), strict=True):
            _draw_confused(axes, record.evaluation.scoring, NAMES[run])
        return figure
    figure, panels = _grid(len(comparison.records), height=3.3)
    for axes, (run, record) in zip(panels, comparison.records.items(), strict=True):
        _draw_confusion(axes, record.evaluation.scoring, NAMES[run])
    return figure


def overview(comparison: Comparison, verdict: Verdict) -> Figure:
    """Accuracy with its interval against what the user wants to save. The band holds what is within the margin of the
    highest accuracy; what is far below has no place in the picture, and is named under it."""
    costs = {name: cost(comparison, name, verdict.save) for name in verdict.methods}
    estimates = {name: comparison.accuracy(name) for name in verdict.methods}
    best = estimates[verdict.best][0]
    # Farther below, the close ones could not be told apart.
    shown = [name for name in verdict.methods if estimates[name][0] >= best - max(FARTHEST, 0.03 * verdict.margin)]
    unit, scale = {"time": ("s", 1), "memory": ("GB", 1e-9), "artefact size": ("MB", 1e-6)}[verdict.save]
    if verdict.save == "time" and max(costs.values()) > 7200:
        unit, scale = "h", 1 / 3600
    figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    axes.axhspan(100 * best - verdict.margin, 100 * best, color=BAND, linewidth=0)
    points = f"{verdict.margin:g} point{'s' * (verdict.margin != 1)}"
    axes.annotate(
        f"within {points} of the highest", (0.01, 100 * best - verdict.margin), (0, 3),
        xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=8, color="#555555",
    )  # fmt: skip
    for name in shown:
        _draw_points(axes, name, [(scale * costs[name], estimates[name])], "none")
    left = [f"{NAMES[name]} {100 * estimates[name][0]:.1f} %" for name in estimates if name not in shown]
    below = f"\nfar below: {', '.join(left)}" if left else ""
    reach = scale * max(costs[name] for name in shown)
    axes.set(
        xlabel=f"{AXES[verdict.save]} ({unit}){below}",
        ylabel="accuracy on the test rows (%)",
        xlim=(-0.04 * reach, 1.08 * reach) if reach else (-1, 1),
    )
    axes.grid(axis="y", linewidth=0.4)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def pareto(comparison: Comparison) -> Figure:
    """Accuracy with its interval against each cost that was measured for all; a line joins what nothing beats. Of
    several seeds the mean accuracy and the median cost."""
    tuned = comparison.tuned()
    if not tuned:
        return _nothing("No model was trained yet.")
    costs = {run: measured(comparison.trainings(run)) for run in tuned}
    axis_titles = [title for title in next(iter(costs.values())) if all(of[title] is not None for of in costs.values())]
    columns = 3 if len(axis_titles) > 4 else 2
    lines = -(-len(axis_titles) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(9, 2.9 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(axis_titles) :]:
        axis.set_visible(False)
    for axis, title in zip(axes.flat, axis_titles, strict=False):
        points = {run: (costs[run][title], comparison.accuracy(run)) for run in tuned}
        _draw_pareto(axis, points)
        axis.set(xlabel=title, xlim=(0, 1.1 * max(cost for cost, _ in points.values())))
    for line in axes:
        line[0].set_ylabel("accuracy (%)")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def measured(trainings: Sequence[Training]) -> dict[str, float | None]:
    """The costs that accuracy is drawn against, by axis title; None where one was not measured."""
    energy = tables.median(trainings, "energy_joules")
    return {
        "training time (minutes)": tables.median(trainings, "seconds") / 60,
        "peak memory (GB)": tables.median(trainings, "peak_memory_bytes") / 1e9,
        "energy (kJ)": None if energy is None else energy / 1000,
        "artefact (MB)": trainings[0].artefact_bytes / 1e6,
        "trained parameters (millions)": trainings[0].trainable_parameters / 1e6,
    }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, accuracy) that none beats in one without losing in the other, the cheapest first."""
    front = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def learning_curve(comparison: Comparison) -> Figure:
    """Accuracy with its interval against the number of training rows, a line a method; the linear SVM's too."""
    curves = comparison.learning_curve()
    if not curves:
        return _nothing("No model was trained on fewer rows: python -m finetune curve")
    figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    for run, points in curves.items():
        _draw_points(axes, run, [(of.train_rows, of.scoring.estimate) for of in points], LINES[run])
    axes.set(xlabel="training rows (logarithmic)", ylabel="accuracy on the test rows (%)", xscale="log")
    ticks = sorted({point.train_rows for points in curves.values() for point in points})
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
    return figure


def reliability(comparison: Comparison) -> Figure:
    """Accuracy against confidence, a panel a run; the bars' distance to the diagonal is the calibration error."""
    figure, panels = _grid(len(comparison.records), height=3.1, sharey=True)
    for number, (axes, (run, of)) in enumerate(zip(panels, comparison.calibration.items(), strict=True)):
        found = of.reliability
        axes.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle=":")
        sizes = 12 + 240 * found.rows / found.rows.sum()
        axes.scatter(100 * found.confidence, 100 * found.accuracy, s=sizes, color=COLOURS[run], edgecolor="black")
        axes.set(
            xlabel="confidence (%)",
            xlim=(0, 103),
            ylim=(0, 103),
            title=f"{NAMES[run]}: ECE {of.scores.error.value:.1%}",
        )
        if number % COLUMNS == 0:
            axes.set_ylabel("accuracy (%)")
    return figure


def _grid(count: int, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, `height` inches each, in rows of COLUMNS."""
    columns = min(COLUMNS, count)
    lines = -(-count // columns)
    size = (3.1 * columns, height * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, **shared)
    figure.get_layout_engine().set(h_pad=0.12)
    for unused in axes.flat[count:]:
        unused.remove()
    return figure, list(axes.flat[:count])


def _nothing(text: str) -> Figure:
    """In the place of a picture that there is nothing to draw for."""
    figure, axes = plt.subplots(figsize=(7, 0.5))
    axes.axis("off")
    axes.text(0, 0.5, text)
    return figure


def _draw_pareto(axis, points: dict[str, tuple[float, Estimate]]) -> None:
    """One cost: a point with its interval per run, and the front."""
    for run, point in points.items():
        _draw_points(axis, run, [point], "none")
    ordered = [(cost, 100 * share) for cost, (share, _, _) in points.values()]
    front = [ordered[index] for index in pareto_front(ordered)]
    axis.plot(*zip(*front, strict=True), color="black", linewidth=0.8, linestyle="--", drawstyle="steps-post")


def _draw_points(axis, run: str, points: list[tuple[float, Estimate]], line: Any) -> None:
    """Accuracies with their intervals at places on the x axis."""
    accuracies = [100 * share for _, (share, _, _) in points]
    below = [100 * (share - low) for _, (share, low, _) in points]
    above = [100 * (high - share) for _, (share, _, high) in points]
    axis.errorbar(
        [place for place, _ in points],
        accuracies,
        yerr=[below, above],
        color=COLOURS[run],
        marker=MARKERS[run],
        markersize=6,
        markeredgecolor="black",
        elinewidth=1,
        capsize=3,
        linestyle=line,
        label=NAMES[run],
    )


def _draw_confusion(axes, metrics: Metrics, title: str) -> None:
    counts = np.array(metrics.confusion)
    axes.imshow(counts, cmap="Blues", vmin=0)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if count > counts.max() / 2 else "black"
        axes.text(column, row, f"{count}", ha="center", va="center", color=colour)
    names = list(metrics.classes)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{title}: {metrics.accuracy:.1%}")
    axes.spines[:].set_visible(False)


def _draw_confused(axes: Axes, metrics: Metrics, title: str) -> None:
    """The pairs of classes that were confused most often, as bars."""
    counts, names = np.array(metrics.confusion), list(metrics.classes)
    wrong = np.where(np.eye(len(names), dtype=bool), 0, counts)
    order = (-wrong.ravel()).argsort(kind="stable")[:MOST_CLASSES]
    pairs = [divmod(int(pair), len(names)) for pair in order if wrong.flat[pair]]
    for position, (true, predicted) in enumerate(pairs):
        count = wrong[true, predicted]
        axes.barh(position, count, color="#6BAED6", height=0.7)
        axes.text(count, position, f" {count} of {metrics.classes[names[true]].rows}", va="center", fontsize=8)
    axes.set_yticks(range(len(pairs)), [f"{names[true]} → {names[predicted]}" for true, predicted in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="test rows: true → predicted", title=f"{title}: {metrics.accuracy:.1%}")
