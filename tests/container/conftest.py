"""A real Docker engine, a stand-in base image, and a checkout of the project for the container tests.

    pytest -m container tests/container

Needs root and `apt-get install --no-install-recommends docker.io iptables`; without them the tests skip, and
say why. The engine is a dockerd of its own in a folder of its own: the machine's Docker is not touched.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Under --import-mode=importlib a test's own folder is not on the path.
sys.path.insert(0, str(Path(__file__).parent))

import base_image
from container_kit import BASE, IMAGE, USER, Engine, make_checkout, run_bounded, run_in_terminal


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.container)


@pytest.fixture(scope="session")
def workdir():
    """Not pytest's tmp_path: that one is closed to other users, and the script runs as one."""
    folder = Path(tempfile.mkdtemp(prefix="container-tests-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def plugins(workdir):
    """A DOCKER_CONFIG with docker compose as its plugin, and buildx if it is on the PATH."""
    tools = subprocess.run([Path(__file__).parent / "tools.sh"], capture_output=True, text=True)
    if tools.returncode:
        pytest.skip(f"docker compose cannot be fetched: {tools.stderr.strip().splitlines()[-1]}")
    # A copy: the cache may lie in root's home, and the script runs as another user.
    folder = workdir / "docker-config"
    (folder / "cli-plugins").mkdir(parents=True)
    shutil.copy(Path(tools.stdout.strip(), "docker-compose"), folder / "cli-plugins")
    buildx = shutil.which("docker-buildx")
    if buildx:
        shutil.copy(buildx, folder / "cli-plugins")
    return folder


@pytest.fixture(scope="session")
def engine(workdir, plugins):
    if os.geteuid() != 0:
        pytest.skip("the container tests start a dockerd of their own, which takes root")
    missing = [program for program in ("dockerd", "docker", "iptables", "useradd") if not shutil.which(program)]
    if missing:
        pytest.skip(
            f"not installed: {', '.join(missing)} (apt-get install --no-install-recommends docker.io iptables passwd)"
        )
    folder = workdir / "engine"
    folder.mkdir()
    engine = Engine(folder, plugins)
    engine.start()
    yield engine
    engine.clean()
    engine.stop()


@pytest.fixture(scope="session")
def base(engine, workdir):
    """The stand-in for NVIDIA's image, under its name, so that FROM resolves without a network."""
    root = workdir / "base"
    root.mkdir()
    base_image.import_image(engine, root, base_image.build_root(root), BASE)
    shutil.rmtree(root)
    tried = engine.docker("run", "--rm", BASE, "true", check=False)
    if tried.returncode:
        pytest.skip(f"dockerd starts here, but runs no container: {tried.stderr.strip().splitlines()[-1]}")
    return BASE


@pytest.fixture(scope="session")
def checkout(workdir):
    """The project's container files as a user's checkout, with a space in its path."""
    return make_checkout(workdir / "a project")


@pytest.fixture(scope="session")
def home(workdir):
    folder = workdir / "home"
    folder.mkdir()
    os.chown(folder, USER, USER)
    return folder


@pytest.fixture(scope="session")
def port():
    """A free port, so that a Jupyter of the machine's own does not disturb."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def script(engine, checkout, home, port):
    """Run the real start_docker.sh as an ordinary user, from another folder, without a terminal."""

    def run(*words, user=USER, root=checkout, groups=(), terminal=False, cwd="/", **settings):
        environment = {
            "PATH": f"{engine.gpu_bin}:{os.environ['PATH']}",
            "HOME": str(home),
            "TMPDIR": str(home),
            "DOCKER_HOST": engine.host,
            "DOCKER_CONFIG": str(engine.plugins),
            "BUILDX_CONFIG": str(home / "buildx"),
            "JUPYTER_PORT": str(port),
            "MIN_FREE_GIB": "1",
            **settings,
        }
        command = [root / "start_docker.sh", *words]
        options = {"env": environment, "cwd": cwd, "user": user, "group": user, "extra_groups": groups}
        if terminal:
            return run_in_terminal(command, options)
        return run_bounded(command, **options)

    return run


@pytest.fixture(scope="session")
def image(script, base, engine):
    """The image, built by the script itself. Its build's output is kept for the tests."""
    built = script("build")
    assert built.returncode == 0, built.stderr
    return built.stdout


@pytest.fixture(scope="session")
def buildkit(engine):
    """A PATH whose docker builds with BuildKit: since 23 the client needs buildx for that, before it did not."""
    for path in (os.environ["PATH"], f"/usr/bin:{os.environ['PATH']}"):
        settings = {"DOCKER_BUILDKIT": "1", "PATH": path}
        tried = engine.docker("build", "-", input="FROM scratch\nLABEL tried=yes\n", check=False, **settings)
        if tried.returncode == 0:
            return path
    pytest.skip(f"no docker client here builds with BuildKit: {tried.stderr.strip().splitlines()[0]}")


@pytest.fixture
def account():
    """USER as an account of this machine, for sudo."""
    subprocess.run(["useradd", "--uid", str(USER), "--user-group", "--create-home", "container-tester"], check=True)
    yield "container-tester"
    subprocess.run(["userdel", "--remove", "container-tester"], check=True, stderr=subprocess.DEVNULL)


@pytest.fixture
def kept_image(engine, image):
    """For tests that put another image under the tag: gives the tag back."""
    engine.docker("tag", IMAGE, "kept:image")
    yield
    engine.clean()
    engine.docker("tag", "kept:image", IMAGE)
