"""Notebooks executed in kernels of their own: several at once, each on one GPU, and interruptible."""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from traitlets.config import Config

from finetune import hardware, turns


class Kernels:
    """Executes notebooks, up to `jobs` at once, each in a thread of the caller's.

    With several jobs each kernel sees one GPU, the one with the fewest of them, and takes turns with those that share
    it. With one it sees what this process does.
    """

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.gpus = hardware.visible_gpus() if jobs > 1 else ()
        self._notebooks = Counter(dict.fromkeys(self.gpus or ("CPU",), 0))
        self._lock = threading.Lock()
        self._clients: set[NotebookClient] = set()
        self._interrupted = threading.Event()

    def __enter__(self) -> Kernels:
        self._scratch = tempfile.TemporaryDirectory(prefix="finetune-jobs-")
        return self

    def __exit__(self, *_) -> None:
        self._scratch.cleanup()

    def __str__(self) -> str:
        """How many at once and where, with the reason."""
        if not self.gpus:
            return (
                f"Up to {self.jobs} steps at once on the CPU, for want of a GPU: they take turns while they are "
                "measured, but others import and load meanwhile, so take times from a run without --jobs"
            )
        where = f"GPU {self.gpus[0]}" if len(self.gpus) == 1 else f"the GPUs {', '.join(self.gpus)}"
        return (
            f"Up to {self.jobs} steps at once on {where}, all that are visible: each on the one that has the fewest; "
            "those that share one take turns while they are measured, and their models share its memory"
        )

    def execute(
        self,
        notebook: NotebookNode,
        folder: Path,
        on_cell_start: Callable[[int], None],
        on_cell_executed: Callable[[], None],
    ) -> None:
        """Execute a notebook in place; its kernel has ended when this returns.

        Args:
            notebook: Gets the outputs.
            folder: The kernel's working folder.
            on_cell_start: Called with the number of each cell, from 0.
            on_cell_executed: Called after each cell of code.

        Raises:
            CellExecutionError: A cell failed, or was interrupted.
            DeadKernelError: The kernel died, or did not start.
            Interrupted: `interrupt` was called between two cells.
        """

        def start(cell: NotebookNode, cell_index: int) -> None:
            if self._interrupted.is_set():
                raise Interrupted
            # Not before: a kernel that is starting would die of an interrupt, and show a traceback.
            self._clients.add(client)
            on_cell_start(cell_index)

        client = NotebookClient(
            notebook,
            timeout=None,
            # Ten seconds on an idle machine; minutes on one that swaps.
            startup_timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            config=self._sockets(),
            on_cell_start=start,
            on_cell_executed=lambda **_: on_cell_executed(),
        )
        with self._environment() as environment:
            try:
                client.execute(env=environment)
            except RuntimeError as error:
                # nbclient's own word for it covers only what happens after the start.
                raise DeadKernelError(str(error)) from error
            finally:
                self._clients.discard(client)
                # nbclient 0.11 leaves it behind where a kernel did not start: the process would end in a traceback.
                atexit.unregister(client._cleanup_kernel)

    def interrupt(self) -> None:
        """Interrupt the cells that run now, and let no notebook begin another."""
        self._interrupted.set()
        for client in tuple(self._clients):
            manager = client.km
            # A kernel that has just ended has no manager, or none that can reach it; it needs no interrupt.
            if manager is not None:
                with contextlib.suppress(RuntimeError):
                    run_sync(manager.interrupt_kernel)()

    def _sockets(self) -> Config:
        """Files to talk to one more kernel through. Ports are chosen free and taken later: of many kernels that start
        at once one finds its port taken, and dies."""
        folder = tempfile.mkdtemp(prefix="kernel-", dir=self._scratch.name)
        return Config({"KernelManager": {"transport": "ipc", "ip": str(Path(folder, "socket"))}})

    @contextlib.contextmanager
    def _environment(self) -> Iterator[dict[str, str]]:
        """The environment of one more kernel."""
        if self.jobs == 1:
            yield dict(os.environ)
            return
        scratch = Path(self._scratch.name)
        with self._device() as device:
            name = f"GPU {device.replace('/', '-')}" if self.gpus else device
            own: dict[str, Any] = {
                turns.VARIABLE: str(turns.folder() / name),
                # Unsloth checks what it wrote there, and gives up on the folder when another's settings wrote the same
                # files anew. It writes them at each start anyway: a folder of its own costs nothing.
                "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp(prefix="unsloth-", dir=scratch),
            }
            yield os.environ | own | (self._share_of_cores() | {"CUDA_VISIBLE_DEVICES": device} if self.gpus else {})

    def _share_of_cores(self) -> dict[str, str]:
        """Threads of one kernel among several: each takes all cores otherwise, and torch starts a compiler for every
        core when Unsloth imports it."""
        cores = str(max(1, (os.cpu_count() or 1) // self.jobs))
        return {"OMP_NUM_THREADS": cores, "TORCHINDUCTOR_COMPILE_THREADS": cores, "TORCH_WARM_POOL": "0"}

    @contextlib.contextmanager
    def _device(self) -> Iterator[str]:
        """The device with the fewest notebooks, which has one more while the block lasts."""
        with self._lock:
            device = min(self._notebooks, key=self._notebooks.__getitem__)
            self._notebooks[device] += 1
        try:
            yield device
        finally:
            with self._lock:
                self._notebooks[device] -= 1


class Interrupted(Exception):
    """A notebook was not executed to its end, because of `Kernels.interrupt`."""
