"""The files of a prepared data set: `{train,validation,test}.jsonl` and `manifest.json`.

Written beside and renamed, the manifest last: a folder without a manifest is unfinished, and says so.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.errors import DataError, UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Message = dict[str, str]

MANIFEST = "manifest.json"
# Of a class in a split: a figure of fewer rows says little.
FEW = 5
DATA_FILES = tuple(f"{split}.jsonl" for split in SPLITS)

# Made once: json.dumps with an option makes an encoder for every row.
_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Example:
    """A prepared row: its text and label, and the chat of system, user and assistant message made of them.

    `has_duplicate` marks a test row whose text is repeated, exactly or nearly, in the training rows, and
    `in_validation` one that is repeated in the validation rows alone.
    """

    id: str
    text: str
    label: str
    messages: list[Message]
    has_duplicate: bool = False
    in_validation: bool = False

    @property
    def is_repeated(self) -> bool:
        """Whether a training or a validation row repeats it."""
        return self.has_duplicate or self.in_validation

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]

    def to_json(self) -> str:
        """The row's line in its file."""
        return _encode({name: getattr(self, name) for name in self.__slots__}) + "\n"

    def identity(self) -> bytes:
        """What the fingerprint sees of a row. These are the lines of the first version of the files, with its word for
        a duplicate in train: the same data keeps the fingerprint that published records hold."""
        row = {"id": self.id, "messages": self.messages, "has_twin": self.has_duplicate}
        return (_encode(row) + "\n").encode()


class Duplicates(BaseModel):
    """How often texts repeat: see `data_prep.duplicates` for the measures. Near ones are not exact too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    test_exact_in_train: int
    test_near_in_train: int
    train_contradicting: int
    # Exactly or nearly, and not in train too.
    test_in_validation: int = 0

    def __str__(self) -> str:
        return (
            f"{self.test_exact_in_train:,} test rows repeat a training row, {self.test_near_in_train:,} nearly, and "
            f"{self.test_in_validation:,} more a validation row; "
            f"{self.train_contradicting:,} training rows are there again under another label"
        )


class Manifest(BaseModel):
    """What a prepared data set is and where it came from.

    `fingerprint` has 12 hexadecimal digits that change when any row, label or prompt changes. `rows` maps split to
    label to count; `files` maps split to the SHA-256 of its JSONL file; `tokens` maps prompt to statistics of the whole
    example in tokens, or is None where no tokenizer was at hand. `recognised` says how the source is written,
    `version` which version of this package read it, and `description` is the digest of the task's description.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[2] = 2
    task: str
    source: dict[str, Any]
    prompt: str
    normalised: bool
    seed: int
    fingerprint: str
    rows: dict[Split, dict[str, int]]
    files: dict[Split, str]
    duplicates: Duplicates
    tokens: dict[str, Any] | None
    recognised: list[str] = []
    version: int = 1
    description: str = ""

    def total(self, split: Split) -> int:
        return sum(self.rows[split].values())

    @property
    def rare(self) -> list[str]:
        """The classes with fewer than FEW rows in a split, but some."""
        rows = ((split, label, count) for split, of in self.rows.items() for label, count in of.items())
        return [f"{label} ({count} in {split})" for split, label, count in rows if 0 < count < FEW]

    @property
    def missing(self) -> dict[Split, list[str]]:
        """The classes without rows of each split that lacks some."""
        found = {split: [label for label, count in of.items() if not count] for split, of in self.rows.items()}
        return {split: labels for split, labels in found.items() if labels}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DataError(path, "no such file") from error


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk: a power cut loses what is not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What an operating system refuses, and what to do.
REFUSALS = {
    errno.ENOSPC: "no space left on the disk, or no inodes (df -h, df -i); free some and run again",
    errno.EDQUOT: "your quota of the disk is used up (quota -s); free some and run again",
    errno.EROFS: "the file system is read-only; set FINETUNE_HOME to a folder that you can write to",
    errno.EACCES: "you may not write there; set FINETUNE_HOME to a folder of yours",
}
# Python has a number for a full disk, safetensors (Rust) a text. PyTorch's C++ says what it failed to do.
FULL = re.compile("No space left on device|PytorchStreamWriter|inline_container")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence why a file or folder cannot be written, whichever library meets it.

    Raises:
        UserError: The disk or a quota is full, or writing is not allowed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = errno.ENOSPC if FULL.search(str(error)) else getattr(error, "errno", None)
        named = getattr(error, "filename", None)
        blamed = Path(named) if isinstance(named, str) else path
        # A file that may not be read is another matter.
        if number not in REFUSALS or not (blamed.is_relative_to(path.parent) or path.is_relative_to(blamed)):
            raise
        raise UserError(f"{path} cannot be written: {REFUSALS[number]}") from error


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside `path` that takes its place when the block ends well, and vanishes when it does not.
    The content is on the disk before the name is.

    Raises:
        UserError: As `writing`.
    """
    beside = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON in one step."""
    with replacing(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared data set.

    Raises:
        DataError: It is missing or not a manifest of this version.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(path, "no such file; prepare the data first (make data)") from error
    except ValidationError as error:
        raise DataError(path, f"not a manifest of this version ({_first(error)}); delete {folder}") from error


def read_examples(folder: Path, split: Split) -> Iterator[Example]:
    """The examples of a split.

    Raises:
        DataError: The file is missing, cut short, or a row is not an example; or it is not the manifest's file.
    """
    manifest = load_manifest(folder)
    path = folder / f"{split}.jsonl"
    if file_digest(path) != manifest.files[split]:
        # Read it for a better reason than "digest differs": a truncated line has a number.
        for _ in _parsed(path):
            pass
        raise DataError(path, "was changed after it was prepared; delete the folder and prepare it again")
    yield from _parsed(path)


def _parsed(path: Path) -> Iterator[Example]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Example(**json.loads(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                raise DataError(path, f"not UTF-8 ({error.reason}); is the file cut short?", number) from error
            except json.JSONDecodeError as error:
                raise DataError(path, f"not valid JSON ({error.msg}); is the file cut short?", number) from error
            except TypeError as error:
                raise DataError(path, f"not an example with {', '.join(Example.__slots__)}", number) from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
