"""Where things lie. FINETUNE_HOME moves all outputs, e.g. to a larger disk (or, in tests, to a temporary folder).

A place is a profile's name, with task and model where these are not its own (`finetune.config.profiles.place`).
"""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from data_prep.task import home

PROJECT = Path(__file__).resolve().parent.parent


def absolute(given: str) -> str:
    """A file or folder that is there, seen from any working folder; a name on the hub as it is."""
    path = os.path.abspath(os.path.expanduser(given))
    return path if os.path.exists(path) else given


def ensure_user() -> None:
    """Where the user has no account on this machine, as in a container, give what libraries ask for: a name, and a home
    for their caches. Without one, Jupyter starts no kernel."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = str(home() / "checkpoints" / ".home")
        print(f"This user has no home, and HOME is not set: caches go to {os.environ['HOME']}", file=sys.stderr)


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
