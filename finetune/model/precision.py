"""The type of matrix products: bfloat16 on a GPU; on a CPU the faster of bfloat16 and float32, found by measuring.

A CPU without bf16 instructions (AVX2: most laptops) takes five times as long for a product in bf16 as in fp32; one
with AMX takes a quarter of the time. Flags and names of processors do not tell it reliably, a tenth of a second does.
"""

from __future__ import annotations

import functools
import math
import os
import time
from dataclasses import dataclass

import torch

from finetune import machine

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Tokens of the product that is timed, and the most that each side of its matrix has: of a 7B model a corner is enough.
TOKENS, LARGEST_SIDE = 128, 2048
SECONDS = 0.04
# bf16 rounds more: it has to gain something, and two kernels of one machine must not choose differently.
LEAST_GAIN = 1.2


@dataclass(frozen=True)
class Precision:
    """The type of all matrix products of a process, and why.

    Attributes:
        name: `bfloat16` or `float32`.
        reason: Why this one, with the figures that decided.
    """

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def autocast(self) -> torch.autocast:
        """A context in which fp32 weights are multiplied in this type."""
        return torch.autocast(machine.device(), dtype=torch.bfloat16, enabled=self.name == "bfloat16")

    def __str__(self) -> str:
        return f"{self.name} products: {self.reason}"


def choose(wanted: str, hidden: int) -> Precision:
    """The type to multiply in.

    Args:
        wanted: `bfloat16` or `float32`, which is followed; or `auto`.
        hidden: The model's width: what is timed is a product of its MLP, usually about four times as wide.
    """
    if wanted != "auto":
        use_physical_cores()
        return Precision(wanted, "asked for")
    if machine.has_cuda():
        return Precision("bfloat16", "a GPU's tensor cores")
    use_physical_cores()
    sides = min(hidden, LARGEST_SIDE), min(4 * hidden, LARGEST_SIDE)
    speeds = {name: _gflops(name, *sides) for name in DTYPES}
    faster = "bfloat16" if speeds["bfloat16"] > LEAST_GAIN * speeds["float32"] else "float32"
    shown = ", ".join(f"{speed:.0f} GFLOP/s in {name}" for name, speed in speeds.items())
    return Precision(faster, f"measured on {torch.get_num_threads()} threads: {shown}")


@functools.cache
def use_physical_cores() -> None:
    """Compute with as many threads as physical cores may be used, unless OMP_NUM_THREADS says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(machine.usable_cores())


@functools.cache
def _gflops(name: str, hidden: int, intermediate: int) -> float:
    """Speed of the product of TOKENS tokens with a layer's matrix: the fastest, as other programs slow down some."""
    tokens = torch.ones(TOKENS, hidden, dtype=DTYPES[name])
    matrix = torch.ones(intermediate, hidden, dtype=DTYPES[name])
    torch.nn.functional.linear(tokens, matrix)
    fastest, start = math.inf, time.perf_counter()
    while (begun := time.perf_counter()) < start + SECONDS:
        torch.nn.functional.linear(tokens, matrix)
        fastest = min(fastest, time.perf_counter() - begun)
    return 2 * TOKENS * hidden * intermediate / fastest / 1e9
