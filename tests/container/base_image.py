"""Builds the stand-in for NVIDIA's base image: this machine's bash, Python and JupyterLab, and a pip that records.

What is real in it: the shell, useradd, Python's venv, JupyterLab. What only answers and records: pip, git,
torch, nvidia-smi. So it proves the order and the arguments of the Dockerfile's steps, never that CUDA code builds.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

HERE = Path(__file__).parent / "stand_in"
COMMANDS = [
    "bash", "cat", "chmod", "chown", "cp", "cut", "date", "dirname", "env", "find", "getent", "grep", "groupadd",
    "head", "hostname", "id", "install", "kill", "ls", "mkdir", "paste", "ps", "readlink", "rm", "sed", "sleep", "sort",
    "stat", "tail", "tee", "touch", "tr", "true", "uname", "useradd", "userdel", "whoami",
]  # fmt: skip
ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nubuntu:x:1000:1000::/home/ubuntu:/bin/bash\n",
    "etc/group": "root:x:0:\nubuntu:x:1000:\n",
    "etc/shadow": "root:*:19000::::::\nubuntu:*:19000::::::\n",
    "etc/gshadow": "root:*::\nubuntu:*::\n",
    "etc/pam.d/other": "".join(f"{kind} sufficient pam_permit.so\n" for kind in ("auth", "account", "password")),
}
# What NVIDIA's image has before anything is installed.
BASE_VERSIONS = {
    "torch": "2.10.0a0+b558c986e8.nv25.11",
    "torchvision": "0.25.0a0+ca221243",
    "triton": "3.5.0",
    "numpy": "2.1.0",
    "torchao": "0.14.0",
}
LISTED = ("trl", "bitsandbytes", "datasets", "scikit-learn", "tensorboard", "unsloth_zoo")

# Kept out for speed: nothing that the tests do reads them.
UNWANTED = re.compile(
    r"(^|/)(tests?|idlelib|tkinter|ensurepip|lib2to3|site-packages|dist-packages|config-3[^/]*|debugpy|galata"
    r"|third_party|jupyterlab/static)/|locale-data/(?!en|root)|\.(a|map|opt-[12]\.pyc)$"
)


def closure(*roots):
    """The installed distributions that the roots need, themselves included."""
    found, queue = {}, list(roots)
    while queue:
        name = re.match(r"[\w.-]+", queue.pop())[0].lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # a requirement of another platform
        queue += [need for need in found[name].requires or [] if "extra ==" not in need]
    return found.values()


def libraries(binaries):
    """The shared libraries that the binaries load, by ldd, the loader included."""
    listing = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True).stdout
    return set(re.findall(r"(/\S+\.so[^\s:]*) \(0x", listing))


def build_root(root):
    """Write the stand-in's small files under root; return the rest as {path in the image: file here}."""
    bulk = {}
    for folder in ("tmp", "root", "home", "stand-in", "workspace", "usr/local/bin", "usr/local/cuda/bin"):
        (root / folder).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    for folder in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / folder).mkdir()
        (root / folder).symlink_to(f"usr/{folder}")
    for name, text in ACCOUNTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    binaries = [Path(shutil.which(command, path="/usr/bin:/bin:/usr/sbin:/sbin")) for command in COMMANDS]
    for binary in binaries:
        shutil.copy(binary.resolve(), root / "usr/bin" / binary.name)
    (root / "usr/bin/sh").symlink_to("bash")
    python = Path(sys.base_prefix, "bin", version).resolve()
    shutil.copy(python, root / "usr/local/bin" / version)
    for name in ("python3", "python"):
        (root / "usr/local/bin" / name).symlink_to(version)
    stdlib = root / "usr/local/lib" / version
    add_folder(bulk, Path(sysconfig.get_path("stdlib")), stdlib.relative_to(root))

    site = stdlib / "site-packages"
    site.mkdir(parents=True)
    shutil.copytree(HERE / "pip", site / "pip")
    shutil.copy(HERE / "base/torch.py", site)
    for name, number in BASE_VERSIONS.items():
        (site / f"{name}-{number}.dist-info").mkdir()
        (site / f"{name}-{number}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {number}\n")
        if name != "torch":
            (site / f"{name}.py").write_text("")

    store = root / "stand-in/site"
    shutil.copytree(HERE / "listed", store / "peft")
    for name in LISTED:
        (store / name).mkdir()
        (store / name / f"{name.replace('scikit-learn', 'sklearn')}.py").touch()
    add_jupyter(bulk)
    shutil.copytree(HERE / "bin", root / "stand-in/bin")
    for command in ("nvidia-smi", "git"):
        shutil.copy(HERE / "bin" / command, root / "usr/bin")

    extensions = [file for file in bulk.values() if file.suffix == ".so"]
    # test_browser.py mounts this environment's libraries over the stand-in's; they load the system's C++ library.
    mounted = [Path(sysconfig.get_path("purelib"), "torch/lib/libc10.so")]
    security = next(Path("/").glob("lib/*/security/pam_permit.so"))
    for library in {*libraries([*binaries, python, *extensions, *mounted]), str(security)}:
        standard = library.startswith(("/lib", "/usr/lib"))  # a Python of pyenv keeps its library elsewhere
        target = root / "usr" / (library.lstrip("/").removeprefix("usr/") if standard else f"lib/{Path(library).name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(library).resolve(), target)
    return bulk


def add_folder(bulk, source, target):
    for folder, folders, files in os.walk(source):
        # Not entered: some Pythons keep gigabytes of site-packages inside their standard library.
        folders[:] = [name for name in folders if not UNWANTED.search(f"{name}/")]
        for name in files:
            file = Path(folder, name)
            if not UNWANTED.search(name):
                bulk[str(target / file.relative_to(source))] = file


def add_jupyter(bulk):
    """JupyterLab and its widgets, as installed in this environment, go into the store under its name."""
    # As text: pathlib takes seconds for ten thousand files. Links stay, because the environment may be one.
    site, shared = sysconfig.get_path("purelib"), tuple(f"{sys.prefix}/{name}/" for name in ("share", "etc"))
    for package in closure("jupyterlab", "ipykernel", "ipywidgets"):
        for file in package.files:
            source = os.path.normpath(file.locate())
            if UNWANTED.search(str(file)) or not os.path.isfile(source):
                continue
            if source.startswith(f"{site}/"):
                bulk[f"stand-in/site/jupyterlab/{source.removeprefix(f'{site}/')}"] = Path(source)
            elif source.startswith(shared):
                bulk[f"stand-in/{source.removeprefix(f'{sys.prefix}/')}"] = Path(source)


def import_image(engine, root, bulk, name):
    """`docker import` the small files under root and the many of bulk, which are read where they lie."""
    command = ["docker", "-H", engine.host, "import", "-", name]
    pipe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    with tarfile.open(fileobj=pipe.stdin, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        archive.add(root, arcname=".", filter=owned_by_root)
        for target, source in bulk.items():
            archive.add(source, arcname=f"./{target}", filter=owned_by_root)
    pipe.stdin.close()
    assert pipe.wait() == 0, f"docker import of {name} failed"


def owned_by_root(member):
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member
