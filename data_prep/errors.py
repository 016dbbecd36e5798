"""Errors that a user can act on: one sentence, no traceback in a notebook."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Something the user can put right; the message says what is wrong, where, and what to do."""

    def _render_traceback_(self) -> list[str]:
        """IPython prints these lines instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class DataError(UserError):
    """A file that does not hold what it should.

    Args:
        path: The file (or folder) at fault.
        reason: What is wrong with it, and what to do.
        line: 1-based line in the file, when the fault has one.
    """

    def __init__(self, path: str | Path, reason: str, line: int | None = None):
        where = f"{path}:{line}" if line is not None else f"{path}"
        super().__init__(f"{where}: {reason}")
