"""A record of speed is read whole, or refused with the reason."""

import measurements
import pytest

from benchmarks.records import read
from data_prep import DataError


def test_rows_are_found_by_key(tmp_path):
    record = read(measurements.write(tmp_path / "a.json"))
    (batch,) = record.measured("batch")
    assert (batch.articles_per_second, batch.recipe.per_device_train_batch_size, batch.seconds) == (240, 64, 64 / 240)
    assert batch.computed_per_article == pytest.approx(60 + 40 / 64)
    assert [row.name for row in record.measured("qlora_checkpointing", "peer_liger", "full", "batch")] == [
        "full",
        "batch",
    ]
    assert record.rows.setting["peer_liger"] == "the peer_liger rung"


def test_what_is_not_there_has_its_reason():
    results = [*measurements.rows(), measurements.failed("peer_checkpointing", "ValueError: no such thing")]
    lacking = measurements.record(results).lacking("batch", "peer_liger", "peer_checkpointing", "qlora_checkpointing")
    assert lacking == (
        "`peer_liger`: out of memory; `peer_checkpointing`: failed (ValueError); `qlora_checkpointing`: not measured"
    )


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(DataError, match=r"a\.json: no such file; measure it .*benchmarks\.throughput"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        (measurements.rows() + measurements.rows()[:1], "trl_seed"),
        (measurements.changed("batch", outcome="Error: x"), "batch needs figures or an outcome"),
        (measurements.changed("batch", computed_per_second=None), "batch lacks a figure"),
        (measurements.changed("batch", tflops=960.0, share_of_peak=1.2), "batch has a share_of_peak above 1"),
        (measurements.changed("batch", articles_per_second=-1.0), "batch has a figure that is not above 0"),
        (measurements.changed("batch", articles_per_second="fast"), "could not convert string to float"),
        (measurements.changed("batch", overrides={"dtype": "float8"}), "float8"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, results, reason):
    with pytest.raises(DataError, match=reason):
        read(measurements.write(tmp_path / "a.json", results))


def test_a_file_cut_short_is_refused(tmp_path):
    path = measurements.write(tmp_path / "a.json")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="no measurements of this version"):
        read(path)


@pytest.mark.parametrize("change", [{"dirty": True}, {"dirty": None, "commit": None}])
def test_what_nobody_could_repeat_is_known(change):
    assert measurements.record().is_repeatable
    assert not measurements.record(**change).is_repeatable
