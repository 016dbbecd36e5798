"""The energy meter on a counter of the test's own; no GPU is needed."""

import pytest

from finetune import machine
from finetune.train import energy


@pytest.fixture
def counter(monkeypatch) -> dict[str, int]:
    """A counter in millijoules that the test turns."""
    reading = {"now": 5_000}
    monkeypatch.setattr(energy, "_counter", lambda: lambda: reading["now"])
    return reading


def test_it_adds_what_was_used_between_start_and_stop_to_what_a_resumed_training_had_used(counter):
    meter = energy.EnergyMeter()
    meter.go_on_from(100.0)
    meter.start()
    counter["now"] += 1_500
    meter.stop()
    counter["now"] += 90_000
    meter.start()
    counter["now"] += 500
    meter.stop()
    assert meter.joules == pytest.approx(102.0)


def test_what_an_interrupted_training_used_unmeasured_is_not_made_up(counter):
    meter = energy.EnergyMeter()
    meter.go_on_from(None)
    meter.start()
    meter.stop()
    assert meter.joules is None


def test_without_a_counter_nothing_is_reported():
    if machine.has_cuda():
        pytest.skip("this machine's GPU may report its energy")
    meter = energy.EnergyMeter()
    meter.start()
    meter.stop()
    assert meter.joules is None


@pytest.mark.gpu
def test_a_gpu_uses_energy():
    import torch

    meter = energy.EnergyMeter()
    if meter.joules is None:
        pytest.skip("this GPU does not report its energy")
    meter.start()
    matrix = torch.rand(8192, 8192, device="cuda")
    for _ in range(200):
        matrix = (matrix @ matrix).clamp(0, 1)
    torch.cuda.synchronize()
    meter.stop()
    assert meter.joules > 1
