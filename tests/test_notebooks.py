"""The committed notebooks keep the house's rules."""

import ast
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from data_prep import UserError
from finetune import find_run, paths, plan, plan_training
from finetune.config.methods import METHODS
from finetune.config.recipes import ADAPTER_ONLY, Recipe
from finetune.runner import STEPS

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
NAMES = {
    "base_model_performance",
    "fine_tuning_full",
    "fine_tuning_full_unsloth",
    "fine_tuning_lora",
    "fine_tuning_qlora",
    "fine_tuning_dora",
    "fine_tuning_head",
    "full_finetuning_performance",
    "lora_finetuning_performance",
    "qlora_finetuning_performance",
    "dora_finetuning_performance",
    "head_finetuning_performance",
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


@pytest.mark.parametrize("part", ["fine_tuning", "finetuning_performance"])
def test_notebooks_of_a_kind_differ_in_the_cells_of_their_method_alone(part):
    alike = {
        path.stem: [cell.source for cell in code_cells(path) if "method" not in cell.metadata.get("tags", [])]
        for path in NOTEBOOKS
        if part in path.stem
    }
    # A head's trainer is another one: its cell is its method's.
    trains = [cell for cell in alike.get("fine_tuning_lora", []) if "PackedSFTTrainer" in cell]
    for cells in (cells for name, cells in alike.items() if name != "fine_tuning_head"):
        assert [cell for cell in trains if cell not in cells] == []
        cells[:] = [cell for cell in cells if cell not in trains]
    # The full notebook's parameters name the checkpoint too.
    assert len({tuple(cells[1:]) for cells in alike.values()}) == 1 and len(alike) >= 4


@pytest.mark.parametrize("run", [run for run, method in METHODS.items() if method.recipe])
def test_a_training_notebook_shows_its_method(run):
    code = "\n".join(code_lines(paths.PROJECT / "notebooks" / f"{METHODS[run].notebook}.ipynb"))
    recipe = METHODS[run].recipe
    assert f'plan_training("{run}"' in code and f"load_in_4bit={recipe.load_in_4bit}," in code
    assert ("LoraConfig(" in code) == recipe.adapter
    assert not recipe.adapter or f"use_dora={recipe.use_dora}," in code
    assert not recipe.adapter or f'task_type="{recipe.task_type}",' in code
    shown = set(re.findall(r"(?:recipe|resolved)\.(\w+)", code))
    hidden = {"adapter", "engine", "load_in_4bit", "use_dora", "use_liger_kernel", "offload_embedding"}
    hidden |= {"cudnn_benchmark", "save_steps", "loading", "compute_dtype", "task_type"}
    # What a head's trainer does not know.
    hidden |= {"article_loss", "cuda_graphs", "update_in_backward"} if recipe.task_type == "SEQ_CLS" else set()
    assert shown | hidden | (set() if recipe.adapter else ADAPTER_ONLY) >= {field.name for field in fields(Recipe)}


def test_after_a_failed_plan_no_later_cell_can_use_what_an_earlier_run_left(home, monkeypatch):
    """Jupyter goes on with the cells below the failed one where the kernel is slow to say that it failed."""
    left = {"settings": plan("lora", "cpu"), "PROFILE": "cpu"}
    shell = SimpleNamespace(user_ns=left)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    for begin in (plan, plan_training, find_run):
        left["settings"] = plan("lora", "cpu")
        with pytest.raises(UserError, match="unknown profile"):
            begin("lora", "no-such-profile")
        assert left == {"PROFILE": "cpu"}
