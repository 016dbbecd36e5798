"""Reference results: the committed records that every figure in README and docs comes from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep import DataError, UserError
from data_prep.files import replacing
from finetune import paths, predictions, records
from finetune.baseline_records import Baseline
from finetune.compare import ablation, comparison, mistakes, pages, report, tables, verdict
from finetune.compare.ablation import Ablation, NoAblation
from finetune.compare.comparison import Comparison, NotComparable
from finetune.wording import markdown

README = paths.PROJECT / "README.md"
DOCS = paths.PROJECT / "docs"
FOLDER = paths.PROJECT / "results" / "reference"


class References:
    """The folders of reference results, each read when it is first asked for."""

    def __init__(self):
        self._read: dict[str, Comparison] = {}

    def __getitem__(self, name: str) -> Comparison:
        """A folder's records.

        Raises:
            DataError: There is no such folder, or its records are broken.
        """
        if name not in self._read:
            if not (FOLDER / name).is_dir():
                raise DataError(FOLDER / name, "no such folder of reference results; publish it, or correct the name")
            self._read[name] = comparison.load_folder(FOLDER / name, name)
        return self._read[name]

    def beside(self, name: str) -> tuple[list[Ablation], dict[str, str]]:
        """Ablations of the folders that are called as this one with a suffix, and why the others of these are none.

        One whose name begins with a longer name's (`gpu-answer-all`, where there is `gpu-answer`) belongs to that.
        """
        found, refused, names = [], {}, published()
        for sibling in names:
            parents = [folder for folder in names if sibling.startswith(f"{folder}-")]
            if max(parents, key=len, default=None) == name:
                theirs = self[sibling]
                try:
                    found.append(ablation.between(theirs, self[name]))
                except (NoAblation, NotComparable) as error:
                    refused[sibling] = str(error)
        return found, refused


def published() -> list[str]:
    """The names of the folders of reference results."""
    return sorted(path.parent.name for path in FOLDER.glob("*/base"))


def publish(profile: str, name: str) -> Path:
    """Copy a profile's records and predictions to `results/reference/<name>`; renew README and docs.

    Raises:
        UserError: A record was made from a tree with uncommitted changes: nobody could reproduce it.
    """
    folder = copy(paths.results_folder(profile), name)
    regenerate()
    return folder


def copy(results: Path, name: str) -> Path:
    """Copy the records in a folder of results to `results/reference/<name>`, in place of older ones, and all their
    predictions to one file there.

    Raises:
        UserError: A record was made from a tree with uncommitted changes: nobody could reproduce it.
    """
    compared, target = comparison.load_folder(results, results.name), FOLDER / name
    found = tables.all_records(compared)
    made = {place: [of.environment] if isinstance(of, Baseline) else of.environments for place, of in found.items()}
    merged = {f"{run}/{records.MERGED}": [of.environment] for run, of in compared.merged.items()}
    for place, environments in (made | merged).items():
        if any(part.dirty or part.commit is None for part in environments):
            raise UserError(f"{place} was measured on a tree with uncommitted changes: commit, then run it again")
    for file in (records.RECORD, records.MERGED):
        for old in target.rglob(file):
            old.unlink()
    for place in (*found, *merged):
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results / place, target / place)
    predictions.join({str(Path(place).parent): (results / place).parent for place in found}, target)
    return target


def regenerate() -> list[Path]:
    """Read every reference record, and write the blocks of README and docs anew from them.

    Returns:
        The files whose content changed.

    Raises:
        DataError: A record's figures are not those of its predictions.
        NoAblation: A page names two folders that do not differ in exactly one setting.
    """
    references = References()
    for name in published():
        # Reading checks the figures against the predictions.
        references[name]
    changed = []
    for page in (README, *sorted(DOCS.glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        after = with_results(before, references)
        if after != before:
            with replacing(page) as file:
                file.write(after)
            changed.append(page)
    return changed


def write_report(name: str, **asked: Any) -> Path:
    """Write the report of a folder of reference results, with the ablations beside it; returns its path.

    Article texts are in it only where they may be published. `asked` is what the verdict asks, as in `report.render`.
    """
    references = References()
    compared, (ablations, refused) = references[name], references.beside(name)
    texts = mistakes.publishable_articles(compared.any_record.data)
    path = FOLDER / name / "report.html"
    return report.write_report(compared, path, texts, ablations=ablations, refused=refused, **asked)


def with_results(page: str, references: References | None = None) -> str:
    """A page with every generated block made anew, each to `<!-- /KIND -->`.

    From records: `<!-- summary:NAME -->`, `<!-- results:NAME -->`, `<!-- ablation:NAME:OTHER -->`. From the code:
    `<!-- parameters -->`, `<!-- modules -->`.

    Raises:
        DataError: A block names a folder that is not there.
        NoAblation: An ablation names two folders that do not differ in exactly one setting.
    """
    references = References() if references is None else references
    for kind, written in (("summary", summary_text), ("results", results_text), ("ablation", ablation_text)):

        def block(match: re.Match, written=written) -> str:
            return match["head"] + written(*(references[name] for name in match["names"].split(":"))) + match["tail"]

        pattern = rf"(?P<head><!-- {kind}:(?P<names>[\w:-]+) -->\n).*?(?P<tail><!-- /{kind} -->)"
        page = re.sub(pattern, block, page, flags=re.DOTALL)
    for kind, written in (("parameters", pages.parameters), ("modules", pages.modules)):
        head, tail = f"<!-- {kind} -->\n", f"<!-- /{kind} -->"
        if head in page and tail in page:
            page = page.partition(head)[0] + head + written() + tail + page.partition(tail)[2]
    return page


def summary_text(compared: Comparison) -> str:
    """Verdict and table in Markdown, narrow enough for the first page."""
    table = tables.summary(compared).drop(columns="seeds", errors="ignore")
    accuracy = table.pop("accuracy %") + " (" + table.pop("95 % interval") + ")"
    table.insert(0, "accuracy % (95 % interval)", accuracy)
    return f"**{verdict.decide(compared)}**\n\n{_table(table)}\n"


def results_text(compared: Comparison) -> str:
    """Verdict, tables, notes and provenance of a comparison in Markdown."""
    found, data = verdict.decide(compared), compared.any_record.data
    where = compared.records["base"].evaluation.environment
    first = f", {compared.first_seed}" if compared.over_seeds else ""
    details = [
        (f"Quality in detail{first}", tables.quality(compared)),
        ("Every pair over all seeds", tables.pairs_over_seeds(compared)),
        (f"Every pair{first}", tables.pairs(compared)),
        ("Costs", tables.all_costs(compared)),
    ]
    folded = [
        f"<details><summary>{title}</summary>\n\n{_table(table)}\n\n</details>"
        for title, table in details
        if len(table)
    ]
    source = (
        f"{compared.any_record.model} on {data.title} (fingerprint `{data.fingerprint}`, prompt `{data.prompt}`, "
        f"{data.train_rows:,} training and {data.test_rows:,} test rows); {where.machine}; commit "
        f"`{(where.commit or '')[:10]}`; `{where.command}`; records in `results/reference/{compared.profile}/`."
    )
    notes = "\n".join(f"- {note}" for note in report.notes(compared))
    return "\n\n".join([f"**{found}**", _table(tables.summary(compared)), found.method, notes, *folded, source]) + "\n"


def ablation_text(mine: Comparison, other: Comparison) -> str:
    """Title, tables, notes and provenance of an ablation in Markdown."""
    found = ablation.between(mine, other)
    parts = [f"**{found.title}**", *map(_table, found.tables()), "\n".join(f"- {note}" for note in found.notes())]
    return "\n\n".join([*parts, f"Records in `results/reference/`: {found.provenance()}."]) + "\n"


def _table(table: pd.DataFrame) -> str:
    return markdown(table.rename_axis("").reset_index())
