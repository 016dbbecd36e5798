"""Reference results: the committed records that the README's figures come from."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep import DataError, UserError
from data_prep.store import replacing
from finetune import comparison, errors, paths, records, report, speed
from finetune.comparison import Comparison
from finetune.wording import NAMES, markdown

README = paths.PROJECT / "README.md"
FOLDER = paths.PROJECT / "results" / "reference"
BLOCK = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
# The sample's predictions stay readable; those of 7,600 rows would weigh 1.7 MB a run.
PACKED_FROM = 256 * 1024


def publish(profile: str, name: str) -> Path:
    """Copy a profile's records and predictions to `results/reference/<name>`; renew reports and the README's tables.

    Raises:
        UserError: A record was made from a tree with uncommitted changes: nobody could reproduce it.
    """
    compared = comparison.load(profile)
    for source in report.provenance(compared):
        if any(part.dirty or part.commit is None for part in source.environments):
            raise UserError(
                f"{source.record} was measured on a tree with uncommitted changes: commit, then run it again"
            )
    _copy(paths.results_folder(profile), [Path(source.record) for source in report.provenance(compared)], FOLDER / name)
    regenerate()
    return FOLDER / name


def regenerate() -> list[Path]:
    """Write every reference report and the README's tables anew from the committed records.

    Returns:
        The files whose content changed.

    Raises:
        DataError: A record's figures are not those of its predictions.
    """
    before = README.read_text(encoding="utf-8")
    changed = []
    for folder in sorted(path.parent for path in FOLDER.glob("*/base")):
        compared = comparison.load_folder(folder, folder.name)
        require_own_figures(compared, folder)
        page = folder / "report.html"
        old = page.read_bytes() if page.is_file() else b""
        report.write_report(compared, page, errors.publishable_articles(compared.any_record.data))
        if page.read_bytes() != old:
            changed.append(page)
    changed += speed.draw_ladders(FOLDER / "throughput")
    after = with_results(before)
    if after != before:
        with replacing(README) as file:
            file.write(after)
        changed.append(README)
    return changed


def require_own_figures(compared: Comparison, folder: Path) -> None:
    """Refuse a record whose accuracy, macro-F1 or confusions are not those of its predictions.

    Raises:
        DataError: One is not.
    """
    for name, found in compared.scoring.items():
        beside = compared.baselines.get(name)
        recorded = beside.scoring if beside else compared.records[name].evaluation.scoring
        for what in ("accuracy", "macro_f1", "confusion"):
            # Sums in another order may differ in the last digit.
            if not np.allclose(getattr(recorded, what), getattr(found, what), rtol=0, atol=1e-9):
                raise DataError(
                    folder, f"the record of {name} holds another {what} than its predictions give; publish it again"
                )


def _copy(results: Path, found: list[Path], target: Path) -> None:
    """Replace what is published with these records and their predictions, at the same places in the folder."""
    for name in (records.RECORD, records.PREDICTIONS, records.VALIDATION):
        for old in target.rglob(f"{name}*"):
            old.unlink()
    for record in found:
        place = target / record.parent
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results / record, place / records.RECORD)
        for name in (records.PREDICTIONS, records.VALIDATION):
            source = results / record.parent / name
            if source.is_file():
                _copy_or_pack(source, place / name)


def _copy_or_pack(source: Path, target: Path) -> None:
    content = source.read_bytes()
    if len(content) < PACKED_FROM:
        target.write_bytes(content)
    else:
        # Without the time, which would make another file of the same content.
        target.with_name(target.name + ".gz").write_bytes(gzip.compress(content, mtime=0))


def with_results(readme: str) -> str:
    """The README with every results block made anew from the reference records."""

    def block(match: re.Match) -> str:
        compared = comparison.load_folder(FOLDER / match["name"], match["name"])
        return match[1] + results_text(compared) + match[3]

    return speed.with_blocks(BLOCK.sub(block, readme), FOLDER / "throughput")


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
