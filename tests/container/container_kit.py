"""What the container tests share: a Docker engine of their own, a checkout to run the script in, a terminal."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
USER, STRANGER = 4242, 4243
BASE = "nvcr.io/nvidia/pytorch:25.11-py3"
IMAGE = "unsloth-dgx-spark:latest"
CONTAINER = "pytorch-finetune"
FILES = [
    "Dockerfile.dgx-spark", "docker-compose-finetune.yml", "start_docker.sh", ".dockerignore", "requirements",
    "pyproject.toml",
]  # fmt: skip

# The project's own packages need the real torch; the container tests only need something to import and to run.
SUITE = """
import json, sys, time
from pathlib import Path

run = Path("checkpoints/.training/spark-lora")
run.mkdir(parents=True, exist_ok=True)
progress = {"run": "spark-lora", "step": 120, "total_steps": 1965, "seconds_left": 8000.5, "updated": time.time()}
(run / "progress.json").write_text(json.dumps(progress))
print("suite:", *sys.argv[1:])
"""


class Engine:
    """A dockerd in a folder of its own. `hook`: whether NVIDIA's runtime hook is there to be found."""

    def __init__(self, folder, plugins):
        self.folder, self.plugins = folder, plugins
        self.socket = folder / "docker.sock"
        self.host = f"unix://{self.socket}"
        self.gpu_bin = folder / "gpu-bin"
        self.hook_log = folder / "hook.log"
        self.gpu_bin.mkdir()
        hook = self.gpu_bin / "nvidia-container-runtime-hook"
        # Docker's GPU support asks only that this program exists; its log proves that the GPU was asked for.
        hook.write_text(f'#!/bin/sh\necho "$@" >>"{self.hook_log}"\n')
        hook.chmod(0o755)

    def start(self, hook=True):
        path = f"{self.gpu_bin}:{os.environ['PATH']}" if hook else os.environ["PATH"]
        # Called some five times a container; `env python3` may be a shim that takes longer than runc itself.
        wrapper = self.folder / "runc_wrapper"
        wrapper.write_text(f"#!{sys.executable} -IS\n{(Path(__file__).parent / 'runc_wrapper.py').read_text()}")
        wrapper.chmod(0o755)
        options = f"--group {USER} --add-runtime less-rlimits={wrapper} --default-runtime less-rlimits"
        places = [f"--{option}={self.folder}/{option}" for option in ("pidfile", "data-root", "exec-root")]
        command = ["dockerd", "-H", self.host, *options.split(), *places]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PATH": path})
        for _ in range(100):
            if self.socket.exists() and self.docker("info", check=False).returncode == 0:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        log = (self.folder / "log").read_text()
        reason = " ".join(log.partition("failed to start daemon: ")[2].split()) or log[-300:]
        self.process.kill()
        pytest.skip(f"dockerd cannot start here: {reason}")

    def stop(self):
        # After SIGKILL the exec-root could not be used again.
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)

    def restart(self, hook):
        self.stop()
        self.start(hook)

    def docker(self, *words, check=True, input=None, **settings):
        environment = {**os.environ, "DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self.plugins), **settings}
        result = run_bounded(["docker", *map(str, words)], input, env=environment)
        assert not check or result.returncode == 0, result.stderr
        return result

    def inspect(self, template, name=CONTAINER):
        return self.docker("inspect", "-f", template, name).stdout.strip()

    def derive(self, instructions, tag=IMAGE, base=IMAGE):
        """Build `FROM base` with more instructions, and give it the tag."""
        self.docker("build", "-t", tag, "-", input=f"FROM {base}\n{instructions}\n")

    def clean(self):
        names = self.docker("ps", "-aq").stdout.split()
        if names:
            self.docker("rm", "-f", *names)


def make_checkout(folder):
    folder.mkdir()
    for name in FILES:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        copy(REPO / name, folder / name)
    # Health is asked for every second instead of every five, with the same patience: a dozen tests wait for it.
    for name in ("Dockerfile.dgx-spark", "docker-compose-finetune.yml"):
        text = (folder / name).read_text()
        for retries in (6, 3):
            text = text.replace(f"--retries={retries}", f"--retries={retries * 5}")
            text = text.replace(f"retries: {retries}\n", f"retries: {retries * 5}\n")
        (folder / name).write_text(text.replace("interval=5s", "interval=1s").replace("interval: 5s", "interval: 1s"))
    for name in ("data_prep", "finetune", "benchmarks", "notebooks", "results", "checkpoints", "adapters"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    (folder / "finetune/__main__.py").write_text(SUITE)
    shutil.copy(REPO / "finetune/activity.py", folder / "finetune")
    subprocess.run(["chown", "-R", f"{USER}:{USER}", folder], check=True)
    return folder


def run_bounded(command, input=None, seconds=180, **options):
    """subprocess.run with text pipes, but at the limit everything that the command started is killed.

    subprocess.run kills the command alone, and then waits for whoever else holds its output: for ever, if a
    docker client that hangs does.
    """
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    if input is None:
        streams["stdin"] = subprocess.DEVNULL
    process = subprocess.Popen(command, text=True, start_new_session=True, **streams, **options)
    try:
        output, errors = process.communicate(input, timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        pytest.fail(f"{command} still ran after {seconds} s. It had said:\n{output}{errors}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def run_in_terminal(command, options):
    """The same with a terminal for its three streams; stdout then holds both."""
    ours, theirs = pty.openpty()
    os.fchmod(theirs, 0o666)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, **options)
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux's end of file on a terminal
            break
        text += piece
    os.close(ours)
    return subprocess.CompletedProcess(command, process.wait(), text.decode(), "")
