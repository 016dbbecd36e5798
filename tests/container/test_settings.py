"""What `start_docker.sh start` makes of .env. A docker that only answers stands in, so that no engine is needed."""

import os
import re
import shutil
import subprocess

import pytest
from container_kit import REPO, USER

DOCKER = """#!/bin/sh
case "$*" in
version*) echo 28.5.0 ;;
"compose version"*) echo 2.30.0 ;;
"context inspect"*) echo "$STAND_IN_ENDPOINT" ;;
info*SecurityOptions*) echo "[name=seccomp,profile=builtin $STAND_IN_SECURITY]" ;;
"image inspect"*) echo "$(id -u) 0" ;;
inspect*) exit 1 ;;
esac
"""
# Somebody listens on port 8898 alone.
SS = """#!/bin/sh
case "$*" in *":8898 "*) echo 'LISTEN 0 5 127.0.0.1:8898 0.0.0.0:* users:(("python3",pid=7,fd=3))' ;; esac
"""


@pytest.fixture
def start(workdir):
    """Starts in a checkout with this .env, or with the one that the last start left."""
    root = workdir / "env"
    shutil.rmtree(root, ignore_errors=True)
    for folder in ("bin", "requirements"):
        (root / folder).mkdir(parents=True)
    for name in ("start_docker.sh", "docker-compose-finetune.yml", "Dockerfile.dgx-spark", "requirements/base.txt",
                 "requirements/gpu.txt"):  # fmt: skip
        shutil.copy(REPO / name, root / name)
    for name, text in {"docker": DOCKER, "ss": SS}.items():
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)

    def run(text: bytes | None = None, command="start", **stand_in):
        if text is not None:
            (root / ".env").write_bytes(text)
        user = {}
        if os.geteuid() == 0:
            subprocess.run(["chown", "-R", f"{USER}:{USER}", root], check=True)
            user = {"user": USER, "group": USER, "extra_groups": ()}
        environment = {"PATH": f"{root}/bin:{os.environ['PATH']}", "HOME": str(root), **stand_in}
        return subprocess.run([root / "start_docker.sh", command], env=environment, capture_output=True, **user)

    run.env = root / ".env"
    return run


def address(started) -> tuple[bytes, bytes]:
    assert started.returncode == 0, started.stderr
    return re.search(rb"http://127\.0\.0\.1:(\S*)/lab\?token=(\S*)\n", started.stdout).groups()


@pytest.mark.parametrize(
    "text",
    [
        b"JUPYTER_PORT=8899\r\nMIN_FREE_GIB=1\r\nJUPYTER_TOKEN=secret\r\n",
        b"\xef\xbb\xbfexport JUPYTER_PORT=8899 # mine\r\n\r\n#\r\nMIN_FREE_GIB = 0.5\r\n  JUPYTER_TOKEN='secret'\r\n",
    ],
    ids=["CRLF", "BOM, export, comments, blanks"],
)
def test_a_file_of_windows_gives_a_clean_address_and_a_taken_port_is_noticed(start, text):
    assert address(start(text)) == (b"8899", b"secret")
    taken = start(text.replace(b"8899", b"8898"))
    assert taken.returncode == 17 and b"Port 8898 on 127.0.0.1 is taken by python3 (pid 7)" in taken.stderr
    assert start.env.read_bytes() == text.replace(b"8899", b"8898")


@pytest.mark.parametrize(
    "text", [b"JUPYTER_TOKEN=", b"JUPYTER_TOKEN=''\r\nMIN_FREE_GIB=1\r\n", b"export JUPYTER_TOKEN = # none\n"]
)
def test_an_empty_token_becomes_one_token_that_is_kept(start, text):
    first = address(start(text + b"\nMIN_FREE_GIB=1\n"))
    assert re.fullmatch(rb"[0-9a-f]{48}", first[1])
    written = start.env.read_bytes()
    assert written.startswith(text) and written.count(first[1]) == 1
    assert address(start()) == first
    assert start.env.read_bytes() == written


@pytest.mark.parametrize("line", [b"JUPYTER_PORT: 8889", b"set JUPYTER_PORT=8889", b"8889"])
def test_a_line_that_is_no_setting_is_refused_with_its_number(start, line):
    refused = start(b"# ports\r\n\r\n" + line + b"\r\n")
    assert refused.returncode == 2 and b"Line 3 of .env is no setting: " + line in refused.stderr


@pytest.mark.parametrize(
    "setting", [b"JUPYTER_PORT=8889.5", b"JUPYTER_PORT=88a", b"MIN_FREE_GIB=lots", b"MIN_FREE_GIB=1,5"]
)
def test_what_is_no_number_is_refused_with_its_name(start, setting):
    name, value = setting.split(b"=")
    refused = start(setting + b"\r\n")
    assert refused.returncode == 2 and name + b" is '" + value + b"', which is no valid number." in refused.stderr


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ({"STAND_IN_ENDPOINT": "ssh://spark"}, b"daemon at ssh://spark is on another machine"),
        ({"DOCKER_HOST": "tcp://10.0.0.7:2376"}, b"daemon at tcp://10.0.0.7:2376 is on another machine"),
        (
            {"STAND_IN_ENDPOINT": "unix:///run/user/1000/docker.sock", "STAND_IN_SECURITY": "name=rootless"},
            b"Docker at /run/user/1000/docker.sock is rootless",
        ),
    ],
)
def test_a_daemon_whose_containers_could_not_write_here_is_refused(start, where, sentence):
    refused = start(b"MIN_FREE_GIB=1\n", **where)
    assert refused.returncode == 28 and sentence in refused.stderr and b"unset DOCKER_HOST" in refused.stderr
    doctor = start(command="doctor", **where)
    assert re.search(rb"^FAIL +daemon +.*" + sentence, doctor.stdout, re.M) and doctor.returncode == 28
