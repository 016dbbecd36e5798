"""The Dockerfile's own steps, run in order by a real engine on a base whose pip and git record what they were asked."""

import json
import re

import pytest
from base_image import BASE_VERSIONS
from container_kit import BASE, IMAGE, REPO, USER

DOCKERFILE = (REPO / "Dockerfile.dgx-spark").read_text()


def asked(engine, tag=IMAGE):
    """What pip was asked in the image's last stage, in order."""
    lines = engine.docker("run", "--rm", tag, "cat", "/stand-in/asked.jsonl").stdout.splitlines()
    return [json.loads(line) for line in lines]


def label(engine, name):
    return engine.inspect(f'{{{{index .Config.Labels "{name}"}}}}', IMAGE)


def layers(engine):
    return json.loads(engine.inspect("{{json .RootFS.Layers}}", IMAGE))


@pytest.fixture(scope="module")
def calls(engine, image):
    return asked(engine)


def test_order_of_the_steps(calls):
    words = [" ".join(call["argv"]) for call in calls]
    kinds = ["list" if text.startswith("list") else text.split()[-1].rsplit("/", 1)[-1] for text in words]
    assert kinds == ["list", "install.txt", "gpu.txt", "list", "workspace"]
    assert all("--no-deps" in text and "--no-cache-dir" in text for text in words if text.startswith("install"))
    assert "--no-build-isolation" in words[-1]


def test_the_images_own_torch_is_protected(calls):
    pins = {f"{name}=={BASE_VERSIONS[name]}" for name in ("torch", "torchvision", "triton", "numpy")}
    for call in calls[1:]:
        assert set(call["constraint"].split()) == pins
        assert call["prefix"] == "/opt/venv"
    assert calls[0]["constraint"] is None and calls[0]["prefix"] == "/usr/local"


def test_the_lists_are_the_projects_pins(calls):
    installed = calls[1]["lists"]["/opt/finetune/install.txt"].splitlines()
    listed = (REPO / "requirements/base.txt").read_text().splitlines()
    assert [line for line in listed if line not in installed] == [line for line in listed if line.startswith("numpy==")]
    assert not [line for line in installed if re.match(r"(torch|torchvision|triton|numpy)\b", line)]
    assert calls[2]["lists"]["/opt/finetune/gpu.txt"] == (REPO / "requirements/gpu.txt").read_text()


@pytest.mark.parametrize("name", ["base.txt", "gpu.txt"])
def test_every_line_is_one_pin(name):
    lines = re.findall(r"^[^#\n].*", (REPO / "requirements" / name).read_text(), re.M)
    assert lines and all(
        re.fullmatch(r"[\w.-]+==[\w.]+( ; .+?)?( --hash=sha256:[0-9a-f]{64})*", line) for line in lines
    )


def test_both_lists_never_name_the_same_package():
    texts = [(REPO / "requirements" / name).read_text().lower().replace("_", "-") for name in ("base.txt", "gpu.txt")]
    base, gpu = (set(re.findall(r"^([\w.-]+)==", text, re.M)) for text in texts)
    assert base and gpu and not base & gpu


def test_labels_and_user(engine, image):
    [unsloth] = re.findall(r"^unsloth==(.*)", (REPO / "requirements/gpu.txt").read_text(), re.M)
    assert label(engine, "finetune.unsloth") == unsloth
    assert label(engine, "finetune.host-uid") == str(USER)
    assert label(engine, "org.opencontainers.image.base.name") == BASE
    assert label(engine, "org.opencontainers.image.revision") == "unknown"  # the tests' checkout is no git repository
    user = engine.docker("run", "--rm", IMAGE, "bash", "-c", "id -un; id -u; echo $HOME")
    assert user.stdout.split() == ["trainer", str(USER), "/home/trainer"]
    environment = engine.inspect("{{json .Config.Env}}", IMAGE)
    assert "TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas" in environment and "PYTORCH_CUDA_ALLOC_CONF" not in environment
    command = engine.inspect("{{json .Config.Cmd}} {{json .Config.Healthcheck.Test}}", IMAGE)
    assert "/api" in command and not re.search("allow-root|token=|allow_origin", command)


def test_a_change_of_the_project_rebuilds_only_the_last_layers(script, engine, image, checkout):
    before = layers(engine)
    (checkout / "finetune/__init__.py").write_text("# changed\n")
    again = script("build")
    assert again.returncode == 0, again.stderr
    after = layers(engine)
    assert before[:-2] == after[:-2], "all but the copy of the project and its installation come from the cache"
    assert before[-2] != after[-2]


def test_buildkit_and_the_classic_builder(script, engine, image, kept_image, calls, buildkit):
    """The client of the other tests takes one of the two, for which `image` has the proof; here is the other."""
    kinds = {"1": r"^#\d+ \[", "0": r"^Step \d+/\d+ : "}
    [other] = [setting for setting, kind in kinds.items() if len(re.findall(kind, image, re.M)) <= 25]
    built = script("build", "--no-cache", DOCKER_BUILDKIT=other, PATH=buildkit)
    assert built.returncode == 0, built.stderr
    assert len(re.findall(kinds[other], built.stdout, re.M)) > 25, built.stdout
    assert [call["argv"] for call in asked(engine)] == [call["argv"] for call in calls]
    assert label(engine, "finetune.host-uid") == str(USER)
    refused = script("build", TRITON="sauce", DOCKER_BUILDKIT="1", PATH=buildkit)
    assert refused.returncode == 19 and "TRITON must be 'bundled' or 'source', not 'sauce'" in refused.stderr


def test_switches(script, engine, kept_image):
    built = script("build", TRITON="source", XFORMERS="source")
    assert built.returncode == 0, built.stderr
    wheel = asked(engine)[1]
    compiled = {path.rpartition("/")[2].partition("-")[0]: record for path, record in wheel["wheels"].items()}
    assert compiled.keys() == {"triton", "xformers"}
    assert "c5d671f91d90f40900027382f98b17a3e04045f6" in compiled["triton"]
    git, made = [json.loads(line) for line in compiled["xformers"].splitlines()]
    assert "--branch v0.0.33" in git["git"] and "facebookresearch/xformers" in git["git"]
    assert made["arch"] == "12.1" and made["argv"][:3] == ["wheel", "--no-deps", "--no-build-isolation"]
    # A Triton from source replaces the image's: its pin is gone, and only its.
    pins = [f"{name}=={BASE_VERSIONS[name]}" for name in ("numpy", "torch", "torchvision")]
    assert wheel["constraint"].split() == pins
    refused = script("build", TRITON="sauce")
    assert refused.returncode == 19 and "TRITON must be 'bundled' or 'source', not 'sauce'" in refused.stderr


def test_a_base_whose_torch_changes_fails_the_build(script, engine, kept_image):
    engine.derive("ENV STAND_IN_REPLACES_TORCH=1", tag="nvidia:replaced", base=BASE)
    before = engine.inspect("{{.Id}}", IMAGE)
    built = script("build", BASE_IMAGE="nvidia:replaced")
    assert built.returncode == 19
    assert "The image did not build; no image was tagged" in built.stderr
    assert f"torch=={BASE_VERSIONS['torch']}" in built.stderr and "no longer the base image's own" in built.stderr
    assert engine.inspect("{{.Id}}", IMAGE) == before


def test_a_base_without_nvidias_torch_fails_the_build(script, engine, kept_image):
    change = "sed -i s/nv25.11/cpu/ /usr/local/lib/python3*/site-packages/torch.py"
    engine.derive(f"RUN {change}", tag="nvidia:generic", base=BASE)
    built = script("build", BASE_IMAGE="nvidia:generic")
    assert built.returncode == 19 and "is not a torch of NVIDIA" in built.stderr


def test_a_base_with_an_old_numpy_fails_the_build(script, engine, kept_image):
    rename = "cp -r numpy-2.1.0.dist-info numpy-1.26.4.dist-info && rm -r numpy-2.1.0.dist-info"
    change = f"{rename} && sed -i s/2.1.0/1.26.4/ numpy-*/METADATA"
    engine.derive(f"RUN cd /usr/local/lib/python3*/site-packages && {change}", tag="nvidia:old", base=BASE)
    built = script("build", BASE_IMAGE="nvidia:old")
    assert built.returncode == 19 and "numpy 1.26.4 is older than 2.0.2" in built.stderr


def test_root_is_refused_and_ubuntus_user_makes_way(engine, checkout, image):
    context = ["-f", checkout / "Dockerfile.dgx-spark", checkout]
    refused = engine.docker("build", "--build-arg", "HOST_UID=0", *context, check=False)
    assert refused.returncode != 0 and "files on the mount would belong to root" in refused.stdout + refused.stderr
    engine.docker("build", "-t", "uid:1000", "--build-arg", "HOST_UID=1000", "--build-arg", "HOST_GID=1000", *context)
    users = engine.docker("run", "--rm", "uid:1000", "bash", "-c", "id -un; getent passwd ubuntu || echo gone")
    assert users.stdout.split() == ["trainer", "gone"]


def test_another_users_image_is_rebuilt_for_you(script, engine, kept_image):
    engine.derive("LABEL finetune.host-uid=1234")
    started = script("start")
    assert started.returncode == 0, started.stderr
    assert f"was built for uid 1234; its last layers are rebuilt for yours, {USER}" in started.stdout


def test_a_checkpoint_never_travels_to_the_daemon(engine, checkout, image):
    (checkout / "checkpoints/weights.safetensors").write_bytes(b"x")
    (checkout / ".env").write_text("JUPYTER_TOKEN=secret\n")
    built = engine.docker("build", "-t", "context:all", "-f", "-", checkout, input=f"FROM {BASE}\nCOPY . /context\n")
    (checkout / ".env").unlink()
    sent = r"(build context to Docker daemon|transferring context:) +[\d.]+ ?k?B"
    assert re.search(sent, built.stdout + built.stderr), built.stderr
    names = engine.docker("run", "--rm", "context:all", "find", "/context", "-type", "f").stdout
    assert "pyproject.toml" in names and "safetensors" not in names and ".env" not in names


@pytest.mark.parametrize("beginning", ["import torch; from peft", r"import torch; \\\npart", "from importlib.metadata"])
def test_the_asserts_run_on_the_real_packages(beginning):
    """The stand-in's torch and peft only answer; the asserts themselves are run on the installed ones."""
    [code] = re.findall(rf'RUN python -c "({beginning}.*?)"\n', DOCKERFILE, re.S)
    exec(code.replace("\\\n", ""), {})
