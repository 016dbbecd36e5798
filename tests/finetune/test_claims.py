"""The first experiment's claims are judged by the file's figures alone."""

import measurements
import pytest

from finetune import claims


def answers(results=None) -> dict[str, tuple[str, str]]:
    found = measurements.file(results)
    return {claim.text.split(":")[0]: claim.finding(found) for claim in claims.CLAIMS}


def at(speeds: dict[str, float]) -> list[dict]:
    return [
        row | {"articles_per_second": speeds[row["key"]]} if row["key"] in speeds else row
        for row in measurements.rows()
    ]


def test_the_speeds():
    found = answers()
    assert found["cuDNN's benchmark mode"] == ("10.0 to 10.1 articles/s: +1.0 %", "no: less")
    assert found["sequence packing"] == ("10.0 to 13.5 articles/s: +35.0 %", "yes")
    assert found["flash attention"] == ("20.0 to 30.0 articles/s: +50.0 %", "yes, and more")


@pytest.mark.parametrize(
    ("speed", "verdict"),
    [(9.0, "no: less"), (10.49, "no: less"), (10.5, "yes"), (11.0, "yes"), (11.01, "yes, and more")],
)
def test_the_bounds_of_a_claim_belong_to_it(speed, verdict):
    assert answers(at({"trl_cudnn": speed}))["cuDNN's benchmark mode"][1] == verdict


@pytest.mark.parametrize("key", ["trl_cudnn", "trl_seed"])
def test_without_a_row_nothing_is_said(key):
    assert answers(measurements.without(key))["cuDNN's benchmark mode"] == (
        f"`{key}`: not measured",
        "not measured here",
    )


def test_a_row_that_failed_is_named():
    results = [*measurements.without("flash"), measurements.failed("flash")]
    assert answers(results)["flash attention"] == ("`flash`: out of memory", "not measured here")


def test_the_container_was_not_measured():
    assert answers()["the container instead of pip in a venv"][1] == "not measured here"


def test_memory_of_checkpointing():
    by_claim = {claim.text: claim.finding(measurements.file()) for claim in claims.CLAIMS}
    text, verdict = by_claim["Unsloth's checkpointing: 30 % less memory"]
    assert text.startswith("30.0 to 16.0 GiB: 46.7 % less, at 0.67 of the speed; PyTorch's own checkpointing: 17.0 GiB")
    assert verdict == "yes"
    # The layers hold 12.2 GiB of the 16: 128 articles take at most 2 x 16 - 12.2.
    text, verdict = by_claim["Unsloth's checkpointing: twice the batch"]
    assert "at most 19.8 GiB with it; these take 30.0 without" in text and verdict == "yes"


def test_twice_the_batch_is_not_claimed_where_the_figures_do_not_show_it():
    (finding,) = (claim.finding for claim in claims.CLAIMS if "twice" in claim.text)
    results = measurements.changed("lora_unsloth_checkpointing", peak_gib=25.0)
    assert finding(measurements.file(results))[1] == "not shown"


def test_the_text_says_where_it_was_measured():
    text = claims.text(measurements.file(), "h100")
    assert "Measured on one NVIDIA H100 80GB HBM3, not on a GB10" in text
    assert text.count("| not measured here |") == 1
