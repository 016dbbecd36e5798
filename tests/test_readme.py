"""What the README says is so: commands, files, dependencies, figures."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from finetune.__main__ import _parser
from finetune.compare.publish import FOLDER, with_results
from finetune.runner import STEPS

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.partition("#")[0].strip()
]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_targets_exist(command):
    done = subprocess.run([*command.split(), "--dry-run"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if "-m finetune" in command])
def test_commands_parse(command):
    assert command.startswith(".venv/bin/python -m finetune ")
    _parser().parse_args(command.split()[3:])


def test_every_command_is_of_a_tested_kind():
    kinds = ("make ", ".venv/bin/python -m finetune ", "./start_docker.sh ", "ssh ", "sudo ", "docker exec ")
    assert [command for command in COMMANDS if not command.startswith(kinds)] == []


def test_start_docker_commands_are_in_its_usage():
    usage = subprocess.run(
        ["./start_docker.sh", "help"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    for command in COMMANDS:
        if command.startswith("./start_docker.sh "):
            assert re.search(rf"^\s+{command.split()[1]}\b", usage, re.MULTILINE), command


def test_the_tree_names_every_module_and_no_other():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)[1]
    named = set(re.findall(r"^    ([\w/]+\.py) ", tree, re.MULTILINE))
    packages = (PROJECT / "data_prep", PROJECT / "finetune")
    there = {str(path.relative_to(package)) for package in packages for path in package.rglob("[!_]*.py")}
    assert named == there
    top = [name for line in tree.splitlines() if not line.startswith(" ") for name in line.split("  ")[0].split()]
    assert [name for name in top if not (PROJECT / name).exists()] == []


def test_every_dependency_has_its_reason():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    named = re.findall(r"[\w-]+", " ".join(re.findall(r"^\| ([\w, -]+) \| .* \|$", README, re.MULTILINE)))
    assert [package for package in needed if re.split("[=>]", package)[0] not in named] == []


def test_the_notebooks_table_lists_them_in_their_order():
    listed = re.findall(r"^\| `(\w+)` \| ", README.partition("## Results")[0], re.MULTILINE)
    assert listed == list(dict.fromkeys(step.notebook for step in STEPS))


def test_results_are_those_of_the_reference_records():
    assert FOLDER.is_dir()
    assert with_results(README) == README


def test_local_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert targets and [target for target in targets if not (PROJECT / target).exists()] == []
