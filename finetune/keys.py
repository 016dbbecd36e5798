"""The code that a step's result comes from: what makes `run` compute it again."""

from __future__ import annotations

import ast
from pathlib import Path

from finetune import paths

# The modules whose code a step's result comes from, besides data_prep and the notebook. Values from the registries
# (profiles, recipes) are in the settings. Not here: what records, shows or explains. A folder stands for all its
# modules. A test holds these lists against what the modules import.
_MODEL = ("data", "model")
_TRAIN = ("callbacks", "checks", "graphs", "resolve", "save", "trainer", "updates")
COMPUTES: dict[str, tuple[str, ...]] = {
    "train": (*_MODEL, *(f"train/{name}" for name in _TRAIN), "evaluate/score"),
    "evaluate": (
        *_MODEL,
        "evaluate/baselines",
        "evaluate/find",
        "evaluate/run",
        "evaluate/score",
        "metrics",
        "resampling",
    ),
    "compare": ("compare", "config/methods", "metrics", "resampling", "wording"),
}


def sources(kind: str) -> list[Path]:
    """The files whose code computes a step of this kind."""
    prepared, engine = paths.PROJECT / "data_prep", paths.PROJECT / "finetune"
    found = [path for pattern in ("*.py", "*.csv") for path in sorted(prepared.rglob(pattern))]
    for name in COMPUTES[kind]:
        found += sorted((engine / name).rglob("*.py")) or [engine / f"{name}.py"]
    return found + (sorted(engine.rglob("*.html")) if kind == "compare" else [])


def code(path: Path) -> bytes:
    """What a file says, without the comments and line breaks of Python."""
    content = path.read_bytes()
    return ast.dump(ast.parse(content)).encode() if path.suffix == ".py" else content
