"""The prediction for a GB10 follows from the file, and never claims to be more than one."""

from dataclasses import replace

import measurements
import pytest

from benchmarks import gb10, roofline
from data_prep import UserError
from finetune.config.profiles import PROFILES
from finetune.config.recipes import FULL, LORA


def hours(table, method: str, articles: str, prompt: str = "lean") -> tuple[float, float]:
    (line,) = (line for line in table.to_dict("records") if (line["method"], line["articles"]) == (method, articles))
    low, high = map(float, line[f"hours, {prompt} prompt"].split(" to "))
    return low, high


def test_the_prompts_lengths_come_from_the_rows():
    shared_and_own = gb10.lengths(measurements.record())
    assert shared_and_own["lean"] == (pytest.approx(40), pytest.approx(60))
    assert shared_and_own["verbose"] == (pytest.approx(200), pytest.approx(60))


def test_hours_by_hand():
    """LoRA, 64 articles at once: arithmetic alone, at the measured share of GB10's peak."""
    found = measurements.record()
    row = found.rows.loc["batch"]
    on_h100 = 120_000 / 240 / 3600
    text = gb10.hours(found, [row], replace(LORA, gradient_checkpointing="off"), 64, 64 * 60 + 40)
    low, high = map(float, text.split(" to "))
    # An adapter has few parameters, so the update's traffic does not matter.
    assert low == pytest.approx(on_h100 * 800 / 97, abs=0.06)
    share = roofline.share_of(found, row)
    slower = 1 + (1 / share - 1) * (93e12 / (273e9 * 3.0 / 3.35)) / (800 / 3.0)
    assert high == pytest.approx(on_h100 * share * 800 / 93 * slower, abs=0.06)


def test_larger_micro_batches_are_no_slower():
    table = gb10.hours_table(measurements.record())
    assert list(table["articles"][:3]) == ["8 x 4", "32 x 1", "64 x 1"]
    for method in ("LoRA", "QLoRA", "full", "full, bf16 weights"):
        for prompt in ("lean", "verbose"):
            small, middle, large = (hours(table, method, size, prompt) for size in ("8 x 4", "32 x 1", "64 x 1"))
            assert small[0] >= middle[0] >= large[0] and small[1] >= middle[1] >= large[1]
            assert all(low < high for low, high in (small, middle, large))


def test_what_moves_bytes_beside_the_products_takes_its_time():
    table = gb10.hours_table(measurements.record())
    assert hours(table, "QLoRA", "8 x 4")[0] > 1.2 * hours(table, "LoRA", "8 x 4")[0], "weights are unpacked each time"
    assert hours(table, "full", "8 x 4")[0] > 1.4 * hours(table, "full, bf16 weights", "8 x 4")[0], "fp32 weights"


def test_the_spark_profile_s_recipe_is_what_is_predicted(monkeypatch):
    profile = PROFILES["spark"]
    shared = {**profile.shared, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    monkeypatch.setitem(PROFILES, "spark", replace(profile, shared=shared))
    assert list(gb10.hours_table(measurements.record())["articles"][:3]) == ["8 x 2", "16 x 1", "32 x 1"]


def test_small_micro_batches_are_slow_at_worst_as_they_were_when_measured():
    slow = measurements.changed("lora_graphs_8x8", articles_per_second=90.0, computed_per_second=90 * 65.0)
    usual = hours(gb10.hours_table(measurements.record()), "LoRA", "8 x 4")
    found = hours(gb10.hours_table(measurements.record(slow)), "LoRA", "8 x 4")
    assert found[0] == usual[0] and found[1] > 1.5 * usual[1]


def test_the_host_bounds_small_micro_batches_at_worst():
    slow = measurements.changed("shared", articles_per_second=8.0, computed_per_second=8 * 65.0)
    table = gb10.hours_table(measurements.record(slow))
    # A second for each micro-batch of 8.
    assert hours(table, "LoRA", "8 x 4")[1] == pytest.approx(120_000 / 8 / 3600, abs=0.05)


def test_activations_that_do_not_fit_are_recomputed():
    assert gb10.settled(LORA, 4_000).gradient_checkpointing == "off"
    assert gb10.settled(replace(FULL, optim="adamw_8bit"), 2_000).gradient_checkpointing == "off"
    assert gb10.settled(replace(FULL, optim="adamw_8bit"), 20_000).gradient_checkpointing == "plain"
    assert gb10.settled(replace(LORA, gradient_checkpointing="unsloth"), 10).gradient_checkpointing == "unsloth"


def test_a_method_that_was_not_measured_is_not_predicted():
    table = gb10.hours_table(measurements.record(measurements.without("full")))
    of_full = table[table["method"].str.startswith("full")]
    assert set(of_full["hours, lean prompt"]) == {"not measured"}
    others = gb10.others_table(measurements.record(measurements.without("full")))
    full, lora = others["predicted hours"]
    assert full == "not measured" and " to " in lora


class TestChecks:
    def test_a_row_as_the_roofline_has_it_agrees(self):
        """The graphs' row at the speed that the roofline gives it: the model reproduces it."""
        found = measurements.record()
        source, row = found.measured("batch", "lora_graphs_8x8")
        machine = roofline.machine_of(found, source)
        speed = 8 / roofline.work_of_row(row).seconds(machine, roofline.share_of(found, source))
        results = [
            measurements.training("lora_graphs_8x8", speed, 65, measurements.GRAPHS, 18)
            if each["key"] == "lora_graphs_8x8"
            else each
            for each in measurements.rows()
        ]
        table = gb10.checks_table(measurements.record(results))
        (line,) = (line for line in table.to_dict("records") if line["setting"] == "the lora_graphs_8x8 rung")
        assert line["roofline / measured"] == "1.00"

    def test_no_measured_row_exceeds_the_whole_peak(self):
        table = gb10.checks_table(measurements.record())
        assert len(table) == 3
        for line in table.to_dict("records"):
            assert float(line["measured articles/s"]) < float(line["at the whole peak"])
            assert float(line["roofline"]) <= float(line["at the whole peak"])

    def test_a_row_that_does_is_refused(self):
        """Four fifths of the peak by the ladder's rule, but then the 4-bit weights were not unpacked."""
        row = measurements.training("qlora_graphs_8x8", 320.0, 65, measurements.GRAPHS, 9, "qlora")
        assert row["share_of_peak"] < 0.85
        with pytest.raises(UserError, match=r"`qlora_graphs_8x8` is faster than 2\d\d articles/s"):
            gb10.prediction(measurements.record([*measurements.rows(), row]))
