"""The benchmark of speed measures what the page's tables show, and loses nothing when it is interrupted."""

import copy
import json
import sys
import time

import pytest

from benchmarks import gb10, ladder, part, throughput

MEASURED = {rung.key for part in ladder.PARTS.values() for rung in part}
REPORT = {
    "environment": {"commit": "0123", "dirty": False, "packages": {"torch": "2"}, "hardware": {"gpu": "H100"}},
    "data": {"fingerprint": "abc"},
    "model": "28 layers",
}


def row(key: str, **more) -> dict:
    return {"key": key, **more}


def test_each_training_has_its_place_and_predictions_read_what_is_measured():
    in_methods = [key for keys in ladder.settings_of_methods().values() for key in keys]
    assert {*ladder.rungs(), *ladder.peers(), *in_methods} == MEASURED
    read = {key for of in gb10.METHODS.values() for key in (*of.kept, *of.recomputing, *of.checks)}
    assert read | set(gb10.LENGTH_ROWS) <= MEASURED


class TestProcesses:
    def test_rungs_on_unsloth_share_a_process_and_others_have_one_each(self):
        found = list(ladder.processes(["qlora", "plain"], [], set()))
        assert found[0] == ("qlora", ladder.keys_of("qlora"))
        assert found[1:] == [("plain", [key]) for key in ladder.keys_of("plain")]

    def test_what_is_measured_or_not_asked_for_is_left_out(self):
        everything = {key for part in ladder.ALL_PARTS for key in ladder.keys_of(part)}
        assert {part for part, _ in ladder.processes([], [], set())} == set(ladder.ALL_PARTS)
        assert not list(ladder.processes([], [], everything))
        assert list(ladder.processes([], [], everything - {"batch"})) == [("lora", ["batch"])]
        # It measures all of its own in one process.
        assert list(ladder.processes([], [], everything - {"generation_lean_128"})) == [("evaluation", [])]
        asked = list(ladder.processes(["lora", "full"], ["batch", "full"], set()))
        assert asked == [("lora", ["batch"]), ("full", ["full"])]


class TestMeasurements:
    def test_each_is_written_at_once_in_the_order_of_the_parts(self, tmp_path):
        file = tmp_path / "out.json"
        measurements = throughput.Measurements(file, REPORT)
        measurements.add(row("qlora"))
        measurements.add(row("trl_seed"))
        written = json.loads(file.read_text())
        assert [one["key"] for one in written["results"]] == ["trl_seed", "qlora"]
        assert written["model"] == REPORT["model"]

    def test_a_second_run_goes_on_and_tries_again_what_failed(self, tmp_path):
        first = throughput.Measurements(tmp_path / "out.json", REPORT)
        first.add(row("batch", articles_per_second=200))
        first.add(row("qlora", outcome="OutOfMemoryError"))
        assert throughput.Measurements(tmp_path / "out.json", REPORT).keys == {"batch"}

    @pytest.mark.parametrize(
        ("part", "name", "value"),
        [
            ("environment", "commit", "4567"),
            ("environment", "packages", {"torch": "3"}),
            ("environment", "hardware", {"gpu": "H200"}),
            ("data", "fingerprint", "def"),
        ],
    )
    def test_measurements_from_elsewhere_are_not_kept(self, tmp_path, capsys, part, name, value):
        throughput.Measurements(tmp_path / "out.json", REPORT).add(row("batch"))
        other = copy.deepcopy(REPORT)
        other[part][name] = value
        assert throughput.Measurements(tmp_path / "out.json", other).keys == set()
        assert "all is measured anew" in capsys.readouterr().out

    def test_changes_that_are_not_committed_are_never_gone_on_from(self, tmp_path):
        changed = copy.deepcopy(REPORT)
        changed["environment"]["dirty"] = True
        throughput.Measurements(tmp_path / "out.json", changed).add(row("batch"))
        assert throughput.Measurements(tmp_path / "out.json", changed).keys == set()


class TestPart:
    @pytest.mark.parametrize("name", ["model", *ladder.ALL_PARTS])
    def test_its_process_understands_the_command(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["throughput", "/data/ag_news"])
        command = throughput._command(name, throughput._options(), tmp_path)
        assert command[1:3] == ["-m", "benchmarks.part"]
        options = part.parser().parse_args([*command[3:], "--rungs", "batch"])
        assert (options.part, options.csv, options.model) == (name, "/data/ag_news", str(tmp_path))
        assert options.rungs == ["batch"]

    def test_its_results_are_reported_while_it_runs(self, monkeypatch):
        script = "import time; print('noise'); print('RESULT {\"key\": \"batch\"}', flush=True); time.sleep(60)"
        monkeypatch.setattr(throughput, "PART_SECONDS", 2)
        found = []
        start = time.monotonic()
        status = throughput._run([sys.executable, "-c", script], {}, found.append)
        assert found == [{"key": "batch"}]
        assert status != 0 and time.monotonic() - start < 30
