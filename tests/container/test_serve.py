"""What `start_docker.sh start serve` asks vLLM for, and what it refuses. A docker that only answers stands in."""

import json
import os
import shutil
import subprocess

import pytest
from container_kit import REPO, USER

from finetune.files import folder_digest

# `up` writes what it was asked to serve.
DOCKER = """#!/bin/sh
case "$*" in
version*) echo 28.5.0 ;;
"compose version"*) echo 2.30.0 ;;
*" up "*) printf %s "$SERVE_ARGS" >"$ASKED" ;;
*"config --images serve") echo vllm ;;
inspect*) exit 1 ;;
esac
"""


@pytest.fixture
def project(workdir):
    """A checkout with a recorded adapter, of rank 3 on a base in the checkout."""
    root = workdir / "serving"
    shutil.rmtree(root, ignore_errors=True)
    for folder in ("bin", "checkpoints/base", "adapters", "results/reference/cpu/lora"):
        (root / folder).mkdir(parents=True)
    for name in ("start_docker.sh", "docker-compose-finetune.yml", "Dockerfile.dgx-spark"):
        shutil.copy(REPO / name, root / name)
    for name, text in {"docker": DOCKER, "ss": "#!/bin/sh\n"}.items():
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
    # The reference results name an artefact of the same name that was trained elsewhere.
    (root / "results/reference/cpu/lora/record.json").write_text('{\n "artefact": "adapters/cpu-lora",\n "run": "x"\n}')
    write_adapter(root)
    write_record(root)
    return root


def write_adapter(root, **changes):
    folder = root / "adapters/cpu-lora"
    folder.mkdir(exist_ok=True)
    config = {"base_model_name_or_path": f"{root}/checkpoints/base", "r": 3, "rank_pattern": {}, "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes, indent=2))
    (folder / "adapter_model.safetensors").write_text("weights")


def write_record(root, **settings):
    folder = root / "results/cpu/lora"
    folder.mkdir(parents=True, exist_ok=True)
    digest = folder_digest(root / "adapters/cpu-lora")
    training = {"artefact": "adapters/cpu-lora", "artefact_digest": digest}
    record = {"run": "lora", "profile": "cpu", "settings": {"load_in_4bit": False} | settings, "training": training}
    (folder / "record.json").write_text(json.dumps(record, indent=2))


def serve(root, *words):
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", f"{USER}:{USER}", root], check=True)
    asked = root / "asked"
    asked.unlink(missing_ok=True)
    done = subprocess.run(
        [root / "start_docker.sh", "start", "serve", *words],
        env={"PATH": f"{root}/bin:{os.environ['PATH']}", "HOME": str(root), "MIN_FREE_GIB": "0", "ASKED": str(asked)},
        capture_output=True,
        text=True,
        user=USER if os.geteuid() == 0 else None,
    )
    return done, asked.read_text() if asked.is_file() else None


@pytest.mark.parametrize("words", [(), ("adapters/cpu-lora/",), ("./adapters/cpu-lora",), ("ROOT/adapters/cpu-lora",)])
def test_an_adapter_is_served_on_its_base_by_the_containers_paths(project, words):
    done, asked = serve(project, *(word.replace("ROOT", str(project)) for word in words))
    assert done.returncode == 0, done.stderr
    assert asked == (
        "/workspace/checkpoints/base --enable-lora --max-lora-rank 8 --lora-modules tuned=/workspace/adapters/cpu-lora"
    )
    assert "Note" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "base", "rank"),
    [
        ({"base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "r": 16}, "Qwen/Qwen2.5-7B-Instruct", 16),
        ({"base_model_name_or_path": "/workspace/checkpoints/base", "r": 65}, "/workspace/checkpoints/base", 128),
        ({"base_model_name_or_path": "checkpoints/base", "r": 512}, "/workspace/checkpoints/base", 512),
        ({"rank_pattern": {"layers.31.q_proj": 20, "v_proj": 4}}, "/workspace/checkpoints/base", 32),
    ],
)
def test_rank_and_base_are_the_adapters(project, changes, base, rank):
    write_adapter(project, **changes)
    write_record(project)
    done, asked = serve(project)
    assert done.returncode == 0, done.stderr
    assert asked.startswith(f"{base} --enable-lora --max-lora-rank {rank} ")


@pytest.mark.parametrize(
    ("changes", "settings", "sentence"),
    [
        ({}, {"load_in_4bit": True}, "adapters/cpu-lora was trained on the base in 4 bits"),
        ({"use_dora": True}, {}, "is a DoRA adapter"),
        (
            {"base_model_name_or_path": "/other/base"},
            {},
            "is /other/base, and the container has no such folder",
        ),
        ({"r": 513}, {}, "has rank 513"),
    ],
)
def test_what_would_be_another_model_is_to_be_merged(project, changes, settings, sentence):
    write_adapter(project, **changes)
    write_record(project, **settings)
    done, asked = serve(project, "adapters/cpu-lora")
    assert (done.returncode, asked) == (26, None)
    assert sentence in done.stderr and "python -m finetune merge lora --profile cpu" in done.stderr


def test_a_classification_head_is_not_served(project):
    write_adapter(project, task_type="SEQ_CLS")
    write_record(project)
    done, asked = serve(project, "adapters/cpu-lora")
    assert (done.returncode, asked) == (26, None)
    assert "Load it by the lines of adapters/cpu-lora/README.md" in done.stderr


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "added.json"])
def test_another_artefact_than_the_recorded_one_is_refused(project, file):
    with (project / "adapters/cpu-lora" / file).open("a") as changed:
        changed.write(" ")
    done, asked = serve(project)
    assert (done.returncode, asked) == (26, None)
    assert "adapters/cpu-lora is not the one that results/cpu/lora/record.json describes" in done.stderr


def test_a_card_may_be_edited_and_a_model_without_a_record_is_served_with_a_note(project):
    (project / "adapters/cpu-lora/README.md").write_text("my notes")
    assert serve(project)[0].returncode == 0
    merged = project / "checkpoints/merged"
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    done, asked = serve(project)
    assert asked == "/workspace/checkpoints/merged --served-model-name tuned"
    assert "no record in results/ describes checkpoints/merged" in done.stdout
