"""The machine: which accelerator, how much memory, and the snapshot of both that every record carries.

torch and pandas are imported where they are asked: a plan and the command line need neither, and both take long.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pynvml

from data_prep import UserError

# Bytes that training and scoring leave free. Where GPU and CPU share one memory, a machine without any freezes.
UNIFIED_FLOOR = 6e9
# On a CPU a share of the memory or of the control group's limit, and at most so many bytes.
FLOOR_SHARE, LARGEST_FLOOR = 0.05, 2e9
SECONDS_BETWEEN_READINGS = 0.25

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "unsloth",
    "unsloth_zoo",
    "liger-kernel",
    "torchao",
    "triton",
    "scikit-learn",
    "scipy",
    "statsmodels",
    "cleanlab",
    "numpy",
)


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if has_cuda() else "cpu"


def gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if has_cuda() else None


def usable_cores() -> int:
    """Physical cores that this process may use: its affinity and its control group's limit count."""
    import joblib

    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    topology = [Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in allowed]
    siblings = {path.read_text() for path in topology if path.is_file()}
    # joblib reads affinity and control group, but takes the two threads of a core for two.
    return max(1, min(joblib.cpu_count(), len(siblings) or psutil.cpu_count(logical=False) or 1))


def is_unified() -> bool:
    """Whether GPU and CPU share one memory, as on a DGX Spark."""
    import torch

    return has_cuda() and bool(torch.cuda.get_device_properties(0).is_integrated)


def total_memory_bytes() -> int:
    """Memory that a model can live in: the GPU's, or the machine's where there is no other."""
    import torch

    if has_cuda():
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


def available_memory_bytes() -> int:
    """Memory that is free for a model now: on unified memory and on a CPU, what is left above the floor."""
    import torch

    if has_cuda() and not is_unified():
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    return max(0, memory_left() - memory_floor())


def memory_left() -> int:
    """Bytes that the machine can give away, or that the control groups' limits leave, whichever is less.

    The kernel's MemAvailable is right on unified memory too, and CUDA's figure is not: it counts page cache, which the
    kernel gives back on demand, as used. Swap is left out: a training that swaps freezes the machine.
    """
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in control_groups())])


def memory_floor() -> int:
    """Bytes that training and scoring leave free; 0 where a GPU has a memory of its own, which may be used up.

    Raises:
        UserError: FINETUNE_MEMORY_FLOOR, which sets another floor in GB, is no number.
    """
    asked = os.environ.get("FINETUNE_MEMORY_FLOOR")
    if has_cuda() and not is_unified():
        return 0
    if asked:
        try:
            return round(float(asked) * 1e9)
        except ValueError:
            raise UserError(f"FINETUNE_MEMORY_FLOOR is '{asked}': set it to a number of GB, such as 6") from None
    if has_cuda():
        return round(UNIFIED_FLOOR)
    limit = min([psutil.virtual_memory().total, *(limit for limit, _ in control_groups())])
    return round(min(FLOOR_SHARE * limit, LARGEST_FLOOR))


def control_groups(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """The memory limits of the control groups that this process is in, each with the bytes in use, without page cache.

    Args:
        root: Where /proc and /sys are.
    """
    groups = root / "proc" / "self" / "cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        base, names, prefix = root / "sys" / "fs" / "cgroup", ("memory.max", "memory.current"), ""
        if controllers:
            base, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            prefix = "total_"
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            limit = group / names[0]
            if group.is_relative_to(base) and limit.is_file() and limit.read_text().strip() != "max":
                # The kernel gives page cache back on demand.
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cached = sum(int(statistics[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
                yield int(limit.read_text()), int((group / names[1]).read_text()) - cached


class MemoryWatch:
    """Reads again and again how much memory is left, in a thread of its own; a context manager.

    Nothing else ends a process in time: on a CPU the kernel kills it, and unified memory freezes the machine.
    """

    _floor, _lowest = 0, sys.maxsize

    def __enter__(self) -> MemoryWatch:
        self._floor, self._lowest, self._ended = memory_floor(), sys.maxsize, threading.Event()
        if self._floor:
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def _read(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_READINGS):
            self._lowest = min(self._lowest, memory_left())

    def shortage(self) -> str:
        """How little was left since this was last asked, if it was less than the floor; else empty."""
        if not self._floor:
            return ""
        lowest, self._lowest = min(self._lowest, memory_left()), sys.maxsize
        if lowest >= self._floor:
            return ""
        return f"{lowest / 1e9:.1f} GB of memory were left, and we keep {self._floor / 1e9:.1f} GB free"


def limit_gpu_memory() -> None:
    """On unified memory, have PyTorch raise OutOfMemoryError before the machine's memory is used up."""
    import torch

    if is_unified():
        room = torch.cuda.memory_reserved() + available_memory_bytes()
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total_memory_bytes()))


def wait_for_gpu() -> None:
    """Wait until the GPU has done all that it was asked to; returns at once where there is none."""
    import torch

    if has_cuda():
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    import torch

    if has_cuda():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> tuple[int, str]:
    """Peak memory in bytes and what was measured: CUDA allocations, or the whole process where there is no GPU."""
    import torch

    if has_cuda():
        return torch.cuda.max_memory_allocated(), "CUDA allocations"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return kilobytes * (1 if platform.system() == "Darwin" else 1024), "resident memory of the process"


def snapshot() -> dict[str, str | int | None]:
    """What a reader needs to know of the machine."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu_name(),
        "gpu_memory_bytes": total_memory_bytes() if has_cuda() else None,
        "cuda": torch.version.cuda if has_cuda() else None,
        "driver": _driver_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that a result depends on; None where one is not installed."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    """The GPU driver's; None without a GPU, or where NVML does not answer."""
    if not has_cuda():
        return None
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None


def _cpu_name() -> str:
    """The processor's name; `platform.processor()` is empty on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
