"""Folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.store import file_digest


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well, and vanishes when it does not."""
    beside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        retired = target.with_name(f".{target.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        if target.exists():
            target.rename(retired)
        beside.rename(target)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def folder_digest(folder: Path) -> str:
    """12 hexadecimal digits that change when any file's name or content does."""
    digests = [
        (str(path.relative_to(folder)), file_digest(path)) for path in sorted(folder.rglob("*")) if path.is_file()
    ]
    return hashlib.sha256(repr(digests).encode()).hexdigest()[:12]
