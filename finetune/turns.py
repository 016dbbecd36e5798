"""Turns: what is measured has its device for itself while the suite runs several steps at once (`--jobs`).

A training takes a turn for the time that its clock counts, an evaluation for scoring and generation, a baseline for
fitting and scoring. Importing, reading data, loading a model, saving it and drawing go on beside another's turn: that
is what several at once gain. On a GPU this should cost the one that is measured little; on a CPU it takes cores from
it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from finetune.files import locked

# Set by the suite for each step: a path whose name is the device's, the same for all steps on that device.
VARIABLE = "FINETUNE_TURNS"


def folder() -> Path:
    """Where the devices' locks lie: the same for every suite that a user runs on this machine."""
    folder = Path(tempfile.gettempdir()) / f"finetune-turns-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def alone(is_long: bool = False) -> Iterator[None]:
    """Have the device alone among the steps that share it, waiting for the one that does; nothing without the suite.

    Args:
        is_long: Of those who say so one at a time waits, so that short measurements do not wait for all of them.
    """
    device = os.environ.get(VARIABLE)
    if device is None:
        yield
        return
    waiting = f"Waiting for {Path(device).name}: another step is measured there"
    with locked(Path(f"{device} long"), waiting) if is_long else nullcontext(), locked(Path(device), waiting):
        yield
