"""A file of measurements is read whole, or refused with the reason."""

import measurements
import pytest

from data_prep import DataError
from finetune.throughput import read, read_published


def test_rows_are_found_by_key(tmp_path):
    found = read(measurements.write(tmp_path / "a.json"))
    assert found.measured("batch").articles_per_second == 240
    assert found.measured("batch").computed_per_article == pytest.approx(60 + 40 / 64)
    assert found.row("peer_liger").name == "the peer_liger rung"
    assert found.measured("peer_liger") is None and found.row("qlora_checkpointing") is None
    assert found.first_measured(("qlora_checkpointing", "peer_liger", "full", "batch")).key == "full"


def test_what_is_not_there_has_its_reason(tmp_path):
    results = [*measurements.rows(), measurements.failed("peer_checkpointing", "ValueError: no such thing")]
    found = measurements.file(results)
    assert found.lacking("peer_liger") == "out of memory"
    assert found.lacking("peer_checkpointing") == "failed (ValueError)"
    assert found.lacking("qlora_checkpointing") == "not measured"


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(DataError, match=r"a\.json: no such file; measure it .*benchmarks\.throughput"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        (measurements.rows() + measurements.rows()[:1], "two rows have the key trl_seed"),
        (measurements.changed("batch", outcome="Error: x"), "batch needs figures or an outcome"),
        (measurements.changed("generation_lean_128", articles_per_second=None), "needs figures or an outcome"),
        (measurements.changed("batch", computed_per_second=None), "batch lacks computed_per_second"),
        (measurements.changed("batch", share_of_peak=0.5), "share_of_peak is not tflops / matrix_peak_tflops"),
        (measurements.changed("batch", share_of_peak=1.2), "less than or equal to 1"),
        (measurements.changed("batch", articles_per_second=-1.0), "greater than 0"),
        (measurements.changed("batch", run="lorax"), "run"),
        (measurements.changed("batch", key=None), "key"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, results, reason):
    with pytest.raises(DataError, match=reason):
        read(measurements.write(tmp_path / "a.json", results))


def test_a_file_cut_short_is_refused(tmp_path):
    path = measurements.write(tmp_path / "a.json")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="not measurements of this version"):
        read(path)


@pytest.mark.parametrize("change", [{"dirty": True}, {"dirty": None, "commit": None}])
def test_what_nobody_could_repeat_is_not_published(tmp_path, change):
    path = measurements.write(tmp_path / "a.json", **change)
    assert read(path)
    with pytest.raises(DataError, match="tree with uncommitted changes: commit, then measure again"):
        read_published(path)
