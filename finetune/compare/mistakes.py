"""The rows that models get wrong, with their texts, and those among them whose label is to be doubted."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_self_confidence_for_each_label

from data_prep import find_task, known_tasks, prepare, read_examples
from data_prep.files import MANIFEST, load_manifest
from data_prep.sources import sample
from finetune import paths
from finetune.compare.calibration import arrays
from finetune.records import DataReference, RunRecord

if TYPE_CHECKING:
    from finetune.compare.comparison import Comparison


@dataclass(frozen=True)
class Mistake:
    """A test row that at least one of the judged runs gets wrong.

    Attributes:
        wrong: Per run that is wrong: the label that it gave, and how sure it was.
        by_all: Whether every judged run is wrong.
        is_suspect: Whether the label itself is to be doubted.
        text: The article, None where it is not at hand or not ours to publish.
    """

    id: str
    label: str
    wrong: dict[str, tuple[str, float]]
    by_all: bool
    is_suspect: bool
    text: str | None

    @property
    def confidence(self) -> float:
        """Of the run that was surest of its wrong answer."""
        return max(confidence for _, confidence in self.wrong.values())


def judged(comparison: Comparison) -> list[str]:
    """The runs whose errors are listed: the tuned ones, or the base where there is no other."""
    return list(comparison.tuned()) or ["base"]


def mistakes(comparison: Comparison, articles: Mapping[str, str]) -> list[Mistake]:
    """Every row that a judged run gets wrong, the surest errors first.

    Args:
        comparison: The runs.
        articles: Texts of the test rows by id; may be empty.
    """
    runs = judged(comparison)
    doubted = set(suspects(comparison))
    found = []
    for row, answers in enumerate(zip(*(comparison.predictions[run] for run in runs), strict=True)):
        wrong = {
            run: (answer.prediction, answer.probabilities[answer.prediction])
            for run, answer in zip(runs, answers, strict=True)
            if answer.prediction != answer.label
        }
        if wrong:
            first = answers[0]
            everyone = len(wrong) == len(runs)
            found.append(Mistake(first.id, first.label, wrong, everyone, row in doubted, articles.get(first.id)))
    return sorted(found, key=lambda mistake: -mistake.confidence)


def suspects(comparison: Comparison) -> list[int]:
    """Test rows whose label is to be doubted, the least credible first, as indices.

    Confident learning (Northcutt, Jiang and Chuang 2021): a row is an issue for a run that gives another class at
    least the confidence that it has, on average, in rows of that class. We suspect a row if every judged run says so,
    with the same other class. All may be wrong, and the label right.
    """
    predictions = [comparison.predictions[run] for run in judged(comparison)]
    codes = np.array([comparison.classes.index(label) for label in comparison.labels])
    if len(np.unique(codes)) < len(comparison.classes):
        # The thresholds are averages over each class's rows.
        return []
    probabilities = [arrays(rows)[1] for rows in predictions]
    flagged = [find_label_issues(codes, of, filter_by="confident_learning", n_jobs=1) for of in probabilities]
    answers = np.array([of.argmax(axis=1) for of in probabilities])
    agreed = np.all(flagged, axis=0) & (answers == answers[0]).all(axis=0) & (answers[0] != codes)
    credibility = np.mean([get_self_confidence_for_each_label(codes, of) for of in probabilities], axis=0)
    return sorted(np.flatnonzero(agreed).tolist(), key=lambda row: credibility[row])


def articles(record: RunRecord) -> dict[str, str]:
    """Texts of the test rows by id; empty where the prepared data is not at hand, or is not the records' data."""
    data = record.data
    folder = paths.dataset_folder(data.source, record.profile)
    if data.source == "sample":
        return publishable_articles(data)
    if not (folder / MANIFEST).is_file() or load_manifest(folder).fingerprint != data.fingerprint:
        return {}
    return _texts(folder)


def publishable_articles(data: DataReference) -> dict[str, str]:
    """Texts that may be published with the records: a built-in sample's; other texts are not ours to give away."""
    if data.source != "sample" or data.task not in known_tasks():
        return {}
    task = find_task(data.task)
    prompt = next(name for name, prompt in task.prompts.items() if prompt.id == data.prompt)
    with tempfile.TemporaryDirectory() as folder:
        manifest, _ = prepare(sample(task), Path(folder), prompt=prompt)
        return _texts(Path(folder)) if manifest.fingerprint == data.fingerprint else {}


def _texts(folder: Path) -> dict[str, str]:
    return {example.id: example.text for example in read_examples(folder, "test")}
