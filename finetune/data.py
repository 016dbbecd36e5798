"""The prepared data of an experiment: made when it is not there, read when it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np
import pandas as pd

from data_prep import Example, Manifest, Task, UserError, find_task, prepare, read_examples
from data_prep.duplicates import MANY
from data_prep.files import FEW, SPLITS, Message, Split
from data_prep.rows import some, spelling
from data_prep.sources import open_source
from finetune import metrics, paths
from finetune.config.plan import Experiment
from finetune.files import locked
from finetune.model import encode, load
from finetune.records import DataReference

# Of the test rows, those that one of two methods alone gets right: a tuned model and a linear SVM differ on 7 % of AG
# News' rows, two tuned models on 2 to 3 % (results/reference/gpu).
DISCORDANT = 0.05


class HasExperiment(Protocol):
    """The plan of a run, or a trained model that was found."""

    @property
    def place(self) -> str: ...

    @property
    def experiment(self) -> Experiment: ...


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set; `train`, `validation` and `test` are the rows that the experiment uses of it."""

    folder: Path
    task: Task
    manifest: Manifest
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    @property
    def title(self) -> str:
        """What to call the data: the sample's results are never called the data set's."""
        return self.task.title_of(self.manifest.source)

    @property
    def reference(self) -> DataReference:
        """What a record says of the data."""
        return DataReference(
            source=self.manifest.source["kind"],
            title=self.title,
            fingerprint=self.manifest.fingerprint,
            prompt=self.manifest.prompt,
            train_rows=len(self.train),
            validation_rows=len(self.validation),
            test_rows=len(self.test),
            task=self.task.name,
        )

    @property
    def form(self) -> list[Message]:
        """The prompt with the columns' names for a text."""
        return self.task.form(self.manifest.prompt)[:-1]

    def table(self) -> pd.DataFrame:
        """Rows per split and class: all that were prepared, and those in use."""
        table = pd.DataFrame({split: self.manifest.rows[split] for split in SPLITS}).T
        table["prepared"] = table.sum(axis=1)
        table["in use"] = [len(getattr(self, split)) for split in SPLITS]
        return table


def load_data(settings: HasExperiment) -> PreparedData:
    """Prepare the experiment's data, or reuse what is there, and say which; one process at a time.

    Args:
        settings: A plan, or a trained model: what has an `experiment`.

    Raises:
        UserError: The source is wrong or out of reach, or fewer rows exist than are asked for.
    """
    experiment = settings.experiment
    task = find_task(experiment.task)
    source = open_source(experiment.source, task, experiment.data_path)
    folder = paths.dataset_folder(experiment.source, settings.place)
    count_tokens = partial(encode.count_tokens, load.load_tokenizer(experiment.model))
    with locked(folder, f"Waiting for {folder}: another process prepares it"):
        manifest, reused = prepare(
            source,
            folder,
            prompt=experiment.prompt,
            seed=experiment.data_seed,
            validation_rows=experiment.validation_rows,
            clean=experiment.normalise,
            count_tokens=count_tokens,
        )
    select = partial(_select, folder, seed=experiment.data_seed)
    data = PreparedData(
        folder,
        task,
        manifest,
        train=select("train", experiment.train_rows),
        validation=select("validation", None),
        test=select("test", experiment.test_rows),
    )
    print(f"{'Reused' if reused else 'Prepared'} {folder}: fingerprint {manifest.fingerprint}, {_sizes(manifest)}")
    if manifest.recognised:
        print(f"Recognised: {'; '.join(manifest.recognised)}")
    for sentence in findings(manifest, [*data.train, *data.validation, *data.test], len(data.test)):
        print(sentence)
    return data


def findings(manifest: Manifest, examples: Sequence[Example], test_rows: int) -> Iterator[str]:
    """What to know of prepared rows, in sentences: duplicates, rare classes, odd texts, and what so many test rows can
    show."""
    yield f"Duplicates: {manifest.duplicates}"
    for split, labels in manifest.missing.items():
        after = "; macro-F1 is the mean of the other classes" if split == "test" else ""
        yield f"No {split} row has the class {some(labels)}{after}"
    if manifest.rare:
        yield f"Classes with fewer than {FEW} rows: {some(manifest.rare)}"
    found, rows = manifest.duplicates, manifest.total("test")
    repeated = found.test_exact_in_train + found.test_near_in_train
    if repeated + found.test_in_validation >= MANY * rows:
        yield (
            f"WARNING: {repeated:,} of {rows:,} test rows repeat training rows, exactly or nearly, and "
            f"{found.test_in_validation:,} more validation rows. Accuracy on them shows memory: read the accuracy "
            "without them, or mend the test rows."
        )
    if without_letters := sum(not any(map(str.isalpha, row.text)) for row in examples):
        yield f"Texts without a letter: {without_letters:,} of {len(examples):,}"
    if told := sum(spelling(row.text) == spelling(row.label) for row in examples):
        yield f"WARNING: {told:,} of {len(examples):,} texts are their label and nothing else; is it the right column?"
    if manifest.tokens:
        of = manifest.tokens[manifest.prompt]
        middle, most = f"half have up to {of['median']:.0f}", f"99 % up to {of['p99']:.0f}, the longest {of['max']:,}"
        yield f"Tokens of a training row, prompt and answer: {middle}, {most} (of {of['rows']:,} rows)"
    points, needed = metrics.detectable_difference(test_rows, DISCORDANT), metrics.rows_to_show(1, DISCORDANT)
    shown = f"can show a difference of {points:.1f} points" if points < 100 * DISCORDANT else "can show no difference"
    yield (
        f"{test_rows:,} test rows {shown} between two methods (80 % power, if {DISCORDANT:.0%} of the rows tell them "
        f"apart); one point needs {needed:,}"
    )


def lengths(examples: Sequence[Example]) -> Iterator[str]:
    """How many words the texts have, as a picture in lines of text: each line is twice as long as the one above."""
    words = [len(row.text.split()) for row in examples]
    rows = Counter(count.bit_length() for count in words)
    yield f"Words of a text: median {median(words):.0f}, at most {max(words):,}"
    for bits in range(min(rows), max(rows) + 1):
        bar = "#" * -(-40 * rows[bits] // max(rows.values()))
        yield f"{2 ** (bits - 1):>9,} to {2**bits - 1:<9,}{bar} {rows[bits]:,}"


def evenly(examples: list[Example], rows: int | None, seed: int) -> list[Example]:
    """`rows` examples, drawn at random and evenly from the classes, in their original order; all if None.

    Raises:
        UserError: There are fewer.
    """
    if rows is None or rows == len(examples):
        return examples
    if rows > len(examples):
        raise UserError(f"{rows} rows are asked for, but there are only {len(examples)}; ask for fewer")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(examples))
    # The k-th of its class, in random order: sorting by k draws from the classes in turn.
    seen: Counter[str] = Counter()
    turns = np.empty(len(examples), int)
    for position in order:
        label = examples[position].label
        turns[position] = seen[label]
        seen[label] += 1
    chosen = sorted(order, key=lambda position: turns[position])[:rows]
    return [examples[position] for position in sorted(chosen)]


def _select(folder: Path, split: Split, rows: int | None, seed: int) -> list[Example]:
    return evenly(list(read_examples(folder, split)), rows, seed)


def _sizes(manifest: Manifest) -> str:
    return ", ".join(f"{manifest.total(split):,} {split}" for split in SPLITS)
