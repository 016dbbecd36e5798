"""docs/speed.md with its picture, the pages of families, faults and memory, and scores in docs/method.md, from records.

    python -m benchmarks.render                 # write the pages and the picture
    python -m benchmarks.render FILE [OTHER]    # print the page of one's own measurements; OTHER is a second host's

The pages' texts are in the files *.md.jinja beside this one.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks import claims, gb10, ladder, memory, scores
from benchmarks.records import SpeedRecord, read
from benchmarks.roofline import scoring_ceiling
from data_prep import DataError, UserError
from data_prep.files import replacing
from finetune import machine
from finetune.paths import PROJECT
from finetune.train.memory import CONTEXT, LATER
from finetune.wording import NAMES, markdown

FOLDER = PROJECT / "results" / "reference" / "throughput"
PUBLISHED = (FOLDER / "h100.json", FOLDER / "h100-other-host.json")
DOCS = PROJECT / "docs"
PAGE = DOCS / "speed.md"
FAULTS = PROJECT / "results" / "reference" / "faults.json"
FAMILIES = PROJECT / "results" / "reference" / "families.json"
METHOD = DOCS / "method.md"
SECOND = "second host"
# A way to save memory may cost this much of its method's best speed.
KEPT_SPEED = 0.7


def main(arguments: list[str] | None = None) -> int:
    """Write or print the page; returns 2 if a file cannot be read or published."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="measurements to print instead")
    parser.add_argument("other", type=Path, nargs="?", help="the same measurements on another host")
    options = parser.parse_args(arguments)
    try:
        text = page(options.file, options.other) if options.file else "\n".join(map(str, publish()))
        print(text or "nothing changed")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def publish() -> list[Path]:
    """Write the pages and the picture anew.

    Returns:
        The files whose content changed.

    Raises:
        DataError: A record is missing, broken, or was measured on a tree with uncommitted changes.
    """
    for path in PUBLISHED:
        if not read(path).is_repeatable:
            raise DataError(path, "was measured on a tree with uncommitted changes: commit, then measure again")
    picture = PAGE.with_suffix(".svg")
    drawn = BytesIO()
    with plt.rc_context({"svg.hashsalt": "speed", "font.size": 10}):
        figure = draw_ladder(read(PUBLISHED[0]))
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    plt.close(figure)
    changed = []
    pages = {
        PAGE: page(*PUBLISHED, picture=picture.name) + "\n",
        DOCS / "families.md": families_page(FAMILIES),
        DOCS / "faults.md": faults_page(FAULTS),
        DOCS / "memory.md": memory_page(memory.FOLDER / "gpu.json"),
        METHOD: with_scores(METHOD.read_text(encoding="utf-8"), scores.FILE),
    }
    for target, content in (*((name, text.encode()) for name, text in pages.items()), (picture, drawn.getvalue())):
        if not target.is_file() or target.read_bytes() != content:
            with replacing(target, "wb") as file:
                file.write(content)
            changed.append(target)
    return changed


def page(path: Path, other_path: Path | None = None, picture: str | None = None) -> str:
    """The whole page of a file of measurements, with a second host's speed beside it, in Markdown.

    Raises:
        DataError: A file is missing or broken.
    """
    record, other = read(path), read(other_path) if other_path else None
    try:
        prediction = gb10.prediction(record)
    except UserError as error:
        prediction = str(error)
    return template("speed.md.jinja").render(
        record=record,
        other=other,
        project=PROJECT,
        picture=picture,
        kept_speed=KEPT_SPEED,
        spread=spread(record, other) if other else None,
        best=best_table(record),
        ladder=ladder_table(record, other),
        methods=methods_table(record, other),
        evaluation=evaluation_table(record, other),
        starts=starts_table(record, other),
        claims=claims_table(record, other),
        gb10=prediction,
    )


def template(name: str) -> jinja2.Template:
    """A page's text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["table"] = lambda table: markdown(table) if len(table) else "Nothing was measured."
    return environment.get_template(name)


def families_page(path: Path) -> str:
    """The page of what `python -m benchmarks.families` wrote, in Markdown.

    Raises:
        DataError: It was measured on a tree with uncommitted changes.
    """
    content = repeatable(path)
    families = pd.DataFrame(content["families"])
    one, many = (name for name in families if name.startswith("scores_"))
    figures = {name: shown(families[name], "{:.0e}") for name in (one, many, "loss_difference")}
    rows = families["rows"].fillna(families.get("refusal", ""))
    columns = ["family", "`model_type`", "rows", "scores, batch 1", f"scores, batch {many.partition('_')[2]}", "loss"]
    lines = zip(families.family, "`" + families.model_type + "`", rows, *figures.values(), strict=True)
    return template("families.md.jinja").render(
        rows=many.partition("_")[2],
        table=markdown(pd.DataFrame(lines, columns=columns)),
        largest=f"{families[[one, many]].max().max():.1g}",
        padded=families[families["rows"] == "padded"].to_dict("records"),
        environment=content["environment"],
    )


def faults_page(path: Path) -> str:
    """The page of what `python -m benchmarks.faults` wrote, in Markdown.

    Raises:
        DataError: It was measured on a tree with uncommitted changes.
    """
    content = repeatable(path)
    faults = pd.DataFrame(content.pop("faults")).replace({"sentence": {r"^$": "-", r"\|": r"\\|"}}, regex=True)
    table = markdown(faults.rename(columns={"sentence": "the user reads"}))
    return template("faults.md.jinja").render(**content, table=table, total=faults.times.sum())


def memory_page(path: Path) -> str:
    """The page of what `python -m benchmarks.memory gpu` wrote, in Markdown.

    Raises:
        DataError: It was measured on a tree with uncommitted changes.
    """
    content, lines, errors = repeatable(path), [], []
    for case in content["cases"]:
        estimate, peak = sum(case["estimate"]["parts"].values()), case["peak_bytes"]
        changes = [f"{name}={value}" for name, value in case["overrides"].items() if memory.COMMON.get(name) != value]
        name = f"{case['shape']}, {NAMES[case['run']]}"
        figures = [f"{size / 1e9:.1f}" for size in (case["allocated_bytes"], peak, estimate)]
        errors.append(estimate / peak - 1)
        lines.append([name, " ".join(changes), *figures, f"{100 * errors[-1]:+.1f} %"])
    missed = [f"{line[0]} ({line[-1]})" for line, error in zip(lines, errors, strict=True) if not -0.05 <= error <= 0.1]
    columns = ["model, method", "changed", "tensors GB", "peak GB", "estimate GB", "error"]
    return template("memory.md.jinja").render(
        table=markdown(pd.DataFrame(lines, columns=columns)),
        lowest=f"{100 * min(errors):+.1f} %",
        highest=f"{100 * max(errors):+.1f} %",
        misses=f"These miss it: {', '.join(missed)}." if missed else "All are within.",
        context=f"{CONTEXT / 1e9:.2f}",
        later=f"{LATER / 1e9:.3f}",
        unified=f"{machine.UNIFIED_FLOOR / 1e9:.0f}",
        share=f"{machine.FLOOR_SHARE:.0%}".replace("%", " %"),
        largest=f"{machine.LARGEST_FLOOR / 1e9:.0f}",
        environment=content["environment"],
        estimated=content["estimated"],
    )


def with_scores(page: str, path: Path) -> str:
    """A page with what `python -m benchmarks.scores` wrote, in its block `<!-- scores -->`.

    Raises:
        DataError: It was measured on a tree with uncommitted changes.
    """
    content = repeatable(path)
    runs, kinds = content["runs"], ("bf16", "fp32")
    medians = [{kind: median(run["seconds"][kind]) for kind in kinds} for run in runs]
    lines = [
        [
            NAMES[run["run"]],
            *(f"{run['ties'][kind]}" for kind in kinds),
            *(f"{100 * run['accuracy'][kind]:.2f}" for kind in kinds),
            run["changed"],
            *(f"{run['rows'] / seconds[kind]:,.0f}" for kind in kinds),
        ]
        for run, seconds in zip(runs, medians, strict=True)
    ]
    columns = ["", "ties: bf16", "fp32", "accuracy %: bf16", "fp32", "other labels", "articles/s: bf16", "fp32"]
    tuned, base = [run for run in runs if run["run"] != "base"], runs[0]
    shares = {kind: sorted(100 * run["multiples"][kind] / run["rows"] for run in tuned) for kind in kinds}
    text = template("scores.md.jinja").render(
        rows=base["rows"],
        title=base["data"]["title"],
        step=scores.STEP,
        tie=scores.TIE,
        table=markdown(pd.DataFrame(lines, columns=columns)),
        on_grid={kind: f"{of[0]:.1f} to {of[-1]:.1f}" for kind, of in shares.items()},
        # Both sides of each multiple count; a tie has but one.
        by_chance=f"{100 * 2 * scores.TIE / scores.STEP:.1f}",
        base_ties=f"{base['within_two_steps']['fp32'] * scores.TIE / scores.NEAR:.0f}",
        unequal=sum(run["unequal_ties"] for run in runs),
        longer={kind: sum(run["to_longer"][kind] for run in runs) for kind in kinds},
        p_value=f"{min(run['p_value'] for run in runs):.2f}",
        passes=len(base["seconds"]["fp32"]),
        spread=f"{100 * max(max(of) / min(of) - 1 for run in runs for of in run['seconds'].values()):.0f}",
        cost=f"{100 * max(max(of.values()) / min(of.values()) - 1 for of in medians):.0f}",
        peak={kind: f"{max(run['peak_memory_bytes'][kind] for run in runs) / 1e9:.1f}" for kind in kinds},
        environment=content["environment"],
        fingerprint=base["data"]["fingerprint"],
    )
    head, tail = "<!-- scores -->\n", "<!-- /scores -->"
    return page.partition(head)[0] + head + text + "\n" + tail + page.partition(tail)[2]


def repeatable(path: Path) -> dict[str, Any]:
    """A record's content.

    Raises:
        DataError: It was measured on a tree with uncommitted changes.
    """
    content = json.loads(path.read_bytes())
    if content["environment"]["dirty"]:
        raise DataError(path, "was measured on a tree with uncommitted changes: commit, then measure again")
    return content


def best_table(record: SpeedRecord) -> pd.DataFrame:
    """Each method's fastest and low-memory setting, beside the best of TRL + PEFT."""
    lines = []
    for name, keys in (ladder.settings_of_methods() | {"LoRA with TRL + PEFT, tuned": ladder.peers()}).items():
        if best := fastest_and_low_memory(record, keys):
            lines.append([name, *(f"{row[of]:.1f}" for row in best for of in ("articles_per_second", "peak_gib"))])
    return pd.DataFrame(lines, columns=["", "fastest: articles/s", "peak GiB", "low memory: articles/s", "peak GiB"])


def fastest_and_low_memory(record: SpeedRecord, keys: Sequence[str]) -> list[pd.Series]:
    """The row with the most articles/s, and the one with the least memory among those that keep `KEPT_SPEED` of that;
    empty if no row was measured."""
    if not (rows := record.measured(*keys)):
        return []
    fastest = max(rows, key=lambda row: row.articles_per_second)
    quick = [row for row in rows if row.articles_per_second >= KEPT_SPEED * fastest.articles_per_second]
    return [fastest, min(quick, key=lambda row: row.peak_gib)]


def ladder_table(record: SpeedRecord, other: SpeedRecord | None = None) -> pd.DataFrame:
    """Each rung with its factor against the one before it and against the first; then the peers."""
    keys = [*ladder.rungs(), *ladder.peers()]
    speeds = record.rows.articles_per_second.reindex(keys)
    # What was not measured is passed over.
    factors = speeds / speeds.ffill().shift()
    columns = {
        "": names(record, keys),
        **speed_columns(record, other, keys),
        "x the line before": shown(factors.where(factors.index.isin(ladder.rungs())), "{:.2f}"),
        "x the first": shown(speeds / speeds.iloc[0], "{:.2f}"),
        **training_columns(record, keys),
    }
    return pd.DataFrame(columns)


def methods_table(record: SpeedRecord, other: SpeedRecord | None = None) -> pd.DataFrame:
    """Every setting of each method, with its share of the method's best speed."""
    parts = []
    for method, keys in ladder.settings_of_methods().items():
        bold = [row.name for row in fastest_and_low_memory(record, keys)]
        # On the ladder, "+" says that a rung adds to the one above it.
        settings = [name.removeprefix("+ ") for name in names(record, keys)]
        speeds = record.rows.articles_per_second.reindex(keys)
        columns = {
            "method": method,
            "": [f"**{name}**" if key in bold else name for key, name in zip(keys, settings, strict=True)],
            **speed_columns(record, other, keys),
            "of the best": shown(speeds / speeds.max(), "{:.0%}"),
            **training_columns(record, keys),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts)


def evaluation_table(record: SpeedRecord, other: SpeedRecord | None = None) -> pd.DataFrame:
    """Scoring beside its ceiling, and generation."""
    keys = ladder.keys_of("evaluation")
    rows = record.rows.reindex(keys)
    ceiling = scoring_ceiling(rows)
    columns = {
        "": names(record, keys),
        **speed_columns(record, other, keys),
        "ceiling": shown(ceiling, "{:,.0f}"),
        "of the ceiling": shown(rows.articles_per_second / ceiling, "{:.0%}"),
        "peak GiB": shown(rows.peak_gib, "{:.1f}"),
    }
    return pd.DataFrame(columns)


def starts_table(record: SpeedRecord, other: SpeedRecord | None = None) -> pd.DataFrame:
    """Seconds until a training's first step is done, on each engine."""
    keys = list(ladder.STARTS)
    hosts = {"seconds": record} | ({SECOND: other} if other else {})
    seconds = {name: shown(of.rows.seconds_to_first_step.reindex(keys), "{:.1f}") for name, of in hosts.items()}
    return pd.DataFrame({"": names(record, keys)} | seconds)


def claims_table(record: SpeedRecord, other: SpeedRecord | None = None) -> pd.DataFrame:
    """The first experiment's claims beside what was measured."""
    found = claims.findings(record)
    columns = {"the first experiment says": list(found)}
    columns["measured here"], columns["holds?"] = zip(*found.values(), strict=True)
    if other:
        columns[SECOND], columns["holds there?"] = zip(*claims.findings(other).values(), strict=True)
    return pd.DataFrame(columns)


def spread(record: SpeedRecord, other: SpeedRecord) -> dict[str, float]:
    """How much faster a training was on one host than on the other, at most: below 64 articles at once, and from 64."""
    trained = record.rows[record.rows.recipe.notna()]
    ratio = trained.articles_per_second / other.rows.articles_per_second.reindex(trained.index)
    gain = np.maximum(ratio, 1 / ratio) - 1
    is_large = np.array([recipe.per_device_train_batch_size >= 64 for recipe in trained.recipe])
    return {"small": gain[~is_large].max(), "large": gain[is_large].max()}


def names(record: SpeedRecord, keys: Sequence[str]) -> list[str]:
    """What the rows are called in tables; the key of a row that the record lacks."""
    return [record.rows.setting.get(key, f"`{key}`") for key in keys]


def speed_columns(record: SpeedRecord, other: SpeedRecord | None, keys: Sequence[str]) -> dict[str, list[str]]:
    """Articles/s on one or both hosts, or why there are none."""
    columns = {}
    for name, of in ({"articles/s": record} | ({SECOND: other} if other else {})).items():
        rows = of.rows.reindex(keys)
        speeds, failures = shown(rows.articles_per_second, "{:.1f}"), rows.failure.fillna("not measured")
        columns[name] = [failure if speed == "-" else speed for speed, failure in zip(speeds, failures, strict=True)]
    return columns


def training_columns(record: SpeedRecord, keys: Sequence[str]) -> dict[str, list[str]]:
    """The other figures of trainings."""
    rows = record.rows.reindex(keys)
    return {
        "tokens/s": shown(rows.tokens_per_second, "{:,.0f}"),
        "TFLOP/s": shown(rows.tflops, "{:.0f}"),
        "share of peak": shown(rows.share_of_peak, "{:.1%}"),
        "peak GiB": shown(rows.peak_gib, "{:.1f}"),
    }


def shown(values: pd.Series, form: str) -> list[str]:
    """Figures as text; a dash where there is none."""
    return ["-" if pd.isna(value) else form.format(value) for value in values]


def draw_ladder(record: SpeedRecord) -> Figure:
    """Articles a second on each rung of the ladder and of the peers; what failed says so."""
    keys = [key for key in (*ladder.rungs(), *ladder.peers()) if key in record.rows.index]
    # Okabe and Ito's orange; grey is lighter in print too.
    colours = ["#D9D9D9" if key.startswith("trl_") or key in ladder.peers() else "#E69F00" for key in keys]
    settings = [textwrap.fill(name, 44) for name in names(record, keys)]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(keys) + 0.8), layout="constrained")
    bars = axes.barh(
        settings, record.rows.articles_per_second.reindex(keys).fillna(0), color=colours, edgecolor="black"
    )
    axes.bar_label(bars, speed_columns(record, None, keys)["articles/s"], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"articles a second on one {record.gpu}")
    return figure


if __name__ == "__main__":
    sys.exit(main())
