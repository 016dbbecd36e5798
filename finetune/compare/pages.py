"""What the pages in docs/ say about the code itself: every parameter, and every module."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

import pandas as pd

from finetune import paths
from finetune.config.methods import METHODS
from finetune.config.plan import Experiment, meaning
from finetune.config.profiles import PROFILES
from finetune.config.recipes import Recipe
from finetune.wording import NAMES, markdown

# The other folders hold no packages.
# In the order of the imports.
PACKAGES = (
    "data_prep",
    "finetune",
    *(f"finetune/{part}" for part in ("config", "model", "train", "evaluate", "compare")),
    "benchmarks",
)


def parameters() -> str:
    """The profiles, and every parameter with its default, its value in each profile and its meaning, in Markdown."""
    purposes = pd.DataFrame(
        {"profile": [f"`{name}`" for name in PROFILES], "for": [p.purpose for p in PROFILES.values()]}
    )
    trained = {run: method.recipe for run, method in METHODS.items() if method.recipe}
    return "\n".join(
        [
            markdown(purposes),
            "\n## The experiment: model, data, prompt, evaluation\n",
            markdown(_table(Experiment, dict.fromkeys(METHODS, Experiment()))),
            "\n## The recipe: how a model is trained\n",
            markdown(_table(Recipe, trained)),
            "",
        ]
    )


def _table(part: type, defaults: Mapping[str, Any]) -> pd.DataFrame:
    """A line a parameter of a part, from the defaults of each run."""
    lines = []
    for field in fields(part):
        default = {run: getattr(values, field.name) for run, values in defaults.items()}
        line = {"parameter": f"`{field.name}`", "default": _cell(default)}
        for name, profile in PROFILES.items():
            values = {
                run: profile.values_for(METHODS[run].like or run, "sample").get(field.name, value)
                for run, value in default.items()
            }
            line[name] = "" if values == default else _cell(values)
        annotation = part.__pydantic_fields__[field.name].annotation
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        allowed = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        lines.append(line | {"meaning": meaning(field.name).replace("&", "&amp;") + allowed})
    return pd.DataFrame(lines)


def _cell(values: Mapping[str, Any]) -> str:
    """One value, or each with the runs that have it."""
    runs: dict[Any, list[str]] = {}
    for run, value in values.items():
        runs.setdefault(str(value), []).append(NAMES[run])
    shown = {value: "empty" if value == "" else f"`{value}`" for value in runs}
    if len(runs) == 1:
        return next(iter(shown.values()))
    return "; ".join(f"{shown[value]} ({', '.join(names)})" for value, names in runs.items())


def modules() -> str:
    """Every module of the packages with the first sentence of its docstring, in Markdown."""
    lines = []
    for package in PACKAGES:
        folder = paths.PROJECT / package
        files = sorted(folder.glob("*.py"), key=lambda file: (file.name != "__init__.py", file.name))
        for file in files:
            sentence = _first_sentence(file.read_text(encoding="utf-8"))
            lines.append(f"\n**`{package}/`** {sentence}\n" if file == files[0] else f"- `{file.name}`: {sentence}")
    return "\n".join(lines).lstrip() + "\n"


def _first_sentence(code: str) -> str:
    paragraph = " ".join((ast.get_docstring(ast.parse(code)) or "").partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "."
