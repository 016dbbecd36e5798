"""The code that a step's result comes from: what makes `run` compute it again."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from finetune import paths
from finetune.files import BASE, folder_digest
from finetune.model import smollm2

# The modules whose code a step's result comes from, besides data_prep and the notebook. Values from the registries
# (profiles, recipes) are in the settings. Not here: what records, shows or explains. A folder stands for all its
# modules. A test holds these lists against what the modules import.
_MODEL = ("data", "model")
_TRAIN = (
    "callbacks",
    "checks",
    "classifier",
    "graphs",
    "portions",
    "processes",
    "resolve",
    "save",
    "trainer",
    "updates",
    "watched",
)
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


def model_files(model: str) -> Iterator[bytes]:
    """What a result depends on of a model on this machine: its chat template, and the weights of a folder.

    Those of a hub model are left out: each commit there would train again, whatever it changed.
    """
    # Not at the top: a plan needs none of it.
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = smollm2.folder() if model == "embedded" else Path(model)
    cached = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}", "snapshots")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        yield from (path.read_bytes() for path in (folder / name, *sorted(cached.glob(f"*/{name}"))) if path.is_file())
    weights = [path.stat() for path in sorted(folder.glob("*")) if BASE.fullmatch(path.name)]
    if weights:
        yield _digest_once(folder, *((of.st_size, of.st_mtime_ns) for of in weights)).encode()


@functools.cache
def _digest_once(folder: Path, *_: tuple[int, int]) -> str:
    """The digest of a folder's weights, until a size or a time of one changes: every step asks for it."""
    return folder_digest(folder, BASE)


def code(path: Path) -> bytes:
    """What a file says, without the comments and line breaks of Python."""
    content = path.read_bytes()
    return ast.dump(ast.parse(content)).encode() if path.suffix == ".py" else content
