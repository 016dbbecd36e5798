"""Which package may import which."""

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
MODULES = sorted(path for package in ("data_prep", "finetune") for path in (PROJECT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_engine_does_not_know_its_benchmarks(path):
    assert "benchmarks" not in imported(path)


def test_data_preparation_does_not_know_the_engine():
    assert [path.name for path in MODULES if path.parent.name == "data_prep" and "finetune" in imported(path)] == []
