"""Where things lie. FINETUNE_HOME moves all outputs, e.g. to a larger disk (or, in tests, to a temporary folder).

A place is a profile's name, with task and model where these are not its own (`finetune.config.profiles.place`).
"""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def home() -> Path:
    return Path(os.environ.get("FINETUNE_HOME") or PROJECT)


def dataset_folder(source: str, place: str) -> Path:
    """Data is the same for all profiles, and other for another task or model."""
    _, plus, belongs_to = place.partition("+")
    return home() / "datasets" / f"{source}{plus}{belongs_to}"


def artefact_folder(place: str, run: str, is_adapter: bool, variant: str = "") -> Path:
    """Full weights go to `checkpoints/`, adapters to `adapters/`."""
    return home() / ("adapters" if is_adapter else "checkpoints") / _joined(place, run, variant)


def state_folder(place: str, run: str, variant: str = "") -> Path:
    """The trainer's checkpoints while a run is under way; removed when its artefact is saved."""
    return home() / "checkpoints" / ".training" / _joined(place, run, variant)


def results_folder(place: str) -> Path:
    return home() / "results" / place


def run_folder(place: str, run: str, variant: str = "") -> Path:
    """A run's folder; those of its variants (seed-43, rows-250) lie in it."""
    return results_folder(place) / run / variant


def _joined(*names: str) -> str:
    return "-".join(filter(None, names))
