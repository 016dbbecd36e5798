"""Every way to fail has its own sentence, remedy and exit code; `doctor` says the same and changes nothing."""

import os
import re
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from container_kit import CONTAINER, IMAGE, REPO, STRANGER, USER, make_checkout

NOWHERE = {"DOCKER_HOST": "unix:///nowhere.sock"}


def assert_fails(result, code, sentence, remedy):
    assert result.returncode == code, result.stdout + result.stderr
    said, remedies = re.search(r"^error: (.*)\n((.|\n)*)", result.stderr, re.M).group(1, 2)
    assert sentence in said and remedy in remedies, result.stderr


@pytest.fixture(scope="session")
def bare_path(workdir):
    """The system's programs without docker and without NVIDIA's."""
    folder = workdir / "bare-bin"
    folder.mkdir()
    for directory in ("/usr/bin", "/bin"):
        for program in Path(directory).iterdir():
            link = folder / program.name
            if not link.exists() and not program.name.startswith(("docker", "nvidia")):
                link.symlink_to(program)
    return str(folder)


@contextmanager
def listener(port, user):
    """Another program on 127.0.0.1:port. Perl, because this Python may lie where the user cannot reach it."""
    options = f"Listen => 1, ReuseAddr => 1, LocalAddr => '127.0.0.1:{port}'"
    listen = f"$s = IO::Socket::INET->new({options}) or die"
    code = f"{listen}; $| = 1; print qq(up\\n); sleep 600"
    process = subprocess.Popen(
        ["perl", "-MIO::Socket::INET", "-e", code], stdout=subprocess.PIPE, user=user, group=user, extra_groups=[]
    )
    assert process.stdout.readline() == b"up\n"
    yield process
    process.kill()
    process.wait()


def test_words(script):
    """A word that no command takes, and one too many, end with 2 and show what there is."""
    for words, shown in {
        "strat": "start tensorboard",
        "start finetun": "start [finetune]",
        "start finetune x": "start serve [FOLDER]",
        "start serve x y": "start serve [FOLDER]",
        "build --no-cahce": "build [finetune] [--no-cache]",
        "logs xyzzy": "logs [SERVICE] [-f]",
        "status --jsn": "status [--json]",
        "status --json x": "status [--json]",
        "exec": "exec COMMAND...",
        "stop finetune": "stop ",
        "restart x": "restart ",
        "shell x": "shell ",
        "doctor x": "doctor ",
        "": "usage:",
    }.items():
        assert_fails(script(*words.split()), 2, f"There is no command '{words}'" if words else "missing", f"  {shown}")


@pytest.fixture
def with_env(script, workdir, bare_path):
    """Run the script in a checkout with this .env, without Docker: settings are read before it is asked."""
    other = make_checkout(workdir / "settings")

    def run(text, *words, **settings):
        (other / ".env").write_bytes(text.encode())
        os.chown(other / ".env", USER, USER)
        result = script(*words, root=other, **{"PATH": bare_path, "MIN_FREE_GIB": "", "JUPYTER_PORT": "", **settings})
        assert (other / ".env").read_bytes() == text.encode()
        return result

    yield run
    shutil.rmtree(other)


def test_settings_from_the_file_as_people_and_editors_write_it(with_env):
    for text in (
        "MIN_FREE_GIB=88888\r\n",
        "\ufeffMIN_FREE_GIB=88888\r\n",
        "export MIN_FREE_GIB=88888",
        "# floors\n\n  MIN_FREE_GIB = 88888 \t # not 24\n",
        "MIN_FREE_GIB='88888' # not 24\r\n",
        'MIN_FREE_GIB="88888"\n#MIN_FREE_GIB=1\n',
        "MIN_FREE_GIB=1\nMIN_FREE_GIB=88888\n",
    ):
        assert "at least 88888 GiB" in doctor_line(with_env(text, "doctor"), "memory")[1], text
    assert "at least 88888.5 GiB" in doctor_line(with_env("MIN_FREE_GIB=88888.5\n", "doctor"), "memory")[1]
    # The environment goes first.
    told = with_env("MIN_FREE_GIB=88888\n", "doctor", MIN_FREE_GIB="99999")
    assert "at least 99999 GiB" in doctor_line(told, "memory")[1]


def test_settings_that_make_no_sense(with_env):
    assert_fails(with_env("MIN_FREE_GIB=lots\n", "start"), 2, "MIN_FREE_GIB is 'lots'", ".env.example")
    for port in ("88a", "8889.5"):
        assert_fails(with_env(f"JUPYTER_PORT={port}\n", "build"), 2, f"JUPYTER_PORT is '{port}'", ".env.example")


def test_every_line_of_the_example_can_be_copied():
    settings = re.findall(r"^# ([A-Z_]+)=(.*)$", (REPO / ".env.example").read_text(), re.M)
    assert len(settings) == 10 and all(re.fullmatch(r"\S*", value) for _, value in settings)
    files = "".join((REPO / name).read_text() for name in ("start_docker.sh", "docker-compose-finetune.yml"))
    assert [name for name, _ in settings if name not in files] == []


def test_the_usage_is_the_truth(script):
    usage = script("help").stdout
    text = (Path(__file__).parents[2] / "start_docker.sh").read_text()
    described = set(re.findall(r"^  (\w+)[ ,]", usage.split("exit codes")[0], re.M)) - {"adapter"}
    assert described == set(re.findall(r"^cmd_(\w+)\(\)", text, re.M)) | {"help"}
    codes = {int(code) for code in re.findall(r"\bfail (\d+)", text)} | {3}
    assert codes == {int(code) for code in re.findall(r"(?<=\s)(\d+) [a-zA-Z]", usage.split("exit codes")[1])}
    page = (REPO / "docs" / "container.md").read_text().partition("## When something is wrong")[2]
    assert codes - {2, 3} == {int(code) for code in re.findall(r"\((\d\d)[,)]", page)}


@pytest.mark.parametrize(
    ("words", "settings", "code", "sentence", "remedy"),
    [
        ("start", {"HF_CACHE": "/proc/cache"}, 2, "make the folder /proc/cache", "HF_CACHE="),
        ("exec true", {}, 3, "pytorch-finetune is not running", "./start_docker.sh start finetune"),
        ("shell", {}, 3, "pytorch-finetune is not running", "./start_docker.sh start finetune"),
        ("logs serve", {}, 3, "serve has no container", "status"),
        ("start", NOWHERE, 11, "daemon does not answer at /nowhere.sock", "systemctl start docker"),
        ("start", {"user": STRANGER}, 12, "You may not use Docker", "usermod -aG docker"),
        *[
            (command, {"user": 0}, 15, "running as root", "Run it as your own user")
            for command in ("start", "restart", "build", "run")
        ],
        # A registry on this machine that does not exist: refused at once.
        ("build", {"BASE_IMAGE": "127.0.0.1:9/a:1"}, 18, "127.0.0.1:9/a:1 is not here and cannot be pulled", "network"),
        ("start", {"MIN_FREE_GIB": "99999"}, 21, "of memory are available; at least 99999 GiB", "drop_caches"),
        ("start serve results", {}, 26, "There is no model to serve in results", "adapter_config.json"),
        ("start serve adapters/none", {}, 26, "in adapters/none", "train one first"),
    ],
)
def test_each_obstacle_has_its_code_sentence_and_remedy(script, image, words, settings, code, sentence, remedy):
    assert_fails(script(*words.split(), **settings), code, sentence, remedy)


@pytest.mark.parametrize(
    ("instruction", "code", "sentence", "remedy"),
    [
        ('CMD ["bash", "-c", "echo port 8888 is haunted; exit 1"]', 20, "is not healthy", "port 8888 is haunted"),
        ("RUN touch /tmp/gpu-is-lost", 22, "sees no GPU", "systemctl restart docker"),
    ],
)
def test_what_is_wrong_inside(script, engine, kept_image, instruction, code, sentence, remedy):
    engine.derive(instruction)
    assert_fails(script("start"), code, sentence, remedy)


def test_no_docker(script, bare_path):
    assert_fails(script("start", PATH=bare_path), 10, "Docker is not installed", "docs.docker.com")


def test_a_daemon_that_hangs(script, engine):
    engine.process.send_signal(signal.SIGSTOP)
    try:
        assert_fails(script("status"), 11, "daemon does not answer", "systemctl start docker")
    finally:
        engine.process.send_signal(signal.SIGCONT)


def test_no_compose(script, workdir):
    elsewhere = {"PATH": os.environ["PATH"], "DOCKER_CONFIG": "/nowhere"}
    if subprocess.run(["docker", "compose", "version"], env=elsewhere, capture_output=True).returncode == 0:
        pytest.skip("this machine has docker compose as a system plugin")
    (workdir / "no-plugins").mkdir()
    refused = script("start", DOCKER_CONFIG=str(workdir / "no-plugins"))
    assert_fails(refused, 13, "no compose plugin", "docker-compose-plugin")


def test_old_compose(script, workdir):
    # A plugin that only tells its version; the engine is the real one.
    plugin = workdir / "old-plugins/cli-plugins/docker-compose"
    plugin.parent.mkdir(parents=True)
    metadata = '{"SchemaVersion":"0.1.0","Vendor":"test","Version":"v2.3.3"}'
    plugin.write_text(f"#!/bin/sh\ncase $1 in docker-cli-plugin-metadata) echo '{metadata}';; *) echo 2.3.3;; esac\n")
    plugin.chmod(0o755)
    refused = script("start", DOCKER_CONFIG=str(workdir / "old-plugins"))
    assert_fails(refused, 14, "is 2.3.3; 2.20.0 or newer", "--only-upgrade")


def test_port_taken_by_a_process(script, port):
    with listener(port, USER) as process:
        taken = f"Port {port} on 127.0.0.1 is taken by perl (pid {process.pid})"
        assert_fails(script("start"), 17, taken, f"JUPYTER_PORT={port + 1}")
    with listener(port, STRANGER):
        taken = f"taken by a process of another user (sudo ss -ltnp 'sport = :{port}'"
        assert_fails(script("start"), 17, taken, "Stop that")


def test_port_taken_by_a_process_that_accepts_nobody(script, port):
    """Its queue is full, and a connection would wait for minutes."""
    with listener(port, USER) as process, socket.socket() as first, socket.socket() as second:
        for waiting in (first, second):
            waiting.connect(("127.0.0.1", port))
        assert_fails(script("start"), 17, f"taken by perl (pid {process.pid})", "Stop that")


def test_port_taken_by_a_container(script, engine, port, image):
    engine.docker("run", "-d", "--name", "squatter", "-p", f"127.0.0.1:{port}:1", IMAGE, "sleep", "600")
    try:
        assert_fails(script("start"), 17, "taken by the container squatter", "Stop that")
    finally:
        engine.clean()


def test_docker_refuses(script, engine, image):
    engine.docker("create", "--name", CONTAINER, IMAGE)
    try:
        assert_fails(script("start"), 25, f"Docker could not start {CONTAINER}", "is already in use")
    finally:
        engine.clean()


def test_another_checkouts_container(script, workdir, image):
    other = make_checkout(workdir / "other project")
    assert script("start", root=other).returncode == 0
    assert_fails(script("start"), 24, f"running for another checkout: {other}", f"'{other}/start_docker.sh' stop")
    assert_fails(script("restart"), 24, "running for another checkout", "stop")
    assert script("stop", root=other).returncode == 0
    shutil.rmtree(other)


# ---- doctor -------------------------------------------------------------------------------------


@pytest.fixture
def healthy_path(engine, workdir, bare_path):
    """A machine with NVIDIA's tools: the stand-in nvidia-smi answers as a GB10."""
    folder = workdir / "gpu-tools"
    folder.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).parent / "stand_in/bin/nvidia-smi", folder)
    return f"{folder}:{engine.gpu_bin}:{os.environ['PATH']}"


def doctor_line(result, name):
    return re.search(rf"^(ok|FAIL) +{name} +(.*)", result.stdout, re.M).groups()


def test_doctor_on_a_good_machine_changes_nothing(script, engine, workdir, image, healthy_path):
    fresh = make_checkout(workdir / "fresh")

    def state():
        listings = [engine.docker(*words).stdout.split() for words in (("ps", "-aq"), ("images", "-q"))]
        return sorted(fresh.rglob("*")), *map(sorted, listings)

    before = state()
    result = script("doctor", root=fresh, PATH=healthy_path)
    assert result.returncode == 0, result.stdout
    assert "FAIL" not in result.stdout and len(result.stdout.splitlines()) == 11
    assert doctor_line(result, "GPU") == ("ok", "NVIDIA GB10, 580.95.05, 12.1, memory shared with the CPU")
    assert state() == before
    assert not (fresh / ".env").exists()
    shutil.rmtree(fresh)


def test_doctor_says_everything_at_once(script, port):
    with listener(port, USER):
        result = script("doctor", MIN_FREE_GIB="99999")
    assert result.returncode == 17, result.stdout  # the first failure's
    assert doctor_line(result, "port")[0] == doctor_line(result, "memory")[0] == "FAIL"
    if not shutil.which("nvidia-smi"):
        assert doctor_line(result, "GPU") == ("FAIL", "nvidia-smi finds no GPU on this machine.")
    assert doctor_line(result, "daemon")[0] == "ok"


def test_doctor_without_docker(script, bare_path):
    result = script("doctor", PATH=bare_path)
    assert result.returncode == 10
    assert doctor_line(result, "docker")[1].startswith("Docker is not installed")


@pytest.mark.parametrize("user, code", [(USER, 11), (0, 15)])
def test_doctor_without_a_daemon_has_a_number_before_each_unit(script, user, code):
    result = script("doctor", user=user, **NOWHERE)
    assert result.returncode == code and result.stderr == ""
    assert doctor_line(result, "daemon")[0] == "FAIL"
    figures = re.findall(r"(\S*) GiB", result.stdout)
    assert len(figures) >= 3 and all(re.fullmatch(r"[\d.]+", figure) for figure in figures), result.stdout
    # What only the daemon knows is not guessed at.
    assert not re.search(r"^\w+ +(compose|runtime|port|image disk)", result.stdout, re.M)


def test_doctor_of_a_daemon_on_another_machine(script, workdir, bare_path):
    """A docker that answers for a daemon elsewhere; the folder of its images is not here, nor is checkpoints/."""
    folder = workdir / "remote-bin"
    folder.mkdir()
    (folder / "docker").write_text(
        """#!/bin/sh
        case "$*" in
          *DockerRootDir*) echo /elsewhere/docker ;;
          *Runtimes*) echo '{"nvidia": {}}' ;;
          version*) echo 28.5 ;;
          compose*) echo 2.40 ;;
          *) exit 1 ;;
        esac"""
    )
    (folder / "docker").chmod(0o755)
    other = make_checkout(workdir / "elsewhere")
    shutil.rmtree(other / "checkpoints")
    result = script("doctor", root=other, PATH=f"{folder}:{bare_path}")
    assert doctor_line(result, "image disk") == ("ok", "unknown: there is no folder /elsewhere/docker on this machine")
    assert doctor_line(result, "model disk")[1].startswith("unknown: ")
    shutil.rmtree(other)


def test_doctor_sees_a_full_disk(script, checkout, healthy_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", checkout / "checkpoints"], check=True)
    try:
        result = script("doctor", PATH=healthy_path)
    finally:
        subprocess.run(["umount", checkout / "checkpoints"], check=True)
    assert result.returncode == 23
    assert "a full fine-tuning checkpoint takes 16" in doctor_line(result, "model disk")[1]


def test_no_nvidia_runtime(script, engine, image):
    """Last: the engine is started again without the hook, and then with it."""
    if shutil.which("nvidia-container-runtime-hook"):
        pytest.skip("this machine has NVIDIA's container runtime")
    engine.restart(hook=False)
    try:
        path = os.environ["PATH"]
        refused = script("start", PATH=path)
        assert_fails(refused, 16, "Docker cannot hand the GPU to a container", "nvidia-ctk runtime configure")
        assert doctor_line(script("doctor", PATH=path), "runtime")[0] == "FAIL"
        assert script("stop").returncode == 0
    finally:
        engine.restart(hook=True)
