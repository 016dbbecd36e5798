"""The prediction for a GB10 follows from the file, and never claims to be more than one."""

import re
from dataclasses import replace

import measurements
import pytest

from data_prep import UserError
from finetune import prediction, roofline
from finetune.profiles import PROFILES
from finetune.recipes import FULL, LORA


def hours(table, method: str, articles: str, prompt: str = "lean") -> tuple[float, float]:
    (line,) = (line for line in table.to_dict("records") if (line[""], line["articles"]) == (method, articles))
    low, high = map(float, line[f"hours, {prompt} prompt"].split(" to "))
    return low, high


def test_the_prompts_lengths_come_from_the_rows():
    of = prediction.lengths(measurements.file())
    assert (of["lean"].shared, of["lean"].own) == (pytest.approx(40), pytest.approx(60))
    assert (of["verbose"].shared, of["verbose"].own) == (pytest.approx(200), pytest.approx(60))
    assert of["lean"].computed(8) == pytest.approx(8 * 60 + 40)


def test_hours_by_hand():
    """LoRA, 64 articles at once: arithmetic alone, at the measured share of GB10's peak."""
    found = measurements.file()
    row = found.measured("batch")
    machine = roofline.machine_of(found, row)
    on_h100 = 120_000 / 240 / 3600
    low, high = prediction.hours(found, [row], replace(LORA, gradient_checkpointing="off"), 64, 64 * 60 + 40)
    # Of the few parameters of an adapter alone, the update's traffic is no matter.
    assert low == pytest.approx(on_h100 * 800 / 97, rel=0.01)
    share = roofline.share_of(row, machine)
    slower = 1 + (1 / share - 1) * (93e12 / (273e9 * 3.0 / 3.35)) / (800 / 3.0)
    assert high == pytest.approx(on_h100 * share * 800 / 93 * slower, rel=0.01)


def test_larger_micro_batches_are_no_slower():
    table = prediction.hours_table(measurements.file())
    assert list(table["articles"][:3]) == ["8 x 4", "32 x 1", "64 x 1"]
    for method in ("LoRA", "QLoRA", "full", "full, bf16 weights"):
        for prompt in ("lean", "verbose"):
            small, middle, large = (hours(table, method, size, prompt) for size in ("8 x 4", "32 x 1", "64 x 1"))
            assert small[0] >= middle[0] >= large[0] and small[1] >= middle[1] >= large[1]
            assert all(low < high for low, high in (small, middle, large))


def test_what_moves_bytes_beside_the_products_takes_its_time():
    table = prediction.hours_table(measurements.file())
    assert hours(table, "QLoRA", "8 x 4")[0] > 1.2 * hours(table, "LoRA", "8 x 4")[0], "weights are unpacked each time"
    assert hours(table, "full", "8 x 4")[0] > 1.4 * hours(table, "full, bf16 weights", "8 x 4")[0], "fp32 weights"


def test_the_spark_profile_s_recipe_is_what_is_predicted(monkeypatch):
    profile = PROFILES["spark"]
    shared = {**profile.shared, "batch_size": 16, "gradient_accumulation_steps": 1}
    monkeypatch.setitem(PROFILES, "spark", replace(profile, shared=shared))
    assert list(prediction.hours_table(measurements.file())["articles"][:3]) == ["8 x 2", "16 x 1", "32 x 1"]


def test_small_micro_batches_are_slow_at_worst_as_they_were_when_measured():
    slow = measurements.changed("lora_graphs_8x8", articles_per_second=90.0, computed_per_second=90 * 65.0)
    usual = hours(prediction.hours_table(measurements.file()), "LoRA", "8 x 4")
    found = hours(prediction.hours_table(measurements.file(slow)), "LoRA", "8 x 4")
    assert found[0] == usual[0] and found[1] > 1.5 * usual[1]


def test_the_host_bounds_small_micro_batches_at_worst():
    slow = measurements.changed("shared", articles_per_second=8.0, computed_per_second=8 * 65.0)
    table = prediction.hours_table(measurements.file(slow))
    # A second for each micro-batch of 8.
    assert hours(table, "LoRA", "8 x 4")[1] == pytest.approx(120_000 / 8 / 3600, abs=0.05)


def test_activations_that_do_not_fit_are_recomputed():
    assert prediction.settled(LORA, 4_000).gradient_checkpointing == "off"
    assert prediction.settled(replace(FULL, optimizer="adamw_8bit"), 2_000).gradient_checkpointing == "off"
    assert prediction.settled(replace(FULL, optimizer="adamw_8bit"), 20_000).gradient_checkpointing == "plain"
    assert prediction.settled(replace(LORA, gradient_checkpointing="unsloth"), 10).gradient_checkpointing == "unsloth"


def test_a_method_that_was_not_measured_is_not_predicted():
    table = prediction.hours_table(measurements.file(measurements.without("full")))
    of_full = table[table[""].str.startswith("full")]
    assert set(of_full["hours, lean prompt"]) == {"not measured"}
    others = prediction.others_table(measurements.file(measurements.without("full")))
    full, lora = others["predicted hours"]
    assert full == "not measured" and " to " in lora


def test_without_an_article_s_length_nothing_is_predicted():
    text = prediction.text(measurements.file([*measurements.without("lean"), measurements.failed("lean")]), "h100")
    assert "Not predicted" in text and "`lean`: out of memory" in text
    assert not re.search(r"\d to \d", text)


class TestChecks:
    def test_a_row_as_the_roofline_has_it_agrees(self):
        """The graphs' row at the speed that the roofline gives it: the model reproduces it."""
        found = measurements.file()
        source, row = found.measured("batch"), found.measured("lora_graphs_8x8")
        machine = roofline.machine_of(found, source)
        speed = 8 / roofline.work_of_row(row).seconds(machine, roofline.share_of(source, machine))
        results = [
            measurements.training("lora_graphs_8x8", speed, 65, measurements.GRAPHS, 18)
            if each["key"] == "lora_graphs_8x8"
            else each
            for each in measurements.rows()
        ]
        table = prediction.checks_table(measurements.file(results))
        (line,) = (line for line in table.to_dict("records") if line[""] == "the lora_graphs_8x8 rung")
        assert line["roofline / measured"] == "1.00"

    def test_no_measured_row_exceeds_the_whole_peak(self):
        table = prediction.checks_table(measurements.file())
        assert len(table) == 3
        for line in table.to_dict("records"):
            assert float(line["measured articles/s"]) < float(line["at the whole peak"])
            assert float(line["roofline"]) <= float(line["at the whole peak"])

    def test_a_row_that_does_is_refused(self):
        """Four fifths of the peak by the ladder's rule, but then the 4-bit weights were not unpacked."""
        row = measurements.training("qlora_graphs_8x8", 320.0, 65, measurements.GRAPHS, 9, "qlora")
        assert row["share_of_peak"] < 0.85
        with pytest.raises(UserError, match=r"qlora_graphs_8x8 is faster than 2\d\d articles/s"):
            prediction.text(measurements.file([*measurements.rows(), row]), "h100")


def test_the_text_says_what_it_is():
    text = prediction.text(measurements.file(), "h100")
    assert text.startswith("**A prediction, not a measurement: no run on a GB10 was made for this repository.**")
    for part in (
        "| full | ",
        "about 10 h; 8 h 36 min",
        "5 h 51 min",
        "their figures, not ours",
        "measured by an owner, not by us",
        "273 GB/s (NVIDIA's data sheet",
        "121.69 GiB",
        "lean 60 and 40 shared and verbose 60 and 200 shared",
        "(`batch`)",
        "`results/reference/throughput/h100.json`",
    ):
        assert part in text
