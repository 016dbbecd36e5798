"""Where things lie. FINETUNE_HOME moves all outputs, e.g. to a larger disk (or, in tests, to a temporary folder)."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def home() -> Path:
    return Path(os.environ.get("FINETUNE_HOME") or PROJECT)


def dataset_folder(source: str) -> Path:
    return home() / "datasets" / source


def artefact_folder(profile: str, run: str, is_adapter: bool, variant: str = "") -> Path:
    """Full weights go to `checkpoints/`, adapters to `adapters/`."""
    return home() / ("adapters" if is_adapter else "checkpoints") / _joined(profile, run, variant)


def state_folder(profile: str, run: str, variant: str = "") -> Path:
    """The trainer's checkpoints while a run is under way; removed when its artefact is saved."""
    return home() / "checkpoints" / ".training" / _joined(profile, run, variant)


def results_folder(profile: str) -> Path:
    return home() / "results" / profile


def run_folder(profile: str, run: str, variant: str = "") -> Path:
    """A run's folder; those of its variants (seed-43, rows-250) lie in it."""
    return results_folder(profile) / run / variant


def _joined(*names: str) -> str:
    return "-".join(filter(None, names))
