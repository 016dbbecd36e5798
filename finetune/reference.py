"""Reference results: the committed records that the README's figures come from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd

from data_prep import UserError
from finetune import comparison, errors, paths, records, report
from finetune.comparison import Comparison
from finetune.wording import NAMES

README = paths.PROJECT / "README.md"
FOLDER = paths.PROJECT / "results" / "reference"
BLOCK = re.compile(r"(<!-- results:(?P<profile>\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def publish(profile: str) -> Path:
    """Copy a profile's records, predictions and report to `results/reference`, and renew the README's tables.

    Raises:
        UserError: A record was made from a tree with uncommitted changes: nobody could reproduce it.
    """
    compared = comparison.load(profile)
    for run, record in compared.records.items():
        parts = [part for part in (record.training, record.evaluation) if part]
        if any(part.environment.dirty or part.environment.commit is None for part in parts):
            raise UserError(f"{run} was measured on a tree with uncommitted changes: commit, then run it again")
    target = FOLDER / profile
    _copy(paths.results_folder(profile), target)
    report.write_report(compared, target / "report.html", errors.publishable_articles(compared.any_record.data))
    README.write_text(with_results(README.read_text(encoding="utf-8")), encoding="utf-8")
    return target


def _copy(results: Path, target: Path) -> None:
    """Replace what is published with every record and its predictions, at the same place in the folder."""
    for old in target.rglob(records.RECORD):
        shutil.rmtree(old.parent)
    for record in sorted(results.rglob(records.RECORD)):
        place = target / record.parent.relative_to(results)
        place.mkdir(parents=True, exist_ok=True)
        for name in (records.RECORD, records.PREDICTIONS, records.VALIDATION):
            if (record.parent / name).is_file():
                shutil.copyfile(record.parent / name, place / name)


def with_results(readme: str) -> str:
    """The README with every results block made anew from the reference records."""

    def block(match: re.Match) -> str:
        compared = comparison.load_folder(FOLDER / match["profile"], match["profile"])
        return match[1] + results_text(compared) + match[3]

    return BLOCK.sub(block, readme)


def results_text(compared: Comparison) -> str:
    """Table, answer and provenance of a comparison in Markdown."""
    rows = []
    for run, scoring in compared.scoring.items():
        record = compared.records.get(run)
        training = record.training if record else None
        interval = f"{scoring.accuracy_low:.1%} to {scoring.accuracy_high:.1%}"
        rows.append(
            {
                "": NAMES[run],
                "accuracy (95 % interval)": f"{scoring.accuracy:.1%} ({interval})",
                "macro-F1 (95 % interval)": (
                    f"{scoring.macro_f1:.1%} ({scoring.macro_f1_low:.1%} to {scoring.macro_f1_high:.1%})"
                ),
                "training": f"{training.seconds:.0f} s" if training else "-",
                "real tokens/s": f"{training.tokens_per_second:.0f}" if training else "-",
                "peak memory": f"{training.peak_memory_bytes / 1e9:.1f} GB" if training else "-",
                "trained parameters": f"{training.trainable_parameters:,}" if training else "-",
                "artefact": f"{training.artefact_bytes / 1e6:.0f} MB" if training else "-",
            }
        )
    where = compared.records["base"].evaluation.environment
    hardware = where.hardware["gpu"] or f"{where.hardware['cpu']}, {where.hardware['cores']} cores, no GPU"
    data = compared.any_record.data
    return (
        f"{markdown(pd.DataFrame(rows))}\n\n{compared.answer()}\n\n"
        f"{compared.any_record.model} on {data.title} (fingerprint `{data.fingerprint}`, prompt `{data.prompt}`, "
        f"{data.train_rows:,} training and {data.test_rows:,} test rows); {hardware}; commit "
        f"`{(where.commit or '')[:10]}`; `{where.command}`; records in `results/reference/{compared.profile}/`.\n"
    )


def markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
