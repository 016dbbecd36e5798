"""Prepare a data set: read, check, normalise, split, count repeats, write the chat examples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.errors import DataError, UserError
from data_prep.prompts import PROMPTS, Prompt
from data_prep.repeats import RepeatCounter
from data_prep.schema import LABELS, SPLITS, Article, Example, Message, Split
from data_prep.sources import Source
from data_prep.store import DATA_FILES, MANIFEST, Manifest, Repeats, file_digest, load_manifest, replacing, write_json
from data_prep.text import normalise

TokenCounter = Callable[[Sequence[list[Message]]], list[int]]

# Token statistics come from this many training rows, spread evenly: enough for the 99th percentile within some
# tokens, where counting all 120,000 rows under two prompts would take as long as everything else.
TOKEN_SAMPLE = 2000


def prepare(
    source: Source,
    folder: Path,
    *,
    prompt: Prompt,
    seed: int = 42,
    validation_rows: int = 2000,
    clean: bool = True,
    count_tokens: TokenCounter | None = None,
) -> tuple[Manifest, bool]:
    """Prepare `source` into `folder`, or find that this was done already.

    Args:
        source: Where the articles come from.
        folder: Receives `{train,validation,test}.jsonl` and `manifest.json`.
        prompt: The prompt that the examples are rendered with.
        seed: Chooses the validation rows.
        validation_rows: Rows cut from train, the same share of every class, where the source has no validation split.
        clean: Normalise the text (see `data_prep.text`).
        count_tokens: Tokens of each rendered chat; without it the manifest says nothing of tokens.

    Returns:
        The manifest, and whether an existing result was reused.

    Raises:
        DataError: A row or file is wrong, or the folder holds another source's output. Nothing is left half-written.
    """
    provenance = source.provenance()
    request = {"source": provenance, "prompt": prompt.id, "normalised": clean, "seed": seed}
    existing = _existing(folder, provenance)
    cut = None if "validation" in source.splits() else validation_rows
    if existing and _answers(existing, request, cut, folder, count_tokens is not None):
        return existing, True

    reader = _Reader(source, clean)
    in_validation = _validation_mask(source, validation_rows, seed)
    repeats = RepeatCounter(reader.articles("test"))
    (folder / MANIFEST).unlink(missing_ok=True)
    rows = _write_splits(reader, folder, prompt, in_validation, repeats)
    source_rows = sum(rows["train"].values()) if in_validation is None else len(in_validation)
    manifest = Manifest(
        **request,
        rows=rows,
        files={split: file_digest(folder / f"{split}.jsonl") for split in SPLITS},
        repeats=_counts(repeats),
        tokens=_token_statistics(reader, source_rows, count_tokens) if count_tokens else None,
    )
    write_json(folder / MANIFEST, manifest.model_dump())
    return manifest, False


class _Reader:
    """The source's articles, normalised if that is wanted."""

    def __init__(self, source: Source, clean: bool):
        self._source = source
        self._clean = clean

    def articles(self, split: Split) -> Iterator[Article]:
        for row, article in enumerate(self._source.articles(split), start=1):
            article = self._cleaned(article)
            if not article.text:
                raise DataError(f"{self._source.name} {split} row {row}", "empty text: nothing but markup")
            yield article

    def every(self, step: int, split: Split) -> list[Article]:
        """Every `step`-th article of a split; the others are not even normalised."""
        return [self._cleaned(article) for article in islice(self._source.articles(split), 0, None, step)]

    def _cleaned(self, article: Article) -> Article:
        if not self._clean:
            return article
        return Article(normalise(article.title), normalise(article.description), article.label)


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


def _answers(manifest: Manifest, request: dict, validation_rows: int | None, folder: Path, tokens: bool) -> bool:
    """Whether an existing result is what `request` asks for, its files untouched.

    `validation_rows` is None for a source that has a validation split of its own.
    """
    same = all(getattr(manifest, key) == value for key, value in request.items())
    same_split = validation_rows in (None, manifest.total("validation"))
    whole = all(
        (folder / f"{split}.jsonl").is_file() and file_digest(folder / f"{split}.jsonl") == digest
        for split, digest in manifest.files.items()
    )
    return same and same_split and whole and (manifest.tokens is not None or not tokens)


def _validation_mask(source: Source, validation_rows: int, seed: int) -> np.ndarray | None:
    """Which training rows go to validation, as a mask of shape (rows,); None if the source has its own split."""
    if "validation" in source.splits():
        return None
    labels = np.fromiter((LABELS.index(article.label) for article in source.articles("train")), np.uint8)
    if not 4 <= validation_rows <= len(labels) // 2:
        raise UserError(
            f"validation_rows={validation_rows} cannot be cut from {len(labels)} training rows; "
            f"choose between 4 and {len(labels) // 2}"
        )
    generator = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    # Cumulative rounding: the classes' shares add up to exactly `validation_rows`.
    ends = np.rint(np.cumsum(np.bincount(labels, minlength=len(LABELS))) * validation_rows / len(labels)).astype(int)
    for index, count in enumerate(np.diff(ends, prepend=0)):
        mask[generator.choice(np.flatnonzero(labels == index), count, replace=False)] = True
    return mask


def _write_splits(
    reader: _Reader, folder: Path, prompt: Prompt, in_validation: np.ndarray | None, repeats: RepeatCounter
) -> dict[Split, dict[str, int]]:
    """Write the three JSONL files, all or none; counts per split and label."""
    counts: dict[Split, Counter] = {split: Counter() for split in SPLITS}
    with (
        replacing(folder / "train.jsonl") as train,
        replacing(folder / "validation.jsonl") as validation,
        replacing(folder / "test.jsonl") as test,
    ):
        files = dict(zip(SPLITS, (train, validation, test), strict=True))

        def write(split: Split, origin: str, article: Article, has_twin: bool = False) -> None:
            counts[split][article.label] += 1
            example = Example(origin, prompt.render(article), has_twin)
            files[split].write(_to_json(example) + "\n")

        for row, article in enumerate(reader.articles("train")):
            cut = in_validation is not None and in_validation[row]
            if not cut:
                repeats.see(article)
            write("validation" if cut else "train", f"train-{row}", article)
        if in_validation is None:
            for row, article in enumerate(reader.articles("validation")):
                write("validation", f"validation-{row}", article)
        for row, article in enumerate(reader.articles("test")):
            write("test", f"test-{row}", article, repeats.twins.has_twin(row))
        _require_all_classes(counts, folder)
    return {split: {label: counts[split][label] for label in LABELS} for split in SPLITS}


def _require_all_classes(counts: dict[Split, Counter], folder: Path) -> None:
    for split, count in counts.items():
        missing = [label for label in LABELS if not count[label]]
        if missing:
            raise DataError(folder, f"the {split} split has no row of the class {missing[0]}; the source is incomplete")


def _counts(repeats: RepeatCounter) -> Repeats:
    twins, contradictions = repeats.twins, repeats.contradictions
    return Repeats(
        test_exact_in_train=len(twins.exact),
        test_near_in_train=len(twins.near - twins.exact),
        train_exact_contradicting=contradictions.exact(),
        train_near_contradicting=contradictions.near(),
    )


def _token_statistics(reader: _Reader, source_rows: int, count_tokens: TokenCounter) -> dict:
    """Tokens per example under every prompt, from at most TOKEN_SAMPLE training rows, spread evenly."""
    articles = reader.every(-(-source_rows // TOKEN_SAMPLE), "train")
    return {
        prompt.id: _summary(np.array(count_tokens([prompt.render(article) for article in articles])))
        for prompt in PROMPTS.values()
    }


def _summary(tokens: np.ndarray) -> dict[str, float]:
    median, tail = np.percentile(tokens, [50, 99])
    return {
        "rows": len(tokens),
        "mean": round(float(tokens.mean()), 1),
        "median": float(median),
        "p99": float(tail),
        "max": int(tokens.max()),
    }


def _short(source: dict) -> str:
    digest = source.get("sha256", {}).get("train.csv", "")[:8]
    return " ".join(filter(None, [source["kind"], source.get("dataset"), digest]))


# Made once: json.dumps with an option makes an encoder for every row.
_encode = json.JSONEncoder(ensure_ascii=False).encode


def _to_json(example: Example) -> str:
    row = {"id": example.id, "messages": example.messages, "has_twin": example.has_twin}
    return _encode(row)
