"""How figures are to be read: sentences that the records give, and that stay true whatever the figures are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from data_prep import LABELS, PROMPTS, Article
from data_prep.schema import Message
from data_prep.sources import AG_NEWS_ROWS
from finetune import embedded
from finetune.compare import mistakes as errors
from finetune.compare import tables as costs
from finetune.compare.comparison import Comparison
from finetune.hardware import PACKAGES
from finetune.records import DataReference, Environment
from finetune.wording import extent, listed

# Of a GPU, by their keys in a record's hardware.
DRIVERS = {"CUDA": "cuda", "GPU driver": "driver"}


def train_rows(comparison: Comparison) -> int:
    """Of the trained runs, which all saw as many; of the base's data where none was trained."""
    record = next(iter(comparison.tuned().values()), comparison.any_record)
    return record.data.train_rows


def share_of_ag_news(comparison: Comparison) -> str:
    """How much of AG News was used; empty for the sample, which is none of it."""
    data = comparison.any_record.data
    if data.source == "sample":
        return ""
    used = train_rows(comparison) + data.validation_rows
    every, tests = AG_NEWS_ROWS["train"], AG_NEWS_ROWS["test"]
    return (
        f"Training and validation rows together are {used:,}: {_share(used, every)} of the {every:,} that AG News has "
        f"for training. The test rows are {_share(data.test_rows, tests)} of its {tests:,}."
    )


def _share(part: int, whole: int) -> str:
    return "all" if part == whole else f"{100 * part / whole:.1f} %"


def classes(comparison: Comparison) -> str:
    """Test and validation rows of each class; of the training rows these are not recorded."""
    scored = next(filter(None, comparison.validation.values()), [])
    known = {"test": comparison.labels, "validation": [row.label for row in scored]}
    counted = [f"{_by_class(labels)} {split} rows" for split, labels in known.items() if labels]
    return f"By class there are {listed(counted)}; the classes of the training rows are not recorded."


def _by_class(labels: Sequence[str]) -> str:
    counts = Counter(labels)
    return " / ".join(f"{counts[label]:,} {label}" for label in LABELS)


def origin(comparison: Comparison) -> str:
    """What the embedded model's file makes of a comparison; empty for another model."""
    record = comparison.any_record
    if record.settings.get("model") != "embedded":
        return ""
    text = (
        f"{record.model} was unpacked to bf16 from a 4-bit file (GGUF, {embedded.QUANTISATION}): every method begins "
        "with layers that were rounded to 4 bits once."
    )
    if {"lora", "qlora"} <= comparison.records.keys():
        text += (
            " QLoRA rounds them once more, to NormalFloat: beside LoRA it shows what a second rounding costs, not what "
            "4-bit weights cost."
        )
    return text


def forced(comparison: Comparison) -> str:
    """Under which condition the accuracies hold: the base's, and that of examples in its prompt."""
    sentences = ["A language model's accuracy is by scoring: the answer's beginning is given, and a label must follow."]
    generation = comparison.records["base"].evaluation.generation
    if generation:
        rows = generation.metrics.rows
        valid = round(generation.valid_share * rows)
        sentences.append(f"Free to write, the base model gave a valid answer to {valid:,} of {rows:,} test rows.")
    label, share = comparison.most_frequent("base")
    sentences.append(f"Its most frequent label by scoring is {label}, for {share:.0%} of all.")
    if "few_shot" in comparison.baselines:
        label, share = comparison.most_frequent("few_shot")
        sentences.append(
            f"With examples in its prompt this is {label}, for {share:.0%}; they are one draw: another may do better "
            "or worse."
        )
    return " ".join(sentences)


def trained_beside(comparison: Comparison) -> str:
    """Whether other notebooks ran on the machine meanwhile, as the commands say; empty where none did."""
    most = max(
        (one.environment.jobs for run in comparison.tuned() for one in comparison.trainings(run)),
        default=1,
    )
    if most == 1:
        return ""
    return (
        f"Up to {most} notebooks of one command ran at once and shared the machine's processor (--jobs), perhaps "
        "beside another command's: seconds are upper bounds, and differences of a few seconds are no difference."
    )


def validations(comparison: Comparison) -> str:
    """How fine and how sure the times to an accuracy are."""
    rows, tuned = comparison.any_record.data.validation_rows, comparison.tuned().values()
    times = [sum(point.validation_accuracy is not None for point in of.training.history) for of in tuned]
    standard_errors = [
        f"{100 * math.sqrt(target * (1 - target) / rows):.1f} points at {100 * target:.0f} %"
        for target in (max(costs.TARGETS), min(costs.TARGETS))
    ]
    text = (
        f"Validations in each training: {_span(times)}. They score {rows:,} rows: "
        f"the standard error of an accuracy is {listed(standard_errors)}."
    )
    if "svm" in comparison.baselines and all(of.training.environment.hardware["gpu"] for of in tuned):
        text += " The linear SVM's seconds are a processor's, the others' a GPU's."
    return text


def updates(comparison: Comparison) -> str:
    """What else changes along the learning curve."""
    curve = {run: of for run, of in comparison.curve.items() if of}
    fewest = min(variants[0].record.data.train_rows for variants in curve.values())
    few = [of[0].record.training.steps for of in curve.values() if of[0].record.data.train_rows == fewest]
    many = [comparison.records[run].training.steps for run in curve]
    return (
        f"Fewer rows with as many epochs are fewer updates too: {_span(few)} with {fewest:,} rows, {_span(many)} with "
        f"{train_rows(comparison):,}. Every point is one training with one seed, with the hyper-parameters of all "
        "rows. Intervals are of the test rows alone: other seeds, and other rows to train on, may reorder the points."
    )


def _span(numbers: Sequence[int]) -> str:
    return extent([f"{min(numbers):,}", f"{max(numbers):,}"])


def second_look(comparison: Comparison) -> str:
    """What a judge with no part in choosing the suspected rows says of them; empty without one."""
    if "svm" not in comparison.baselines:
        return ""
    answers, rows = comparison.answers("svm"), errors.suspects(comparison)
    right = sum(answers[row] == comparison.labels[row] for row in rows)
    return (
        "The linear SVM, which learnt from the same training rows and had no part in the choice, gives the label in "
        f"{right:,} of {len(rows):,}."
    )


def prompt(data: DataReference) -> list[Message]:
    """The messages of an article's prompt and answer with placeholders; empty where the code has it no more."""
    article = Article("TITLE", "DESCRIPTION", LABELS[0])
    return next((known.render(article) for known in PROMPTS.values() if known.id == data.prompt), [])


def software(environments: Sequence[Environment]) -> str:
    """Versions of packages, Python, CUDA and the GPU's driver in all records, and what these do not hold."""
    on_gpu = [of for of in environments if of.hardware["gpu"]]
    found = {name: [of.packages.get(name) for of in environments] for name in PACKAGES}
    found["Python"] = [of.hardware.get("python") for of in environments]
    if on_gpu:
        found |= {name: [of.hardware.get(key) for of in on_gpu] for name, key in DRIVERS.items()}
    versions = [f"{name} {' or '.join(sorted({*of} - {None}))}" for name, of in found.items() if any(of)]
    # A package that is known and null was not installed, which is no gap.
    held = {name: [of is not None for of in values] for name, values in found.items()}
    held |= {name: [name in of.packages for of in environments] for name in PACKAGES}
    return f"{', '.join(versions)}.{_gaps(held)}"


def _gaps(held: dict[str, list[bool]]) -> str:
    """What no record holds, and what only some do."""
    nowhere = [name for name, of in held.items() if not any(of)]
    partly = [name for name, of in held.items() if any(of) and not all(of)]
    said = {"Not recorded": nowhere, "Not in all": partly}
    return "".join(f" {words}: {', '.join(names)}." for words, names in said.items() if names)
