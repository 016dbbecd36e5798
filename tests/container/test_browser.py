"""Jupyter Lab in a real headless Chromium: log in, open a notebook, run all of it, read the table."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request

import nbformat
import pytest
from container_kit import REPO, USER, make_checkout

NOTEBOOK = "notebooks/base_model_performance.ipynb"
# Tall: Lab keeps only the cells in view in the page.
CHROMIUM = [
    "--headless", "--no-sandbox", "--window-size=1300,3600", "--no-first-run", "--disable-gpu", "--disable-quic",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
# Few rows and a tiny model: these tests are about the browser, and the notebook's figures have tests of their own.
FEW_ROWS = {"FINETUNE_TEST_ROWS": "8", "FINETUNE_GENERATION_ROWS": "2"}
METRICS = r"scoring, all test rows\s+8\s+\d+\.\d%"
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
        options = {"args": [*CHROMIUM, f"--user-data-dir={profile}"]}
        capabilities = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        try:
            until(lambda: self.send("GET", "/status")["ready"], 20, "chromedriver is ready")
            self.session = "/session/" + self.send("POST", "/session", capabilities)["sessionId"]
        except (OSError, AssertionError) as error:
            self.driver.kill()
            self.driver.wait()
            pytest.skip(f"Chromium cannot start here: {reason(error)}")

    def send(self, method, path, body=None):
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.root + self.session + path, data, method=method)
        return json.load(urllib.request.urlopen(request, timeout=120))["value"]

    def open(self, url):
        self.send("POST", "/url", {"url": url})

    def leave(self, css):
        """Click, and wait until another page has taken this one's place: its elements could still be found before."""
        self.script("window.left = true")
        self.click(css)
        arrived = "return !window.left && document.readyState == 'complete'"
        until(lambda: self.script(arrived), 60, f"another page after {css}")

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


def reason(error):
    """The first line of what WebDriver says about an HTTP error; otherwise the error itself."""
    if isinstance(error, urllib.error.HTTPError):
        return json.load(error)["value"]["message"].splitlines()[0]
    return str(error)


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
        browser.leave("#login_submit")
    browser.find("#jp-MainLogo")
    assert browser.script("return location.pathname").startswith("/lab")


def open_notebook(browser, base, notebook):
    """Open the notebook, and wait for its kernel."""
    browser.open(f"{base}/lab/tree/{notebook}")
    browser.find(".jp-Notebook .jp-CodeCell")
    kernel = "return document.querySelector('.jp-Toolbar-kernelName')?.innerText.includes('Python 3')"
    until(lambda: browser.script(kernel), 60, "a kernel has been chosen")
    browser.find('.jp-Notebook-ExecutionIndicator[data-status="idle"]')


def run_all(browser, seconds, picture):
    """Run > Run All Cells, wait until no cell is waiting; return all text of the outputs."""
    # Lumino opens its menus on mousedown, which WebDriver's click includes.
    items = "[...document.querySelectorAll('.lm-MenuBar-item')]"
    browser.script(f"{items}.find(item => item.innerText.trim() == 'Run').id = 'run-menu'")
    # A second run must not be taken for finished by the numbers of the first.
    before = last_execution(browser)
    browser.click("#run-menu")
    browser.click('li[data-command="runmenu:run-all"]')
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
    done = rf"return {prompts}.every(prompt => Number(/\[(\d+)\]/.exec(prompt.innerText)?.[1]) > {before})"
    try:
        until(lambda: browser.script(done) or (not before and traceback(browser)), seconds, "all cells have run")
        browser.find('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    finally:
        browser.screenshot(picture)
    outputs = "[...document.querySelectorAll('.jp-OutputArea-output')]"
    return browser.script(rf"return {outputs}.map(output => output.innerText).join('\n')")


def last_execution(browser):
    """The highest number of a cell that has run; 0 where none has."""
    numbers = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.innerText)"
    return browser.script(rf"return Math.max(0, ...{numbers}.map(text => Number(/\[(\d+)\]/.exec(text)?.[1] ?? 0)))")


def traceback(browser):
    """The first traceback in the page, if there is one. Lab shows an error as stderr does, where warnings go too."""
    errors = "[...document.querySelectorAll('[data-mime-type=\"application/vnd.jupyter.stderr\"]')]"
    return browser.script(f"return {errors}.map(output => output.innerText).find(text => text.includes('Traceback'))")


@pytest.fixture
def lab(tmp_path, tiny_model):
    """`make lab` in a copy of the notebooks, because Lab saves what it runs; results go there too."""
    if not (REPO / ".venv/.ready").exists():
        pytest.skip("`make setup` has not been run here")
    shutil.copy(REPO / "Makefile", tmp_path)
    shutil.copytree(REPO / "notebooks", tmp_path / "notebooks")
    places = dict.fromkeys(("FINETUNE_HOME", "JUPYTER_CONFIG_DIR", "HOME"), str(tmp_path))
    ready = REPO / ".venv/.ready"
    log = tmp_path / "lab.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["make", f"VENV={REPO}/.venv", "-o", str(ready), "lab"],
            cwd=tmp_path,
            env={**os.environ, **FEW_ROWS, **places, "FINETUNE_MODEL": str(tiny_model)},
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
    """Run All, then again after an edit that no plan accepts. The cells below go on, as a kernel's abort may come too
    late; they must find nothing of the first run."""
    notebook = nbformat.read(tmp_path / NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.metadata.tags = ["raises-exception"]
    nbformat.write(notebook, tmp_path / NOTEBOOK)

    log_in(browser, *lab)
    open_notebook(browser, lab[0], NOTEBOOK)
    text = run_all(browser, 240, tmp_path / "make-lab.png")
    assert traceback(browser) is None
    assert re.search(METRICS, text)
    (record,) = tmp_path.glob("results/*/base/record.json")
    written = record.read_bytes(), record.stat().st_mtime_ns

    browser.type(".jp-CodeCell .cm-content", "\ue009\ue010\ue000\nOVERRIDES = {'no_such_parameter': 1}")
    text = run_all(browser, 60, tmp_path / "failed-plan.png")
    assert "no_such_parameter" in text
    assert "NameError" in text
    assert (record.read_bytes(), record.stat().st_mtime_ns) == written


@pytest.fixture
def real_project(workdir, tiny_model, kept_image, engine):
    """A checkout of the real packages and notebooks, and an image in which this environment's libraries are found.

    The libraries are mounted, not copied: torch alone is larger than the stand-in. They go before the stand-in's.
    """
    root = make_checkout(workdir / "real project")
    for name in ("data_prep", "finetune", "benchmarks", "notebooks"):
        shutil.rmtree(root / name)
        shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "datasets").mkdir()
    shutil.copytree(tiny_model, root / "checkpoints/tiny")
    subprocess.run(["chown", "-R", f"{USER}:{USER}", root], check=True)
    libraries = root / "libraries"
    libraries.mkdir()
    subprocess.run(["mount", "--bind", sysconfig.get_path("purelib"), libraries], check=True)
    settings = " ".join(f"{name}={value}" for name, value in FEW_ROWS.items())
    settings += " FINETUNE_MODEL=/workspace/checkpoints/tiny"
    engine.derive(
        f"ENV PYTHONPATH=/workspace/libraries {settings}\nUSER root\n"
        # Empty modules, which the real torch takes for the real packages.
        "RUN rm -r /usr/local/lib/python3*/site-packages/{triton,torchvision,torchao}*\n"
        f"USER {USER}"
    )
    yield root
    engine.clean()
    subprocess.run(["umount", libraries], check=True)
    shutil.rmtree(root)


def test_the_container_in_a_browser(browser, script, real_project, tmp_path):
    """The project's own notebook in the container: only NVIDIA's image and the GPU are stood in for."""
    started = script("start", root=real_project)
    assert started.returncode == 0, started.stderr
    base, token = re.search(r"(http://127\.0\.0\.1:\d+)/lab\?token=(\w+)", started.stdout).groups()
    log_in(browser, base, token)
    open_notebook(browser, base, NOTEBOOK)
    text = run_all(browser, 240, tmp_path / "container.png")
    assert traceback(browser) is None
    assert re.search(METRICS, text)
    # Another model than the profile's has folders of its own.
    [record] = real_project.glob("results/cpu+tiny*/base/record.json")
    assert record.stat().st_uid == USER
    assert f"/workspace/{record.relative_to(real_project)}" in text
    assert script("stop", root=real_project).returncode == 0
