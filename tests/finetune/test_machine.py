"""What the machine is asked."""

import pynvml
import pytest
import torch

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
