"""Jupyter Lab in a real headless Chromium: log in, open a notebook, run all of it, read the table."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request

import pytest
from container_kit import REPO, USER

NOTEBOOK = "notebooks/base_model_performance.ipynb"
CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1300,3600",  # tall: Lab keeps only the cells in view in the page
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how WebDriver names an element


class Browser:
    """The few WebDriver commands that are needed, so that no client library is."""

    def __init__(self, profile):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.root = f"http://127.0.0.1:{probe.getsockname()[1]}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.driver = subprocess.Popen(["chromedriver", f"--port={self.root.rsplit(':', 1)[1]}"], **quiet)
        self.session = ""
        until(lambda: self.send("GET", "/status")["ready"], 20, "chromedriver is ready")
        options = {"args": [*CHROMIUM, f"--user-data-dir={profile}"]}
        capabilities = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.session = "/session/" + self.send("POST", "/session", capabilities)["sessionId"]

    def send(self, method, path, body=None):
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.root + self.session + path, data, method=method)
        return json.load(urllib.request.urlopen(request, timeout=120))["value"]

    def open(self, url):
        self.send("POST", "/url", {"url": url})

    def find(self, css, seconds=60):
        """Wait for the elements that match."""
        query = {"using": "css selector", "value": css}
        return until(lambda: [found[ELEMENT] for found in self.send("POST", "/elements", query)], seconds, css)

    def click(self, css):
        self.send("POST", f"/element/{self.find(css)[0]}/click")

    def type(self, css, text):
        self.send("POST", f"/element/{self.find(css)[0]}/value", {"text": text})

    def script(self, code):
        return self.send("POST", "/execute/sync", {"script": code, "args": []})

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.send("GET", "/screenshot")))

    def close(self):
        self.send("DELETE", "")
        self.driver.terminate()
        self.driver.wait()


def until(ask, seconds, what):
    deadline = time.time() + seconds
    while time.time() < deadline:
        try:
            answer = ask()
        except OSError:  # not up yet
            answer = None
        if answer:
            return answer
        time.sleep(0.3)
    raise AssertionError(f"after {seconds} s still not: {what}")


@pytest.fixture
def browser(tmp_path):
    missing = [program for program in ("chromium", "chromedriver") if not shutil.which(program)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install chromium chromium-driver)")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def log_in(browser, base, token):
    """Refused without the token, and with a wrong one; in with the right one."""
    browser.open(f"{base}/lab")
    for word in ("", "wrong", token):
        assert "/login" in browser.script("return location.pathname")
        browser.type("#password_input", word)
        browser.click("#login_submit")
    browser.find("#jp-MainLogo")
    assert browser.script("return location.pathname").startswith("/lab")


def run_all(browser, base, notebook, seconds, picture):
    """Open the notebook, Run > Run All Cells, wait until no cell is waiting; return all text of the outputs."""
    browser.open(f"{base}/lab/tree/{notebook}")
    browser.find(".jp-Notebook .jp-CodeCell")
    kernel = "return document.querySelector('.jp-Toolbar-kernelName')?.innerText.includes('Python 3')"
    until(lambda: browser.script(kernel), 60, "a kernel has been chosen")
    browser.find('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    # Lumino opens its menus on mousedown, which WebDriver's click includes.
    items = "[...document.querySelectorAll('.lm-MenuBar-item')]"
    browser.script(f"{items}.find(item => item.innerText.trim() == 'Run').id = 'run-menu'")
    browser.click("#run-menu")
    browser.click('li[data-command="runmenu:run-all"]')
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
    done = rf"return {prompts}.every(prompt => /\[\d+\]/.test(prompt.innerText))"
    failed = "return document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')?.innerText"
    until(lambda: browser.script(done) or browser.script(failed), seconds, f"{notebook} has run")
    browser.find('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    browser.screenshot(picture)
    assert browser.script(failed) is None
    outputs = "[...document.querySelectorAll('.jp-OutputArea-output')]"
    return browser.script(rf"return {outputs}.map(output => output.innerText).join('\n')")


@pytest.fixture
def lab(tmp_path):
    """`make lab` in a copy of the notebooks, because Lab saves what it runs; results go there too."""
    if not (REPO / ".venv/.ready").exists():
        pytest.skip("`make setup` has not been run here")
    shutil.copy(REPO / "Makefile", tmp_path)
    (tmp_path / "notebooks").mkdir()
    for notebook in (REPO / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, tmp_path / "notebooks")
    # Few rows: this test is about the browser, and the notebook's figures have tests of their own.
    few = {"FINETUNE_TEST_ROWS": "8", "FINETUNE_GENERATION_ROWS": "2"}
    places = dict.fromkeys(("FINETUNE_HOME", "JUPYTER_CONFIG_DIR", "HOME"), str(tmp_path))
    model = REPO / "checkpoints/SmolLM2-135M-Instruct"
    if model.exists():  # fetched and converted before
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / model.name).symlink_to(model)
    if os.geteuid() == 0:
        # As root, Jupyter wants --allow-root, which `make lab` rightly does not give.
        (tmp_path / "jupyter_server_config.py").write_text("c.ServerApp.allow_root = True\n")
    ready = REPO / ".venv/.ready"
    log = tmp_path / "lab.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["make", f"VENV={REPO}/.venv", "-o", str(ready), "lab"],
            cwd=tmp_path,
            env={**os.environ, **few, **places},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    printed = r"(http://127\.0\.0\.1:\d+)/lab\?token=(\w+)"
    address = until(lambda: re.search(printed, log.read_text()), 60, "make lab prints its address")
    yield address.group(1, 2)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)


def test_make_lab_in_a_browser(browser, lab, tmp_path):
    base, token = lab
    log_in(browser, base, token)
    text = run_all(browser, base, NOTEBOOK, 240, tmp_path / "base_model_performance.png")
    assert re.search(r"accuracy", text, re.I) and "%" in text
    assert list(tmp_path.glob("results/*/base/record.json"))


def test_the_container_in_a_browser(browser, script, image, checkout, port, tmp_path):
    """The stand-in image has no torch, so this notebook is a small one: it shows Lab, its kernel and the mount."""
    source = "import getpass, data_prep\nprint('accuracy 62.5 % for', getpass.getuser(), 'from', data_prep.__file__)"
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    notebook = checkout / "notebooks/small.ipynb"
    notebook.write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    os.chown(notebook, USER, USER)
    started = script("start")
    assert started.returncode == 0, started.stderr
    base, token = re.search(r"(http://127\.0\.0\.1:\d+)/lab\?token=(\w+)", started.stdout).groups()
    log_in(browser, base, token)
    text = run_all(browser, base, "notebooks/small.ipynb", 60, tmp_path / "container.png")
    assert "accuracy 62.5 % for trainer from /workspace/data_prep/__init__.py" in text
    assert script("stop").returncode == 0
