"""The committed notebooks keep the house's rules."""

import ast
from itertools import combinations
from pathlib import Path

import nbformat
import pytest

from finetune.runner import STEPS

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
NAMES = {
    "base_model_performance",
    "fine_tuning_full",
    "fine_tuning_full_unsloth",
    "fine_tuning_lora",
    "fine_tuning_qlora",
    "full_finetuning_performance",
    "lora_finetuning_performance",
    "qlora_finetuning_performance",
    "compare_methods",
}


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def code_lines(path: Path) -> list[str]:
    return [line for cell in code_cells(path) for line in cell.source.splitlines() if line.strip()]


def test_these_are_the_notebooks_and_the_suite_runs_them_all():
    assert {path.stem for path in NOTEBOOKS} == NAMES == {step.notebook for step in STEPS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean_small_and_has_one_parameters_cell(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(path)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert [("parameters" in cell.metadata.get("tags", [])) for cell in cells].count(True) == 1
    assert "parameters" in cells[0].metadata.tags
    assert len(notebook.cells) <= 30 and len(code_lines(path)) <= 150
    tree = ast.parse("\n".join(line for line in code_lines(path)))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")


def test_the_training_notebooks_differ_in_their_recipe_alone():
    training = [path for path in NOTEBOOKS if path.stem.startswith("fine_tuning")]
    for first, second in combinations(training, 2):
        differing = set(code_lines(first)) ^ set(code_lines(second))
        assert all("plan_training(" in line or "difference" in line for line in differing), differing
