"""The GPU's energy, from NVML's counter (Volta and newer). It counts everything that the GPU does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pynvml
import torch

from finetune import machine


class EnergyMeter:
    """Adds up the joules between each `start` and `stop`; `joules` is None where nothing reports them."""

    def __init__(self):
        self._millijoules = _counter()
        self._since = 0
        self.joules: float | None = 0.0 if self._millijoules else None

    def go_on_from(self, joules: float | None) -> None:
        """Begin with what an interrupted training had used; not knowing that is not knowing the whole."""
        self.joules = joules if self._millijoules else None

    def start(self) -> None:
        if self.joules is not None:
            self._since = self._millijoules()

    def stop(self) -> None:
        if self.joules is not None:
            self.joules += (self._millijoules() - self._since) / 1000


def _counter() -> Callable[[], int] | None:
    """Reads the GPU's millijoules since its driver was loaded; None without a GPU that counts them."""
    if not machine.has_cuda():
        return None
    try:
        pynvml.nvmlInit()
        # By its name: NVML and CUDA may number the GPUs differently.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
