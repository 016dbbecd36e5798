"""Folders that appear whole or not at all, and what one process at a time may do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from data_prep import UserError
from data_prep.files import file_digest, sync, writing

# What network file systems without locks answer; where flock itself is missing, filelock does the same.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well, and vanishes when it does not. Its
    files are on the disk before it has its name."""
    beside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    with writing(target):
        beside.mkdir(parents=True)
        try:
            yield beside
            sync_folder(beside)
            retired = target.with_name(f".{target.name}.old")
            shutil.rmtree(retired, ignore_errors=True)
            if target.exists():
                target.rename(retired)
            beside.rename(target)
            sync(target.parent)
            shutil.rmtree(retired, ignore_errors=True)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def locked(target: Path, waiting: str) -> Iterator[None]:
    """Have `target` to oneself, among all who ask so for it: one process at a time.

    Args:
        target: A file or folder, which need not exist. The lock is a file beside it, and stays there; the operating
            system frees the lock of a process that dies.
        waiting: Printed if another process has it, before waiting for that one.
    """
    lock, is_ours = _try_to_lock(target)
    if not is_ours:
        print(waiting, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _try_to_lock(target: Path) -> tuple[BaseFileLock, bool]:
    """The lock beside a file or folder, and whether this process has it now.

    Raises:
        UserError: It cannot be written.
    """
    path = target.with_name(f".{target.name}.lock")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock: BaseFileLock = FileLock(path)
        try:
            try:
                lock.acquire(blocking=False)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(f"{path.parent} has no file locks: a file stands for each, and remains if the machine stops")
                lock = SoftFileLock(path.with_suffix(".soft.lock"))
                lock.acquire(blocking=False)
        except Timeout:
            return lock, False
    return lock, True


# The folders of this process: a lock that nobody holds on to is freed.
_owned: dict[Path, BaseFileLock] = {}


def own(folder: Path) -> None:
    """Have a folder to this process until it calls `disown` or ends. A second call changes nothing.

    Raises:
        UserError: Another process has it.
    """
    if folder in _owned:
        return
    lock, is_ours = _try_to_lock(folder)
    owner = folder.with_name(f".{folder.name}.owner")
    if not is_ours:
        # Written after the lock is taken.
        who = owner.read_text() if owner.is_file() else "another process"
        raise UserError(f"{who} trains in {folder} already: wait until it has saved its model, or end it")
    _owned[folder] = lock
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")


def disown(folder: Path) -> None:
    """Let other processes have a folder."""
    if folder in _owned:
        _owned.pop(folder).release()


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync_folder(folder: Path) -> None:
    """Wait until a folder with all that is in it is on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


# The files of an artefact: all but README.md and hidden ones.
ARTEFACT = re.compile(r"(?!README\.md$)(?!(.*/)?\.).+")
# Those of a base model that its outputs come from. An adapter brings its own tokenizer.
BASE = re.compile(r"config\.json|[^/.][^/]*\.(safetensors|bin)")


# With what its prompts and tokens come from.
MODEL = re.compile(rf"{BASE.pattern}|[^/]*token[^/]*\.json|(vocab|merges)\.\w+|chat_template\.jinja")


def file_digests(folder: Path, names: re.Pattern = re.compile(".+")) -> dict[str, str]:
    """The SHA-256 of every file in a folder whose path within is one of `names`, by this path."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: file_digest(found[name]) for name in sorted(found) if names.fullmatch(name)}


def folder_digest(folder: Path, names: re.Pattern = ARTEFACT) -> str:
    """12 hexadecimal digits that change with the name or content of any of these files.

    `start_docker.sh` forms the same digits of an artefact with `sha256sum`.
    """
    lines = [f"{digest}  {name}\n" for name, digest in file_digests(folder, names).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def short_digest(values: Any) -> str:
    """12 hexadecimal digits that change when anything in `values` does."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]
