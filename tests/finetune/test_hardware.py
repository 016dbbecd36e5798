"""What the machine is asked."""

import pytest
import torch

from finetune import hardware


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
    assert hardware.visible_gpus() == gpus


def test_without_cuda_no_gpu_is_visible_whatever_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert hardware.visible_gpus() == ()
