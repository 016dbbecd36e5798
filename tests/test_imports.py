"""Which package may import which: the walls of the house, read from the source, imports in functions included."""

import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from sources import imported

PROJECT = Path(__file__).parent.parent
ENGINE = PROJECT / "finetune"
MODULES = sorted(path for package in ("data_prep", "finetune") for path in (PROJECT / package).rglob("*.py"))

# What stands at the top of the engine and everybody may use; these import one another alone.
COMMON = {"files", "machine", "paths", "predictions", "resampling"}
# Each part of the engine, and the parts that it may import besides. What is not here is the command line's.
MAY_IMPORT = {
    "config": COMMON,
    "wording": COMMON | {"config"},
    "metrics": COMMON,
    "records": COMMON | {"metrics"},
    "baseline_records": COMMON | {"config", "metrics", "records"},
    "model": COMMON | {"config"},
    "data": COMMON | {"config", "metrics", "model", "records"},
    "cards": COMMON | {"config", "data", "records"},
    "evaluate": COMMON | {"baseline_records", "cards", "config", "data", "metrics", "model", "records", "wording"},
    "train": COMMON | {"cards", "config", "data", "evaluate", "metrics", "model", "records"},
    "compare": COMMON | {"baseline_records", "config", "metrics", "records", "wording"},
}
# They put the rest together.
ENTRIES = {"__init__", "activity", "__main__", "kernels", "keys", "launch", "new", "notebooks", "progress", "runner"}
WITHOUT_TORCH = [
    "finetune",
    "finetune.records",
    "finetune.baseline_records",
    "finetune.metrics",
    "finetune.resampling",
    "finetune.wording",
    "finetune.__main__",
    "finetune.runner",
    *(f"finetune.compare.{path.stem}" for path in sorted((ENGINE / "compare").glob("[!_]*.py"))),
]


def packages(path: Path) -> set[str]:
    """The top-level packages that a module imports."""
    return {name.partition(".")[0] for name in imported(path)}


def part_of(path: Path) -> str:
    """A module's part of the engine: its folder, or its own name at the top."""
    return path.relative_to(ENGINE).with_suffix("").parts[0]


def parts(path: Path) -> set[str]:
    """The parts of the engine that a module imports, without its own."""
    found = {name.split(".")[1] for name in imported(path) if name.startswith("finetune.")}
    return found - {part_of(path)}


def engine_modules() -> list[Path]:
    return [path for path in MODULES if path.is_relative_to(ENGINE)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_the_engine_does_not_know_its_benchmarks(path):
    assert "benchmarks" not in packages(path)


def test_data_preparation_does_not_know_the_engine():
    assert [path.name for path in MODULES if not path.is_relative_to(ENGINE) and "finetune" in packages(path)] == []


@pytest.mark.parametrize("path", engine_modules(), ids=lambda path: str(path.relative_to(ENGINE)))
def test_imports_follow_the_arrows(path):
    part = part_of(path)
    if part not in ENTRIES:
        assert parts(path) <= (COMMON if part in COMMON else MAY_IMPORT[part])


def test_the_arrows_have_no_circle():
    graph: dict[str, set[str]] = {}
    for path in engine_modules():
        graph.setdefault(part_of(path), set()).update(parts(path))
    graphlib.TopologicalSorter(graph).prepare()


def test_within_a_part_modules_have_no_circle():
    names = {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for path in MODULES}
    graphlib.TopologicalSorter({name: imported(path) & names.keys() for name, path in names.items()}).prepare()


def test_one_module_alone_imports_unsloth():
    found = [path for path in MODULES if "unsloth" in packages(path)]
    assert found == [ENGINE / "model" / "unsloth.py"]


def test_records_comparison_and_command_line_import_no_torch():
    """In a process of their own, one after the other: what any of them imports, through whatever, is seen."""
    script = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, f"{name} imports torch"
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *WITHOUT_TORCH], cwd=PROJECT, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
