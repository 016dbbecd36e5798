"""Executes notebooks, each in a kernel of its own.

On a CPU the kernels are forked from one process that has imported the libraries: torch, transformers, trl and peft take
12 s to import on two cores, which eight notebooks would pay eight times. Where CUDA is, kernels start afresh: Unsloth
has to be imported before transformers, and a process that has touched CUDA cannot be forked.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from traitlets.config import Config

from data_prep.files import write_json
from finetune import machine

SECONDS_BETWEEN_INTERRUPTS = 10
# What notebooks and kernels import, with all that it imports.
IMPORTED = (
    "finetune.train.save",
    "finetune.evaluate.run",
    "finetune.evaluate.baselines",
    "finetune.compare.plots",
    "finetune.compare.report",
    "ipykernel.ipkernel",
    "ipykernel.kernelapp",
)
KERNEL = "finetune"
# Linux' limit for the path of a socket.
LONGEST_SOCKET = 107
# Runs as the kernel's process: asks the server for a fork, passes signals on to it, and ends when it does.
PROXY = """\
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
request = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
socket.send_fds(server, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
kernel = int(server.makefile().readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(kernel, number))
server.recv(1)
"""


class Kernels:
    """Executes notebooks one after the other, with a thread for the one that runs; a context manager."""

    def __enter__(self) -> Kernels:
        # Sockets lie in it, and TMPDIR may be too long for their paths.
        short = len(tempfile.gettempdir()) + len("/finetune-12345678/kernel-12345678/socket-1") <= LONGEST_SOCKET
        self._scratch = tempfile.TemporaryDirectory(prefix="finetune-", dir=None if short else "/tmp")
        scratch = Path(self._scratch.name)
        self._server = self._serve(scratch) if sys.platform == "linux" and not machine.has_cuda() else None
        # -S -E: the proxy needs no packages, and starts in a fiftieth of a second.
        proxy = ["-S", "-E", str(scratch / "proxy.py"), str(scratch / "server")]
        start = proxy if self._server else ["-m", "ipykernel_launcher"]
        # Not Jupyter's own `python3`: a user's may be of another Python.
        command = [sys.executable, *start, "-f", "{connection_file}"]
        specification = {"argv": command, "display_name": "Python 3", "language": "python"}
        write_json(scratch / "kernels" / KERNEL / "kernel.json", specification)
        return self

    def __exit__(self, *_) -> None:
        if self._server:
            self._server.stdin.close()
            self._server.wait()
        self._scratch.cleanup()

    def execute(
        self,
        notebook: NotebookNode,
        folder: Path,
        on_cell_start: Callable[[int], None],
        on_cell_executed: Callable[[], None],
        every_second: Callable[[], None],
    ) -> None:
        """Execute a notebook in place; its kernel has ended when this returns.

        Ctrl-C interrupts the cell that runs, ends the kernel and goes up.

        Args:
            notebook: Gets the outputs.
            folder: The kernel's working folder.
            on_cell_start: Called with the number of each cell, from 0.
            on_cell_executed: Called after each cell of code.
            every_second: Called meanwhile.

        Raises:
            CellExecutionError: A cell failed.
            DeadKernelError: The kernel died, or did not start.
        """
        client = NotebookClient(
            notebook,
            timeout=None,
            # Ten seconds on an idle machine; minutes on one that swaps.
            startup_timeout=300,
            kernel_name=KERNEL,
            resources={"metadata": {"path": str(folder)}},
            config=self._config(),
            on_cell_start=lambda cell, cell_index: on_cell_start(cell_index),
            on_cell_executed=lambda **_: on_cell_executed(),
        )
        # The default one is made without the configuration.
        client.create_kernel_manager()
        client.km.kernel_spec_manager = KernelSpecManager(kernel_dirs=[str(Path(self._scratch.name, "kernels"))])
        errors: list[BaseException] = []
        # Not Thread.join: interrupted, it takes a thread that runs for one that has ended (CPython 3.11, bpo-45274).
        ended = threading.Event()

        def run() -> None:
            try:
                client.execute(env=dict(os.environ))
            except BaseException as error:  # re-raised below, in the thread that waits
                errors.append(error)
            ended.set()

        # In the main thread nbclient 0.11 takes SIGINT for itself, shuts the kernel down twice and ends in an
        # AssertionError.
        threading.Thread(target=run).start()
        try:
            while not ended.wait(1):
                every_second()
        except KeyboardInterrupt:
            # Again and again: one gets lost in a kernel that has not begun with its cell, or in a library that swallows
            # it while it is imported.
            while not ended.is_set():
                # A kernel that has just ended has no manager, or none that can reach it; it needs no interrupt.
                with contextlib.suppress(RuntimeError, AttributeError):
                    run_sync(client.km.interrupt_kernel)()
                ended.wait(SECONDS_BETWEEN_INTERRUPTS)
            raise
        finally:
            # nbclient 0.11 leaves it behind where a kernel did not start: the process would end in a traceback.
            atexit.unregister(client._cleanup_kernel)
        for error in errors:
            # nbclient's own word for a dead kernel covers only what happens after the start.
            raise DeadKernelError(str(error)) if type(error) is RuntimeError else error

    def _config(self) -> Config:
        """Files to talk to the kernel through: ports are chosen free and taken later, when another process may have."""
        folder = tempfile.mkdtemp(prefix="kernel-", dir=self._scratch.name)
        return Config({"KernelManager": {"transport": "ipc", "ip": str(Path(folder, "socket"))}})

    def _serve(self, scratch: Path) -> subprocess.Popen:
        """Start the process that kernels are forked from."""
        (scratch / "proxy.py").write_text(PROXY)
        # It listens before it imports, so that a kernel that is asked for meanwhile waits.
        server = subprocess.Popen(
            [sys.executable, "-m", "finetune.kernels", str(scratch / "server")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for the kernel alone.
            start_new_session=True,
        )
        server.stdout.readline()
        return server


def serve(address: str) -> None:
    """Fork a kernel for each that asks at `address`, until standard input ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("listening", flush=True)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    # ipykernel reads it when it is imported, and ends a kernel whose parent is another.
    os.environ["JPY_PARENT_PID"] = str(os.getpid())
    for name in IMPORTED:
        importlib.import_module(name)
    # A kernel's garbage collector passes over what was imported: 0.7 s a pass, and copies of pages that are shared.
    gc.freeze()
    # Nobody waits for kernels: their proxies see the connection end.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    waiting = selectors.DefaultSelector()
    for source in (listener, sys.stdin):
        waiting.register(source, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in waiting.select()}
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        while not message.endswith(b"\n"):
            message += connection.recv(1 << 20)
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork beside threads: here the idle ones of OpenBLAS and Arrow, which both libraries
            # prepare for it.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            kernel = os.fork()
        if kernel == 0:
            _become_kernel(connection, json.loads(message), descriptors, listener)
        connection.sendall(f"{kernel}\n".encode())
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)


def _become_kernel(connection: socket.socket, request: dict, descriptors: list[int], listener: socket.socket) -> None:
    """The forked process, as if it had been started with the proxy's arguments, folder, environment and streams."""
    os.setsid()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    own = {name: os.environ[name] for name in ("JPY_PARENT_PID", "MPLBACKEND")}
    os.environ.clear()
    os.environ.update(request["environment"] | own)
    sys.path[0] = ""

    def end_with_proxy() -> None:
        connection.recv(1)
        os._exit(1)

    threading.Thread(target=end_with_proxy, daemon=True).start()
    # pandas counts columns otherwise in a terminal, which this was when it was imported.
    pandas.set_option("display.max_columns", 20)
    from ipykernel.kernelapp import launch_new_instance

    try:
        launch_new_instance(argv=request["arguments"])
    finally:
        os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
