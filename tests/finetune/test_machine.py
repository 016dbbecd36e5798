"""What the machine is asked."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pynvml
import pytest
import torch

from data_prep import UserError
from finetune import machine


class TestDriver:
    @pytest.fixture
    def gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)

    def test_it_is_what_nvml_says(self, gpu, monkeypatch):
        monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.95.05")
        assert machine._driver_version() == "580.95.05"

    def test_where_nvml_does_not_answer_there_is_none(self, gpu, monkeypatch):
        def refuse():
            raise pynvml.NVMLError_NotSupported

        monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", refuse)
        assert machine._driver_version() is None

    def test_without_cuda_it_is_in_the_snapshot_as_none(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert machine.snapshot()["driver"] is None


class TestMemory:
    @pytest.fixture
    def spark(self, monkeypatch):
        """A GPU that shares 128 GB with the CPU, of which 40 are left; PyTorch holds 10."""
        given = SimpleNamespace(is_integrated=True, total_memory=128 * 10**9)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: given)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 10 * 10**9)
        monkeypatch.setattr(machine, "memory_left", lambda: 40 * 10**9)
        return given

    def test_on_unified_memory_pytorch_stops_before_the_machine_does(self, spark, monkeypatch):
        shares = []
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
        machine.limit_gpu_memory()
        assert machine.memory_floor() == 6e9 and shares == [pytest.approx((40 - 6 + 10) / 128)]
        spark.is_integrated = False
        machine.limit_gpu_memory()
        assert machine.memory_floor() == 0 and len(shares) == 1

    def test_the_floor_is_a_share_of_the_nearest_limit_unless_it_is_set(self, monkeypatch):
        monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=100e9, available=50e9))
        for limits, floor in ([], 2e9), ([(20 * 10**9, 0), (8 * 10**9, 10**9)], 0.4e9):
            monkeypatch.setattr(machine, "control_groups", lambda limits=limits: iter(limits))
            assert machine.memory_floor() == floor
        assert machine.memory_left() == 7e9 and machine.available_memory_bytes() == 6.6e9
        monkeypatch.setenv("FINETUNE_MEMORY_FLOOR", "1.5")
        assert machine.memory_floor() == 1.5e9
        monkeypatch.setenv("FINETUNE_MEMORY_FLOOR", "6 GB")
        with pytest.raises(UserError, match="FINETUNE_MEMORY_FLOOR is '6 GB'"):
            machine.memory_floor()

    def test_a_dip_between_two_questions_is_seen_and_told_once(self, monkeypatch):
        left = [10**9, sys.maxsize]
        monkeypatch.setattr(machine, "SECONDS_BETWEEN_READINGS", 0.01)
        monkeypatch.setattr(machine, "memory_left", lambda: left.pop(0) if len(left) > 1 else left[0])
        monkeypatch.setenv("FINETUNE_MEMORY_FLOOR", "2")
        assert machine.MemoryWatch().shortage() == "", "it has not begun"
        with machine.MemoryWatch() as watch:
            while len(left) > 1:
                time.sleep(0.01)
            assert watch.shortage() == "1.0 GB of memory were left, and we keep 2.0 GB free"
            assert watch.shortage() == ""

    def test_page_cache_of_a_control_group_is_there_for_the_asking(self, memory_group, tmp_path):
        script = """
import os, sys
from finetune import machine

open(f"{sys.argv[1]}/cgroup.procs", "w").write(str(os.getpid()))
left = [machine.memory_left()]
with open("large", "wb") as file:
    file.write(bytes(300_000_000))
    os.fsync(file.fileno())
left.append(machine.memory_left())
# What was read twice is in active use, and the kernel gives it back all the same.
for _ in range(2):
    open("large", "rb").read()
left.append(machine.memory_left())
held = b"x" * 200_000_000
print(*left, machine.memory_left())
"""
        command = [sys.executable, "-c", script, memory_group]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        before, written, read, held = map(int, done.stdout.split())
        assert before <= 10**9 and min(written, read) > before - 10**8 and held < before - 1.9e8
