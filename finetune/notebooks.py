"""The notebooks as code, so that tests and benchmarks run what users run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nbformat

from finetune import paths

FOLDER = paths.PROJECT / "notebooks"


def cells(name: str) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_cells(name: str, until: str | None = None, edits: Mapping[str, str] | None = None, **given: Any) -> dict:
    """Run a notebook's code cells in this process.

    Args:
        name: The notebook, without ending.
        until: Stop before the first cell that contains this text.
        edits: Replacements in the cells' text, as a reader would edit them; each has to be found.
        given: Values instead of those in the cell tagged `parameters`.

    Returns:
        The names that the cells leave behind.

    Raises:
        ValueError: An edit's text is in no cell.
    """
    parameters, *sources = [cell.source for cell in cells(name)]
    for old, new in (edits or {}).items():
        if not any(old in source for source in sources):
            raise ValueError(f"no cell of {name} contains {old!r}")
        sources = [source.replace(old, new) for source in sources]
    names: dict[str, Any] = {}
    exec(parameters, names)
    names |= given
    for source in sources:
        if until and until in source:
            break
        exec(compile(source, f"{name}.ipynb", "exec"), names)
    return names
