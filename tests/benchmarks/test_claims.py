"""The first experiment's claims are judged by a record's figures alone."""

import measurements
import pytest

from benchmarks import claims


def answer(claim: str, results=None) -> tuple[str, str]:
    """The finding of the claim that begins so."""
    found = claims.findings(measurements.record(results))
    (finding,) = (finding for text, finding in found.items() if text.startswith(claim))
    return finding


def test_the_speeds():
    assert answer("cuDNN") == ("10.0 to 10.1 articles/s: +1.0 %", "no: less")
    assert answer("sequence packing") == ("10.0 to 13.5 articles/s: +35.0 %", "yes")
    assert answer("flash attention") == ("20.0 to 30.0 articles/s: +50.0 %", "yes, and more")


@pytest.mark.parametrize(
    ("speed", "verdict"),
    [(9.0, "no: less"), (10.49, "no: less"), (10.5, "yes"), (11.0, "yes"), (11.01, "yes, and more")],
)
def test_the_bounds_of_a_claim_belong_to_it(speed, verdict):
    assert answer("cuDNN", measurements.changed("trl_cudnn", articles_per_second=speed))[1] == verdict


def test_what_was_not_measured_or_failed_is_named():
    for key in ("trl_cudnn", "trl_seed"):
        assert answer("cuDNN", measurements.without(key)) == (f"`{key}`: not measured", "not measured")
    results = [*measurements.without("flash"), measurements.failed("flash")]
    assert answer("flash attention", results) == ("`flash`: out of memory", "not measured")


def test_the_container_was_not_measured():
    assert answer("the container")[1] == "not measured"


def test_memory_of_checkpointing():
    claim = "Unsloth's checkpointing: 30 % less"
    assert answer(claim) == ("30.0 to 16.0 GiB: 46.7 % less, at 0.67 of the speed", "yes")
    assert answer(claim, measurements.changed("lora_unsloth_checkpointing", peak_gib=21.5))[1] == "no: less"


@pytest.mark.parametrize(("gib", "verdict"), [(19.0, "yes"), (30.5, "no")])
def test_twice_the_batch_must_fit_where_the_batch_did(gib, verdict):
    larger = measurements.RECOMPUTED | {"per_device_train_batch_size": 128}
    row = measurements.training("lora_unsloth_checkpointing_128", 170.0, 60.3, larger, gib)
    shown = f"128 articles at once take {gib} GiB with it; 64 take 30.0 without"
    assert answer("Unsloth's checkpointing: twice", [*measurements.rows(), row]) == (shown, verdict)
