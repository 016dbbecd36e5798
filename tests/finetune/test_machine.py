"""What the machine is asked."""

import pynvml
import pytest
import torch

from finetune import machine


@pytest.mark.parametrize(
    ("chosen", "count", "gpus"),
    [
        (None, 2, ("0", "1")),
        ("3, 1", 2, ("3", "1")),
        ("GPU-4f1c,GPU-9a2b", 2, ("GPU-4f1c", "GPU-9a2b")),
        # What comes after a name that is no GPU does not count, in CUDA as here.
        ("1,-1,0", 1, ("1",)),
    ],
)
def test_visible_gpus_are_named_as_cuda_names_them(monkeypatch, chosen, count, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert machine.visible_gpus() == gpus


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


def test_without_cuda_no_gpu_is_visible_whatever_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert machine.visible_gpus() == ()
