"""Takes the place of pip in the stand-in base image, which has no network.

Every call becomes one line of /stand-in/asked.jsonl. `list` is true; `install -r LIST` links in what
/stand-in/site holds for the names in LIST; `wheel` writes a file whose content is the record itself.
"""

import json
import os
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

ASKED = Path("/stand-in/asked.jsonl")
SITE = Path(sysconfig.get_path("purelib"))


def record(argv):
    constraint = os.environ.get("PIP_CONSTRAINT")
    entry = {
        "argv": argv,
        "prefix": sys.prefix,
        "constraint": Path(constraint).read_text() if constraint else None,
        "arch": os.environ.get("TORCH_CUDA_ARCH_LIST"),
        "lists": {name: Path(name).read_text() for name in argv if name.endswith(".txt") and Path(name).exists()},
        "wheels": {name: Path(name).read_text() for name in argv if name.endswith(".whl")},
    }
    with ASKED.open("a") as asked:
        asked.write(json.dumps(entry) + "\n")


def list_packages():
    seen = {}
    for package in distributions():
        seen.setdefault(package.name, package.version)
    for name, version in sorted(seen.items()):
        print(f"{name}=={version}")


def link(source, target):
    if not target.exists():
        target.symlink_to(source)


def install(names):
    """Link every module of the store for these names; jupyterlab brings its static files and command."""
    for name in names:
        for module in Path("/stand-in/site", name).glob("*"):
            link(module, SITE / module.name)
    if "jupyterlab" in names:
        for folder in ("share", "etc"):
            link(f"/stand-in/{folder}", Path(sys.prefix, folder))
        for command in ("jupyter", "tensorboard"):
            link(f"/stand-in/bin/{command}", Path(sys.prefix, "bin", command))
    if "unsloth" in names and os.environ.get("STAND_IN_REPLACES_TORCH"):
        # What a real pip does without --no-deps: a generic torch in place of NVIDIA's.
        (SITE / "torch").mkdir()
        (SITE / "torch/__init__.py").write_text("__version__ = '2.13.0'\nclass version: cuda = None\n")
        (SITE / "torch-2.13.0.dist-info").mkdir()
        (SITE / "torch-2.13.0.dist-info/METADATA").write_text("Name: torch\nVersion: 2.13.0\n")


argv = sys.argv[1:]
record(argv)
if argv[0] == "list":
    list_packages()
elif argv[0] == "wheel":
    wheel = Path(argv[argv.index("-w") + 1], f"{Path.cwd().name}-0.0.0-py3-none-any.whl")
    wheel.write_text(ASKED.read_text())
elif "-e" in argv:
    (SITE / "editable.pth").write_text(argv[argv.index("-e") + 1] + "\n")
elif "-r" in argv:
    lines = Path(argv[argv.index("-r") + 1]).read_text().splitlines()
    install([line.split("==")[0] for line in lines if "==" in line and not line.startswith("#")])
