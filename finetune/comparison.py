"""Compare the runs of a profile: figures against the base, paired tests, and an answer in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep import LABELS, DataError
from finetune import paths, records
from finetune.metrics import CONFIDENCE, mcnemar
from finetune.records import Prediction, RunRecord
from finetune.settings import RUNS

NAMES = {
    "base": "base model",
    "full": "full",
    "full_unsloth": "full (Unsloth)",
    "lora": "LoRA",
    "qlora": "QLoRA",
}
SIGNIFICANT = 0.05
RESAMPLES = 10_000


@dataclass(frozen=True)
class Pair:
    """Two runs on the same rows: the first minus the second, in percentage points, and the exact McNemar test."""

    first: str
    second: str
    points: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float

    @property
    def is_tie(self) -> bool:
        return self.p_value >= SIGNIFICANT

    def __str__(self) -> str:
        first, second = _spoken(self.first), _spoken(self.second)
        p_value = f"exact McNemar p {format_p(self.p_value)}"
        if self.is_tie:
            interval = f"{self.low:+.1f} to {self.high:+.1f}"
            return f"{first} and {second} cannot be told apart: {self.points:+.1f} points ({interval}; {p_value})"
        if self.points > 0:
            return f"{first} beats {second}: {self.points:.1f} points ({self.low:.1f} to {self.high:.1f}; {p_value})"
        return f"{second} beats {first}: {-self.points:.1f} points ({-self.high:.1f} to {-self.low:.1f}; {p_value})"


@dataclass(frozen=True)
class Comparison:
    """The evaluated runs of one profile, in the order base, full, LoRA, QLoRA."""

    profile: str
    records: dict[str, RunRecord]
    predictions: dict[str, list[Prediction]]

    @property
    def any_record(self) -> RunRecord:
        return next(iter(self.records.values()))

    def tuned(self) -> dict[str, RunRecord]:
        return {run: record for run, record in self.records.items() if record.training}

    def pair(self, first: str, second: str) -> Pair:
        right = [_is_right(self.predictions[run]) for run in (first, second)]
        only_first, only_second, p_value = mcnemar(*right)
        low, high = _difference_interval(*right)
        points = 100 * float(np.mean(right[0]) - np.mean(right[1]))
        return Pair(first, second, points, low, high, only_first, only_second, p_value)

    def pairs(self) -> list[Pair]:
        """Every tuned run against the base, then the tuned runs against each other."""
        tuned = list(self.tuned())
        against_base = [(run, "base") for run in tuned if "base" in self.records]
        return [self.pair(*names) for names in [*against_base, *combinations(tuned, 2)]]

    def quality_table(self) -> pd.DataFrame:
        """Accuracy with its interval, macro-F1 and F1 per class in percent; differences to the base in points."""
        base = self.records["base"].evaluation.scoring
        rows = {}
        for run, record in self.records.items():
            scoring = record.evaluation.scoring
            row = {
                "accuracy %": 100 * scoring.accuracy,
                "95 % interval": f"{100 * scoring.accuracy_low:.1f} to {100 * scoring.accuracy_high:.1f}",
                "against base": 100 * (scoring.accuracy - base.accuracy),
                "macro-F1 %": 100 * scoring.macro_f1,
                "macro-F1 against base": 100 * (scoring.macro_f1 - base.macro_f1),
            }
            for label in LABELS:
                row[f"{label} F1 %"] = 100 * scoring.classes[label].f1
                row[f"{label} against base"] = 100 * (scoring.classes[label].f1 - base.classes[label].f1)
            rows[NAMES[run]] = row
        return pd.DataFrame(rows).T.infer_objects()

    def cost_table(self) -> pd.DataFrame:
        """What each training cost, and what its artefact weighs."""
        return pd.concat([cost_table(record) for record in self.tuned().values()]) if self.tuned() else pd.DataFrame()

    def answer(self) -> str:
        """The comparison in one paragraph, true whatever the figures are."""
        tuned = list(self.tuned())
        against = [self.pair(run, "base") for run in tuned]
        among = [self.pair(*names) for names in combinations(tuned, 2)]
        rows = self.any_record.evaluation.scoring.rows
        base = self.records["base"].evaluation.scoring
        sentences = [
            f"On {rows:,} test rows of {self.any_record.data.title}, {self.any_record.model} without tuning gets "
            f"{base.accuracy:.1%} right ({base.accuracy_low:.1%} to {base.accuracy_high:.1%}).",
            *(_as_sentence(pair) for pair in [*against, *among]),
        ]
        if among and all(pair.is_tie for pair in among):
            sentences.append("Between the tuned models, cost decides.")
        if len(tuned) > 1:
            sentences.append(_as_sentence(_costs(self.tuned())))
        return " ".join(sentences)


def cost_table(record: RunRecord) -> pd.DataFrame:
    """What one training cost, as a table of one row."""
    training = record.training
    return pd.DataFrame(
        {
            "training min": training.seconds / 60,
            "articles/s": training.articles_per_second,
            "real tokens/s": training.tokens_per_second,
            "peak memory GB": training.peak_memory_bytes / 1e9,
            "trained parameters": training.trainable_parameters,
            "share of parameters %": 100 * training.trainable_parameters / training.parameters,
            "artefact MB": training.artefact_bytes / 1e6,
            "engine": record.engine,
        },
        index=[NAMES[record.run]],
    )


def load(profile: str) -> Comparison:
    """Read the evaluated runs of a profile.

    Raises:
        DataError: The base was not evaluated; a record or its predictions are broken; the runs saw different data,
            prompts, test rows or models; or a tuned model predicts exactly as the base does.
    """
    return load_folder(paths.results_folder(profile), profile)


def load_folder(folder: Path, profile: str) -> Comparison:
    found = {run: folder / run for run in RUNS if (folder / run / records.RECORD).is_file()}
    read = {run: records.read(path) for run, path in found.items()}
    for run, record in read.items():
        if record.run != run:
            raise DataError(found[run] / records.RECORD, f"is the record of {record.run}; was the folder copied?")
    evaluated = {run: record for run, record in read.items() if record.evaluation}
    if "base" not in evaluated:
        raise DataError(folder, "the base model was not evaluated; run base_model_performance.ipynb first")
    _require_same_question(evaluated, folder)
    predictions = {run: records.read_predictions(record, found[run]) for run, record in evaluated.items()}
    _require_same_rows_and_other_answers(evaluated, predictions, folder)
    return Comparison(profile, evaluated, predictions)


def format_p(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def _spoken(run: str) -> str:
    """A run's name within a sentence."""
    names = {"base": "the base model", "full": "full fine-tuning", "full_unsloth": "full fine-tuning with Unsloth"}
    return names.get(run, NAMES[run])


def _as_sentence(text: object) -> str:
    text = str(text)
    return text[0].upper() + text[1:] + "."


def _costs(tuned: dict[str, RunRecord]) -> str:
    """Who trained fastest and with the least memory, beside those at the other end."""
    by_time = sorted(tuned, key=lambda run: tuned[run].training.seconds)
    by_memory = sorted(tuned, key=lambda run: tuned[run].training.peak_memory_bytes)
    minutes = [f"{tuned[run].training.seconds / 60:.1f} minutes" for run in (by_time[0], by_time[-1])]
    memory = [f"{tuned[run].training.peak_memory_bytes / 1e9:.1f} GB" for run in (by_memory[0], by_memory[-1])]
    return (
        f"{_spoken(by_time[0])} trained fastest ({minutes[0]}; {_spoken(by_time[-1])} {minutes[1]}), and "
        f"{_spoken(by_memory[0])} took the least memory ({memory[0]}; {_spoken(by_memory[-1])} {memory[1]})"
    )


def _require_same_question(evaluated: dict[str, RunRecord], folder: Path) -> None:
    """Figures on other data, another prompt or another model are not comparable: name the difference."""
    base = evaluated["base"]
    for run, record in evaluated.items():
        for what in ("fingerprint", "prompt", "test_rows"):
            mine, theirs = getattr(record.data, what), getattr(base.data, what)
            if mine != theirs:
                raise DataError(
                    folder / run, f"{what} is {mine}, and {theirs} in the base's record: run both on the same data"
                )
        if record.model != base.model:
            raise DataError(folder / run, f"the model is {record.model}, and {base.model} in the base's record")


def _require_same_rows_and_other_answers(
    evaluated: dict[str, RunRecord], predictions: dict[str, list[Prediction]], folder: Path
) -> None:
    """Pairs must be of the same rows; and an adapter that was not applied answers as the base does (vllm#10798)."""
    base_rows = [row.id for row in predictions["base"]]
    for run, record in evaluated.items():
        if [row.id for row in predictions[run]] != base_rows:
            raise DataError(folder / run, "was evaluated on other test rows than the base (another seed draws others)")
        same = [row.probabilities for row in predictions[run]] == [row.probabilities for row in predictions["base"]]
        if record.training and same:
            raise DataError(folder / run, "gives exactly the base model's probabilities: its artefact was not applied")


def _is_right(predictions: Sequence[Prediction]) -> list[bool]:
    return [row.prediction == row.label for row in predictions]


def _difference_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the accuracy difference over the rows, in points."""
    differences = np.array(first, float) - np.array(second, float)
    # Resampled rows with replacement are a multinomial draw of the three values: the same bootstrap, in milliseconds.
    values, counts = np.unique(differences, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(differences), counts / len(differences), size=RESAMPLES)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(100 * draws @ values / len(differences), [tail, 100 - tail])
    return float(low), float(high)
