"""What a source file says of itself, without being imported."""

import ast
from pathlib import Path


def imported(path: Path) -> set[str]:
    """The modules that a module imports; of `from a import b` both a and a.b, since b may be a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
