"""Reference results: the committed records that the README's figures come from."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path

import pandas as pd

from data_prep import DataError, UserError
from data_prep.store import replacing
from finetune import paths, records, speed
from finetune.compare import ablation as contrasts
from finetune.compare import captions, comparison, report
from finetune.compare import mistakes as errors
from finetune.compare import tables as costs
from finetune.compare.ablation import Contrast, NoContrast
from finetune.compare.comparison import Comparison
from finetune.metrics import Metrics
from finetune.wording import NAMES, markdown

README = paths.PROJECT / "README.md"
FOLDER = paths.PROJECT / "results" / "reference"
RESULTS = re.compile(r"(?P<head><!-- results:(?P<name>[\w-]+) -->\n).*?(?P<tail><!-- /results -->)", re.DOTALL)
CONTRAST = re.compile(
    r"(?P<head><!-- contrast:(?P<name>[\w-]+):(?P<other>[\w-]+) -->\n).*?(?P<tail><!-- /contrast -->)", re.DOTALL
)
# The sample's predictions stay readable; those of 7,600 rows would weigh 1.7 MB a run.
PACKED_FROM = 256 * 1024


class References:
    """The folders of reference results, each read when it is first asked for, and their contrasts."""

    def __init__(self):
        self._read: dict[str, Comparison] = {}
        self._contrasts: dict[tuple[str, str], Contrast] = {}

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

    def contrast(self, name: str, other: str) -> Contrast:
        """One folder against another.

        Raises:
            NoContrast: They do not differ in exactly one thing.
        """
        if (name, other) not in self._contrasts:
            self._contrasts[name, other] = contrasts.between(self[name], self[other])
        return self._contrasts[name, other]

    def beside(self, name: str) -> tuple[list[Contrast], dict[str, str]]:
        """Contrasts of the folders that are called as this one with a suffix, and why the others of these are none.

        One whose name begins with a longer name's (`gpu-answer-all`, where there is `gpu-answer`) belongs to that.
        """
        found, refused = [], {}
        for sibling in (folder for folder in published() if _parent(folder) == name):
            try:
                found.append(self.contrast(sibling, name))
            except NoContrast as error:
                refused[sibling] = str(error)
        return found, refused


def _parent(name: str) -> str | None:
    """The published folder whose name is the longest that this one's begins with."""
    beginnings = [folder for folder in published() if name.startswith(f"{folder}-")]
    return max(beginnings, key=len, default=None)


def published() -> list[str]:
    """The names of the folders of reference results."""
    return sorted(path.parent.name for path in FOLDER.glob("*/base"))


def publish(profile: str, name: str) -> Path:
    """Copy a profile's records and predictions to `results/reference/<name>`; renew reports and the README's tables.

    Raises:
        UserError: A record was made from a tree with uncommitted changes: nobody could reproduce it.
    """
    folder = copy(paths.results_folder(profile), name)
    regenerate()
    return folder


def copy(results: Path, name: str) -> Path:
    """Copy the records and predictions in a folder of results to `results/reference/<name>`.

    Raises:
        UserError: A record was made from a tree with uncommitted changes: nobody could reproduce it.
    """
    compared = comparison.load_folder(results, results.name)
    sources = report.provenance(compared)
    merged = [(f"{run}/{records.MERGED}", [of.environment]) for run, of in compared.merged.items()]
    for name_of_record, environments in [(source.record, source.environments) for source in sources] + merged:
        if any(part.dirty or part.commit is None for part in environments):
            raise UserError(
                f"{name_of_record} was measured on a tree with uncommitted changes: commit, then run it again"
            )
    _copy(results, [Path(source.record) for source in sources], FOLDER / name)
    for file, _ in merged:
        shutil.copyfile(results / file, FOLDER / name / file)
    return FOLDER / name


def regenerate() -> list[Path]:
    """Write every reference report and the README's tables anew from the committed records.

    Returns:
        The files whose content changed.

    Raises:
        DataError: A record's figures are not those of its predictions.
        NoContrast: The README declares a contrast of two folders that do not differ in exactly one thing.
    """
    references = References()
    changed = []
    for name in published():
        page = FOLDER / name / "report.html"
        old = page.read_bytes() if page.is_file() else b""
        write_report(name, references)
        if page.read_bytes() != old:
            changed.append(page)
    changed += speed.draw_ladders(FOLDER / "throughput")
    before = README.read_text(encoding="utf-8")
    after = with_results(before, references)
    if after != before:
        with replacing(README) as file:
            file.write(after)
        changed.append(README)
    return changed


def write_report(name: str, references: References) -> Path:
    """Write the report of a folder of reference results, with the contrasts beside it; returns its path."""
    path = FOLDER / name / "report.html"
    with replacing(path) as file:
        file.write(render(name, references))
    return path


def render(name: str, references: References) -> str:
    """That report as HTML. Article texts are in it only where they may be published."""
    compared = references[name]
    texts = errors.publishable_articles(compared.any_record.data)
    return report.render(compared, texts, *references.beside(name))


def _copy(results: Path, found: list[Path], target: Path) -> None:
    """Replace what is published with these records and their predictions, at the same places in the folder."""
    for name in (records.RECORD, records.PREDICTIONS, records.VALIDATION, records.MERGED):
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


def with_results(readme: str, references: References | None = None) -> str:
    """The README with every block of results and every contrast made anew from the reference records.

    Raises:
        NoContrast: A contrast is declared of two folders that do not differ in exactly one thing.
    """
    references = References() if references is None else references

    def results(match: re.Match) -> str:
        return match["head"] + results_text(references[match["name"]]) + match["tail"]

    def contrast(match: re.Match) -> str:
        return match["head"] + contrast_text(references.contrast(match["name"], match["other"])) + match["tail"]

    return speed.with_blocks(CONTRAST.sub(contrast, RESULTS.sub(results, readme)), FOLDER / "throughput")


def results_text(compared: Comparison) -> str:
    """Table, answer and provenance of a comparison in Markdown."""
    rows, of_first = [], f", {compared.first_seed}" if compared.over_seeds else ""
    for run, scoring in compared.scoring.items():
        rows.append(
            {
                "": NAMES[run],
                f"accuracy{of_first} (95 % interval)": _share(scoring, "accuracy"),
                **_mean_over_seeds(compared, run),
                f"macro-F1{of_first} (95 % interval)": _share(scoring, "macro_f1"),
                **_costs(compared, run),
            }
        )
    where = compared.records["base"].evaluation.environment
    data = compared.any_record.data
    return (
        f"{markdown(pd.DataFrame(rows))}\n\n{compared.answer()}\n\n{_reading(compared)}\n\n"
        f"{compared.any_record.model} on {data.title} (fingerprint `{data.fingerprint}`, prompt `{data.prompt}`, "
        f"{data.train_rows:,} training and {data.test_rows:,} test rows); {where.machine}; commit "
        f"`{(where.commit or '')[:10]}`; `{where.command}`; records in `results/reference/{compared.profile}/`.\n"
    )


def _reading(compared: Comparison) -> str:
    """How the figures are to be read."""
    found = (captions.share_of_ag_news(compared), captions.forced(compared), captions.trained_beside(compared))
    return " ".join(filter(None, found))


def _mean_over_seeds(compared: Comparison, run: str) -> dict[str, str]:
    """A column more where any run was trained with several seeds."""
    if not compared.over_seeds:
        return {}
    of = compared.over_seeds.get(run)
    cell = f"{_with_interval(of.mean, of.low, of.high)}, {len(of.accuracies)} seeds" if of else "-"
    return {"mean over seeds (95 % interval)": cell}


def _costs(compared: Comparison, run: str) -> dict[str, str]:
    """What a run's training cost, medians over its seeds; dashes for what was not trained."""
    columns = ("training", "real tokens/s", "peak memory", "trained parameters", "artefact")
    if run not in compared.tuned():
        return dict.fromkeys(columns, "-")
    trainings = compared.trainings(run)
    cells = (
        costs.time_with_range(trainings),
        f"{costs.middle(trainings, 'tokens_per_second'):,.0f}",
        f"{costs.middle(trainings, 'peak_memory_bytes') / 1e9:.1f} GB",
        f"{trainings[0].trainable_parameters:,}",
        f"{trainings[0].artefact_bytes / 1e6:.0f} MB",
    )
    return dict(zip(columns, cells, strict=True))


def _share(scoring: Metrics, what: str) -> str:
    return _with_interval(*(getattr(scoring, f"{what}{end}") for end in ("", "_low", "_high")))


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def contrast_text(contrast: Contrast) -> str:
    """Title, table, answer and provenance of a contrast in Markdown."""
    table = contrast.table().T.rename_axis("").reset_index()
    return (
        f"**{contrast.title}**\n\n{markdown(table)}\n\n{contrast.answer()}\n\n"
        f"`{contrast.change.name}`: {contrast.meaning} Records in `results/reference/`: {contrast.provenance()}.\n"
    )
