"""What README and docs say is so: commands, files, dependencies, figures."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from finetune.__main__ import _parser
from finetune.compare.publish import References, with_results
from finetune.config.recipes import LORA
from finetune.runner import STEPS

PROJECT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(PROJECT)): path.read_text(encoding="utf-8")
    for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
# Read once: 600,000 predictions.
REFERENCES = References()
FINETUNE = ".venv/bin/python -m finetune "
BENCHMARKS = ".venv/bin/python -m benchmarks."
PYTEST = ".venv/bin/python -m pytest "


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands() -> list[str]:
    """The commands in blocks, and those within sentences; not those in generated blocks, which records hold."""
    found = []
    for name, page in PAGES.items():
        lines = [line.partition("  #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
        found += [line for line in lines if line and not line.startswith("#")]
        if name != "docs/speed.md":
            written = re.sub(r"<!-- (\w+)[^/]*? -->\n.*?<!-- /\1 -->", "", page, flags=re.DOTALL)
            spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", written, flags=re.DOTALL))
            found += [span for span in spans if re.match(r"make \w|\./start_docker.sh \w", span)]
            found += [f".venv/bin/{span}" for span in spans if re.match(r"python -m (finetune|benchmarks)\b", span)]
    return sorted(set(found))


COMMANDS = commands()


def starting(head: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(head)]


@pytest.mark.parametrize("command", starting("make "))
def test_make_targets_exist(command):
    done = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", starting(FINETUNE))
def test_commands_parse(command):
    _parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize("command", starting(BENCHMARKS))
def test_benchmarks_and_their_options_exist(command):
    module, *arguments = shlex.split(command)[2:]
    text = (PROJECT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert [option for option in arguments if option.startswith("--") and f'"{option}"' not in text] == []


@pytest.mark.parametrize("command", starting(PYTEST))
def test_tests_that_a_page_names_exist(command):
    _, _, _, folder, _, marker = shlex.split(command)
    assert (PROJECT / folder).exists()
    assert f'"{marker}: ' in (PROJECT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_command_is_of_a_tested_kind():
    kinds = ("make ", FINETUNE, BENCHMARKS, PYTEST, "./start_docker.sh ")
    assert [command for command in COMMANDS if not command.startswith(kinds)] == []
    assert all(starting(kind) for kind in kinds)


def test_start_docker_commands_are_in_its_usage():
    usage = subprocess.run(
        ["./start_docker.sh", "help"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    for command in starting("./start_docker.sh "):
        assert re.search(rf"^\s+{re.escape(command.split()[1])}\b", usage, re.MULTILINE), command


def test_readme_shows_the_container_s_five_commands():
    shown = [line.split()[1] for line in README.splitlines() if line.startswith("./start_docker.sh ")]
    assert shown == ["start", "status", "logs", "stop", "build"]


def test_every_folder_in_the_tree_exists():
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)[1]
    named = [name for line in tree.splitlines() for name in line.split("  ")[0].split()]
    assert named and [name for name in named if not (PROJECT / name).exists()] == []


def test_every_dependency_has_its_reason():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    table = PAGES["docs/development.md"].partition("## Dependencies")[2]
    named = re.findall(r"[\w-]+", " ".join(re.findall(r"^\| ([\w, -]+) \| .* \|$", table, re.MULTILINE)))
    assert [package for package in needed if re.split("[=>]", package)[0] not in named] == []


def test_the_notebooks_table_lists_them_in_their_order():
    table = README.partition("## The notebooks")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| ", table, re.MULTILINE)
    assert listed == list(dict.fromkeys(step.notebook for step in STEPS))


@pytest.mark.parametrize("name", PAGES)
def test_generated_blocks_are_up_to_date(name):
    assert with_results(PAGES[name], REFERENCES) == PAGES[name]


def test_each_block_is_on_its_page():
    found = {name: re.findall(r"^<!-- (\w+)[\w:-]* -->$", page, re.MULTILINE) for name, page in PAGES.items()}
    assert found["README.md"] == ["summary"]
    assert sorted(set(found["docs/results.md"])) == ["ablation", "results"]
    assert found["docs/parameters.md"] == ["parameters"] and found["docs/development.md"] == ["modules"]


def test_the_first_page_s_table_is_small():
    block = README.partition("<!-- summary:")[2].partition("<!-- /summary")[0]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    assert 1 <= len(lines) - 2 <= 7
    assert {line.count("|") - 1 for line in lines} == {5}


def test_the_adapter_in_the_readme_is_ours():
    [code] = blocks(README, "python")
    compile(code, "README.md", "exec")
    recipe = (LORA.r, 2 * LORA.r, LORA.lora_dropout)
    assert "r={}, lora_alpha={}, lora_dropout={},".format(*recipe) in " ".join(code.split())
    assert f"target_modules={LORA.target_modules}".replace("'", '"') in code


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_exist(name):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", PAGES[name])
    assert [target for target in targets if not (PROJECT / name).parent.joinpath(target).exists()] == []


def test_the_promised_time_of_the_demo_is_the_record_s():
    record = json.loads((PROJECT / "results/reference/demo/amd-epyc.json").read_text())
    assert record["seconds"] == pytest.approx(sum(part["seconds"] for part in record["steps"]), abs=0.1)
    minutes, cpu = re.search(
        r"took (\d+) minutes on two cores of an (.+?) without bf16", " ".join(README.split())
    ).groups()
    assert int(minutes) == round(record["seconds"] / 60) and cpu == record["environment"]["hardware"]["cpu"]
    assert (record["dtype"], record["environment"]["hardware"]["cores"]) == ("float32", 2)
