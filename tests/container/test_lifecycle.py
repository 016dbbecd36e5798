"""A container's life, in order: build, start, second start, status, run, loss of the GPU, kill -9, stop.

The tests of this file follow each other on one container, and stop at the first that fails.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import websocket
from container_kit import BASE, CONTAINER, IMAGE, USER, run_bounded

pytestmark = pytest.mark.usefixtures("image", "in_order")
failed = []


@pytest.fixture
def in_order(request):
    if failed:
        pytest.skip(f"needs {failed[0]}, which failed")
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        failed.append(request.node.name)


def token(checkout):
    return re.search(r"^JUPYTER_TOKEN=(\w+)$", (checkout / ".env").read_text(), re.M)[1]


def http_status(url, token=None):
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"} if token else {})
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def test_start(script, engine, checkout, home, port):
    # A .env that was edited on Windows. ~ is the user's home.
    env = checkout / ".env"
    text = env.read_text() if env.exists() else ""
    env.write_text(f"\ufeffexport HF_CACHE = ~/models   # ours\r\n{text}")
    os.chown(env, USER, USER)
    begun = time.time()
    started = script("start", "finetune")
    assert started.returncode == 0, started.stderr
    assert time.time() - begun < 20, "promised: under 10 s on a machine that has nothing else to do"
    assert f"http://127.0.0.1:{port}/lab?token={token(checkout)}" in started.stdout
    assert f"ssh -N -L {port}:127.0.0.1:{port}" in started.stdout
    assert f"{checkout} -> /workspace" in started.stdout
    assert f"{home}/models -> /home/trainer/.cache/huggingface" in started.stdout
    assert f"{home}/models" in engine.inspect("{{json .Mounts}}")
    assert "GiB available of" in started.stdout
    assert "\x1b" not in started.stdout + started.stderr


def test_the_file_asks_for_what_training_needs(engine):
    assert engine.inspect("{{.Name}}") == f"/{CONTAINER}"
    assert engine.inspect("{{.Config.Image}}") == IMAGE
    gpu = json.loads(engine.inspect("{{json .HostConfig.DeviceRequests}}"))[0]
    assert (gpu["Driver"], gpu["Count"], gpu["Capabilities"]) == ("nvidia", -1, [["gpu"]])
    assert "prestart" in engine.hook_log.read_text()
    limits = {limit["Name"]: limit["Hard"] for limit in json.loads(engine.inspect("{{json .HostConfig.Ulimits}}"))}
    assert limits == {"memlock": -1, "stack": 67108864}
    assert engine.inspect("{{.HostConfig.IpcMode}} {{.HostConfig.Init}}") == "host true"
    assert engine.inspect("{{.HostConfig.CapDrop}}") == "[ALL]"
    assert "no-new-privileges:true" in engine.inspect("{{.HostConfig.SecurityOpt}}")
    assert engine.inspect("{{.HostConfig.LogConfig}}") == "{json-file map[max-file:3 max-size:10m]}"


def test_who_gets_in(port, checkout):
    base = f"http://127.0.0.1:{port}"
    assert http_status(f"{base}/api") == 200
    assert http_status(f"{base}/api/contents") == 403
    assert http_status(f"{base}/api/contents", "wrong") == 403
    assert http_status(f"{base}/api/contents", token(checkout)) == 200


def test_nothing_listens_elsewhere(engine, port):
    bindings = json.loads(engine.inspect("{{json .NetworkSettings.Ports}}"))
    assert bindings["8888/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": str(port)}]
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    for address in addresses:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as other:
            other.settimeout(2)
            assert other.connect_ex((address, port)) != 0, f"{address}:{port} answers"


def test_the_token_stays_private(engine, checkout, image):
    secret = token(checkout)
    status = (checkout / ".env").stat()
    assert (status.st_mode & 0o777, status.st_uid) == (0o600, USER)
    logs = engine.docker("logs", CONTAINER)
    processes = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True).stdout
    history = engine.docker("history", "--no-trunc", IMAGE).stdout
    for text in (logs.stdout, logs.stderr, processes, history, image, engine.inspect("{{json .}}", IMAGE)):
        assert secret not in text


def test_files_on_the_mount_are_the_users(script, checkout):
    made = script("exec", "bash", "-c", "id -u; touch /workspace/results/made-inside; touch ~/.cache/huggingface/x")
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == str(USER)
    assert (checkout / "results/made-inside").stat().st_uid == USER


def test_an_edit_on_the_host_is_live(script, checkout):
    (checkout / "data_prep/__init__.py").write_text("ANSWER = 42\n")
    seen = script("exec", "python", "-P", "-c", "import data_prep; print(data_prep.ANSWER, data_prep.__file__)")
    assert seen.stdout.split() == ["42", "/workspace/data_prep/__init__.py"], seen.stderr


def test_starting_twice_is_harmless(script, engine, checkout):
    before = engine.inspect("{{.Id}} {{.State.StartedAt}}"), token(checkout)
    again = script("start", "finetune")
    assert again.returncode == 0, again.stderr
    assert "already running" in again.stdout
    assert (engine.inspect("{{.Id}} {{.State.StartedAt}}"), token(checkout)) == before


def test_status_of_a_running_container(script, checkout, port):
    status = script("status")
    assert status.returncode == 0
    assert re.search(r"container +pytorch-finetune: running \(Up .*\(healthy\)\)", status.stdout)
    assert f"/lab?token={token(checkout)}" in status.stdout
    assert re.search(r"GPU +37 % busy", status.stdout)
    data = json.loads(script("status", "--json").stdout)
    assert data["running"] is True and data["health"] == "healthy"
    assert data["gpu_percent"] == 37 and data["mem_available_gib"] > 0 and data["activity"] == []
    assert token(checkout) not in json.dumps(data)


def test_run_and_its_progress(script, checkout):
    ran = script("run", "--only", "lora")
    assert ran.returncode == 0, ran.stderr
    assert "suite: run --profile spark --only lora" in ran.stdout
    assert "spark-lora: step 120 of 1965, 2 h 13 min left" in script("status").stdout
    activity = json.loads(script("status", "--json").stdout)["activity"]
    assert activity[0]["run"] == "spark-lora" and activity[0]["seconds_left"] == 8000

    progress = checkout / "checkpoints/.training/spark-lora/progress.json"
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "updated": time.time() - 7300}))
    assert "spark-lora: no sign of life for 2 h 1 min, at step 120 of 1965" in script("status").stdout
    progress.unlink()
    assert "spark-lora" not in script("status").stdout


def test_a_busy_notebook_shows(script, checkout, port):
    api = f"127.0.0.1:{port}/api"
    headers = {"Authorization": f"token {token(checkout)}", "Content-Type": "application/json"}
    body = {"path": "notebooks/fine_tuning_lora.ipynb", "name": "x", "type": "notebook", "kernel": {"name": "python3"}}
    request = urllib.request.Request(f"http://{api}/sessions", json.dumps(body).encode(), headers)
    session = json.load(urllib.request.urlopen(request, timeout=30))
    channel = websocket.create_connection(
        f"ws://{api}/kernels/{session['kernel']['id']}/channels",
        timeout=30,
        header={"Authorization": headers["Authorization"]},
    )
    header = {"msg_id": "1", "msg_type": "execute_request", "session": "1", "username": "", "version": "5.3"}
    content = {"code": "print(1); import time; time.sleep(600)", "silent": False}
    request = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content}
    channel.send(json.dumps(request))
    while json.loads(channel.recv())["header"]["msg_type"] != "stream":
        pass
    assert re.search(r"notebook +notebooks/fine_tuning_lora.ipynb is executing", script("status").stdout)
    channel.close()
    request = urllib.request.Request(f"http://{api}/sessions/{session['id']}", headers=headers, method="DELETE")
    assert urllib.request.urlopen(request, timeout=30).status == 204
    assert "executing" not in script("status").stdout


def test_logs(script):
    logs = script("logs", "finetune")
    assert logs.returncode == 0 and "Jupyter Server" in logs.stdout
    assert script("logs").stdout.count("Jupyter Server") >= 1


def test_a_terminal_gets_colours_and_a_terminal_inside(script):
    assert "\x1b[1m" in script("status", terminal=True).stdout
    assert "/dev/pts" in script("exec", "readlink", "/proc/self/fd/0", terminal=True).stdout
    assert "/dev/pts" not in script("exec", "readlink", "/proc/self/fd/0").stdout


def test_another_users_home_is_not_used(script, checkout):
    # What `sudo -u nobody` leaves behind on some systems: the caller's HOME.
    status = script("status", user=65534, groups=[USER], HOME="/root")
    assert status.returncode == 0, status.stderr


def test_a_lost_gpu_gets_a_new_container(script, engine):
    before = engine.inspect("{{.Id}}")
    script("exec", "touch", "/tmp/gpu-is-lost")
    assert "not visible in the container" in script("status").stdout
    again = script("start")
    assert again.returncode == 0, again.stderr
    assert "has lost its GPU" in again.stdout
    assert engine.inspect("{{.Id}}") != before


def test_killed_server_comes_back_and_restart_works(script, engine, port, checkout):
    for line in engine.docker("top", CONTAINER, "-o", "pid,args").stdout.splitlines():
        if "jupyterlab" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    for _ in range(60):
        if engine.inspect("{{.RestartCount}} {{.State.Health.Status}}") == "1 healthy":
            break
        time.sleep(0.5)
    assert http_status(f"http://127.0.0.1:{port}/api/contents", token(checkout)) == 200
    again = script("restart")
    assert again.returncode == 0, again.stderr
    assert engine.inspect("{{.RestartCount}} {{.State.Health.Status}}") == "0 healthy"


def test_stop(script, engine, checkout):
    begun = time.time()
    assert script("stop").returncode == 0
    assert time.time() - begun < 10
    assert engine.docker("ps", "-aq").stdout == ""
    assert (checkout / "results/made-inside").exists()
    assert script("stop").returncode == 0
    status = script("status")
    assert status.returncode == 3 and "none: ./start_docker.sh start finetune" in status.stdout
    assert json.loads(script("status", "--json").stdout)["running"] is False
    assert script("exec", "true").returncode == 3


def test_under_sudo_u(engine, checkout, port, account):
    """Real sudo, as an administrator's script or timer calls it; it hands on only what it is told to."""
    if not shutil.which("sudo"):
        pytest.skip("not installed: sudo (apt-get install sudo)")
    settings = {"DOCKER_HOST": engine.host, "DOCKER_CONFIG": engine.plugins, "JUPYTER_PORT": port, "MIN_FREE_GIB": 1}
    words = [*(f"{name}={value}" for name, value in settings.items()), checkout / "start_docker.sh"]

    def under_sudo(*command):
        return run_bounded(["sudo", "-u", account, *words, *command], cwd="/")

    started = under_sudo("start")
    assert started.returncode == 0, started.stderr
    assert f"/home/{account}/models -> /home/trainer/.cache/huggingface" in started.stdout
    made = under_sudo("exec", "bash", "-c", "id -u; touch /workspace/results/under-sudo")
    assert made.stdout.strip() == str(USER), made.stderr
    assert (checkout / "results/under-sudo").stat().st_uid == USER
    assert under_sudo("status", "--json").returncode == 0
    assert under_sudo("stop").returncode == 0
    as_root = run_bounded(["sudo", *words, "start"])
    assert as_root.returncode == 15 and "running as root" in as_root.stderr


def test_tensorboard(script, port):
    started = script("start", "tensorboard", TENSORBOARD_PORT=str(port + 1))
    assert started.returncode == 0, started.stderr
    assert http_status(f"http://127.0.0.1:{port + 1}/") == 200
    assert script("stop").returncode == 0


def test_serve(script, engine, checkout, port):
    """vLLM itself is stood in for: what is shown is that the file starts it, with these arguments, on this port."""
    server = r"#!/bin/bash\necho asked: $*\ncd /tmp && echo ok >health && exec python -m http.server 8000"
    server = f"printf '{server}' >/usr/local/bin/vllm && chmod +x /usr/local/bin/vllm"
    engine.derive(f"RUN {server}", tag="vllm:stand-in", base=BASE)
    adapter = checkout / "adapters/lora"
    adapter.mkdir()
    config = {"base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "r": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=1))
    # A relative folder starts at the checkout.
    settings = {"VLLM_IMAGE": "vllm:stand-in", "SERVE_PORT": str(port + 2), "HF_CACHE": "cache/hub"}
    started = script("start", "serve", **settings)
    assert started.returncode == 0, started.stderr
    assert f"http://127.0.0.1:{port + 2}/v1" in started.stdout
    asked = "asked: serve Qwen/Qwen2.5-7B-Instruct --enable-lora --max-lora-rank 16"
    asked += " --lora-modules tuned=/workspace/adapters/lora --host 0.0.0.0 --port 8000"
    assert asked in script("logs", "serve").stdout
    assert engine.inspect("{{.HostConfig.DeviceRequests}}", "pytorch-serve") != "[]"
    assert f"{checkout}/cache/hub" in engine.inspect("{{json .Mounts}}", "pytorch-serve")
    assert (checkout / "cache/hub").stat().st_uid == USER
    assert script("stop").returncode == 0

    merged = checkout / "checkpoints/merged"
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    assert script("start", "serve", "checkpoints/merged/", **settings).returncode == 0
    assert "asked: serve /workspace/checkpoints/merged --served-model-name tuned" in script("logs", "serve").stdout
    assert script("stop").returncode == 0
