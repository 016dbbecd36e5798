"""Prepare a data set: read, check, clean, split, find duplicates, write the chat examples."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.clean import repaired
from data_prep.duplicates import DuplicateFinder
from data_prep.errors import DataError, UserError
from data_prep.files import (
    DATA_FILES,
    MANIFEST,
    SPLITS,
    Duplicates,
    Example,
    Manifest,
    Message,
    Split,
    file_digest,
    load_manifest,
    replacing,
    write_json,
)
from data_prep.sources import Row, Source
from data_prep.splits import shares

TokenCounter = Callable[[Sequence[list[Message]]], list[int]]

# Token statistics come from this many training rows, spread evenly: enough for the 99th percentile within some
# tokens, where counting all 120,000 rows under two prompts would take as long as everything else.
TOKEN_SAMPLE = 2000

# One more when the same source gives other rows or marks than before: data of an older version is prepared again.
VERSION = 3


def prepare(
    source: Source,
    folder: Path,
    *,
    prompt: str,
    seed: int = 42,
    validation_rows: int = 2000,
    clean: bool = True,
    count_tokens: TokenCounter | None = None,
) -> tuple[Manifest, bool]:
    """Prepare `source` into `folder`, or find that this was done already.

    Args:
        source: Where the rows come from, and whose task they are.
        folder: Receives `{train,validation,test}.jsonl` and `manifest.json`.
        prompt: The name of the task's prompt that the examples are rendered with.
        seed: Chooses the validation rows.
        validation_rows: Rows cut from train, the same share of every class, where the source has no validation split.
        clean: Repair the texts, where the task knows how (see `data_prep.clean`).
        count_tokens: Tokens of each rendered chat; without it the manifest says nothing of tokens.

    Returns:
        The manifest, and whether an existing result was reused.

    Raises:
        DataError: A row or file is wrong, or the folder holds another source's output. Nothing is left half-written.
    """
    task = source.task
    provenance = source.provenance()
    request = {
        "task": task.name,
        "source": provenance,
        "prompt": task.find_prompt(prompt).id,
        "normalised": clean and bool(task.repairs),
        "description": task.digest,
        "seed": seed,
        "version": VERSION,
    }
    existing = _existing(folder, provenance)
    has_validation = "validation" in source.splits()
    # A share is in the task's description.
    cut = None if has_validation or task.splits else validation_rows
    if existing and _answers(existing, request, cut, folder, count_tokens is not None):
        return existing, True

    in_validation = None if has_validation else _validation_mask(source, cut, seed)
    duplicates = DuplicateFinder(row.text for row in _cleaned(source, "test", clean))
    indices = {label: index for index, label in enumerate(task.labels)}
    (folder / MANIFEST).unlink(missing_ok=True)
    counts: dict[Split, Counter] = {split: Counter() for split in SPLITS}
    identities = {split: hashlib.sha256() for split in SPLITS}
    # All three files or none.
    with (
        replacing(folder / "train.jsonl") as train,
        replacing(folder / "validation.jsonl") as validation,
        replacing(folder / "test.jsonl") as test,
    ):
        files = dict(zip(SPLITS, (train, validation, test), strict=True))

        def write(split: Split, origin: str, row: Row, *duplicate: bool) -> None:
            messages = task.messages(prompt, row.text, row.label)
            example = Example(origin, row.text, row.label, messages, *duplicate)
            counts[split][row.label] += 1
            identities[split].update(example.identity())
            files[split].write(example.to_json())

        for number, row in enumerate(_cleaned(source, "train", clean)):
            is_cut = in_validation is not None and in_validation[number]
            if is_cut:
                duplicates.see_validation(row.text)
            else:
                duplicates.see(row.text, indices[row.label])
            write("validation" if is_cut else "train", f"train-{number}", row)
        if in_validation is None:
            for number, row in enumerate(_cleaned(source, "validation", clean)):
                duplicates.see_validation(row.text)
                write("validation", f"validation-{number}", row)
        in_train, only_in_validation = duplicates.in_train, duplicates.in_validation
        for number, row in enumerate(_cleaned(source, "test", clean)):
            write("test", f"test-{number}", row, number in in_train, number in only_in_validation)
        for split in SPLITS:
            # Of the others, a figure is empty; to learn, there must be something to tell apart.
            if len(counts[split]) < (2 if split == "train" else 1):
                there = f"rows of the class {', '.join(counts[split])} alone" if counts[split] else "no row"
                raise DataError(source.place(split), f"{there} for {split}; split otherwise, or add rows")

    digests = {split: identities[split].hexdigest() for split in SPLITS}
    source_rows = sum(counts["train"].values()) if in_validation is None else len(in_validation)
    manifest = Manifest(
        **request,
        fingerprint=hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12],
        rows={split: {label: counts[split][label] for label in task.labels} for split in SPLITS},
        files={split: file_digest(folder / f"{split}.jsonl") for split in SPLITS},
        duplicates=Duplicates(
            test_exact_in_train=len(duplicates.exact),
            test_near_in_train=len(duplicates.near - duplicates.exact),
            train_contradicting=duplicates.contradicting(),
            test_in_validation=len(only_in_validation),
        ),
        recognised=source.recognised(),
        tokens=_token_statistics(source, source_rows, clean, count_tokens) if count_tokens else None,
    )
    write_json(folder / MANIFEST, manifest.model_dump())
    return manifest, False


def _existing(folder: Path, provenance: dict) -> Manifest | None:
    """The manifest that is there already, None if there is none; refuses a folder that holds something else."""
    if (folder / MANIFEST).is_file():
        manifest = load_manifest(folder)
        if manifest.source != provenance:
            raise DataError(
                folder,
                f"already holds the data of another source ({_short(manifest.source)}, not {_short(provenance)}); "
                "delete the folder to prepare it anew",
            )
        return manifest
    if folder.is_dir():
        known = {MANIFEST, *DATA_FILES, ".gitkeep"}
        foreign = sorted(path.name for path in folder.iterdir() if path.name.removesuffix(".partial") not in known)
        if foreign:
            raise DataError(folder, f"holds files that are not prepared data ({', '.join(foreign[:3])})")
    return None


def _short(source: dict) -> str:
    digest = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:8]
    return " ".join(filter(None, [source["kind"], source.get("dataset"), digest]))


def _answers(manifest: Manifest, request: dict, validation_rows: int | None, folder: Path, tokens: bool) -> bool:
    """Whether an existing result is what `request` asks for, its files untouched.

    `validation_rows` is None where the source has a validation split of its own, or the task names a share.
    """
    same = all(getattr(manifest, key) == value for key, value in request.items())
    same_split = validation_rows in (None, manifest.total("validation"))
    whole = all(
        (folder / f"{split}.jsonl").is_file() and file_digest(folder / f"{split}.jsonl") == digest
        for split, digest in manifest.files.items()
    )
    return same and same_split and whole and (manifest.tokens is not None or not tokens)


def _validation_mask(source: Source, validation_rows: int | None, seed: int) -> np.ndarray:
    """Which training rows go to validation, as a mask of shape (rows,); None: the task's share of them."""
    indices = {label: index for index, label in enumerate(source.task.labels)}
    labels = np.fromiter((indices[row.label] for row in source.rows("train")), np.uint16)
    counts = np.bincount(labels, minlength=len(indices))
    if validation_rows is None:
        validation_rows = round(source.task.splits.validation * len(labels))
        # At least one row of a rare class, but the only one is for training.
        most = np.maximum(counts - 1, 0)
        cut = np.clip(shares(counts, validation_rows), np.minimum(most, 1), most)
    elif len(indices) <= validation_rows <= len(labels) // 2:
        cut = shares(counts, validation_rows)
    else:
        raise UserError(
            f"validation_rows={validation_rows} cannot be cut from {len(labels)} training rows; "
            f"choose between {len(indices)} and {len(labels) // 2}"
        )
    rare = [index for index in indices.values() if counts[index] and not 0 < cut[index] < counts[index]]
    if rare and not source.task.splits:
        label, there = source.task.labels[rare[0]], counts[rare[0]]
        enough = [
            rows
            for rows in range(len(indices), len(labels) // 2 + 1)
            if all(0 < share < count for share, count in zip(shares(counts, rows), counts, strict=True))
        ]
        remedy = (
            f"choose validation_rows={min(enough, key=lambda rows: abs(rows - validation_rows))}"
            if enough
            else "add rows of this class"
        )
        raise UserError(
            f"{source.place('train')}: the class {label} has {there} of {len(labels)} rows, of which "
            f"validation_rows={validation_rows} puts {cut[rare[0]]} into validation and leaves "
            f"{there - cut[rare[0]]} for training, and both need one; {remedy}, or give a validation split"
        )
    generator = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for index, count in enumerate(cut):
        mask[generator.choice(np.flatnonzero(labels == index), count, replace=False)] = True
    return mask


def _cleaned(source: Source, split: Split, clean: bool, step: int = 1) -> Iterator[Row]:
    """Every `step`-th row of a split, repaired if that is wanted; the others are not even repaired."""
    repairs = source.task.repairs if clean else ()
    for number, row in enumerate(islice(source.rows(split), 0, None, step)):
        cleaned = Row(tuple(repaired(text, repairs) for text in row.texts), row.label) if repairs else row
        if not cleaned.text:
            raise DataError(f"{source.place(split)}, row {number * step + 1}", "empty text: nothing but markup")
        yield cleaned


def _token_statistics(source: Source, source_rows: int, clean: bool, count_tokens: TokenCounter) -> dict:
    """Tokens per example under every prompt, from at most TOKEN_SAMPLE training rows, spread evenly."""
    task, statistics = source.task, {}
    rows = list(_cleaned(source, "train", clean, step=-(-source_rows // TOKEN_SAMPLE)))
    for name, prompt in task.prompts.items():
        tokens = np.array(count_tokens([task.messages(name, row.text, row.label) for row in rows]))
        median, tail = np.percentile(tokens, [50, 99])
        statistics[prompt.id] = {
            "rows": len(tokens),
            "mean": round(float(tokens.mean()), 1),
            "median": float(median),
            "p99": float(tail),
            "max": int(tokens.max()),
        }
    return statistics
