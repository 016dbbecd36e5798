"""docs/speed.md shows the records' figures, and nothing that was not measured."""

import json
import re

import matplotlib.pyplot as plt
import measurements
import pytest

from benchmarks import ladder, render
from data_prep import DataError


def cells(table, name: str) -> dict[str, str]:
    """The line of a table with this name, bold or not."""
    (line,) = (line for line in table.to_dict("records") if line[""].strip("*") == name)
    return line


class TestLadder:
    def test_each_rung_has_its_factors(self):
        table = render.ladder_table(measurements.record())
        assert list(table[""][:3]) == ["the trl_seed rung", "the trl_cudnn rung", "the trl_packed rung"]
        line = cells(table, "the unsloth_seed rung")
        assert (line["articles/s"], line["x the line before"], line["x the first"]) == ("20.0", "1.48", "2.00")
        assert (line["tokens/s"], line["peak GiB"]) == ("2,000", "24.0")
        # 4 x 7.656e9 x 270 x 20 / 800e12.
        assert (line["TFLOP/s"], line["share of peak"]) == ("165", "20.7%")

    def test_a_peer_is_compared_with_the_first_rung_alone(self):
        line = cells(render.ladder_table(measurements.record()), "the peer rung")
        assert (line["x the line before"], line["x the first"]) == ("-", "5.00")

    def test_what_failed_stays_and_the_next_rung_is_compared_with_the_last_measured(self):
        results = [*measurements.without("trl_packed"), measurements.failed("trl_packed")]
        table = render.ladder_table(measurements.record(results))
        assert cells(table, "the trl_packed rung")["articles/s"] == "out of memory"
        assert cells(table, "the unsloth_seed rung")["x the line before"] == "1.98"

    def test_a_second_host_is_beside_the_first(self):
        other = measurements.record(measurements.changed("batch", articles_per_second=200.0))
        line = cells(render.ladder_table(measurements.record(), other), "the batch rung")
        assert (line["articles/s"], line["second host"]) == ("240.0", "200.0")
        assert render.spread(measurements.record(), other) == {"small": 0, "large": pytest.approx(0.2)}


class TestMethods:
    def test_the_fastest_and_the_low_memory_setting_are_bold(self):
        table = render.methods_table(measurements.record())
        # Unsloth's checkpointing takes less memory still, at 67 % of the speed.
        assert [name for name in table[""] if name.startswith("**")] == [
            "**the batch rung**",
            "**the lora_checkpointing rung**",
            "**the qlora rung**",
            "**the full rung**",
        ]
        assert cells(table, "the lora_unsloth_checkpointing rung")["of the best"] == "67%"
        best = render.best_table(measurements.record())
        assert list(best.iloc[0]) == ["LoRA", "240.0", "30.0", "170.0", "17.0"]

    def test_a_method_without_figures_is_not_measured(self):
        record = measurements.record(measurements.without("qlora"))
        assert "QLoRA" not in list(render.best_table(record)[""])


def test_scoring_has_its_ceiling():
    table = render.evaluation_table(measurements.record())
    # 800e12 / (2 x 6.5256e9 x 70 + 2 x 0.545e9 x 7) = 868.4
    line = cells(table, "scoring")
    assert (line["articles/s"], line["ceiling"], line["of the ceiling"]) == ("500.0", "868", "58%")
    assert cells(table, "generation, lean prompt")["ceiling"] == "-"
    assert cells(table, "`scoring_verbose_128`")["articles/s"] == "not measured"


def test_start_up_has_its_seconds():
    table = render.starts_table(measurements.record())
    assert cells(table, "LoRA, from the first import")["seconds"] == "45.2"
    assert cells(table, "`start_transformers`")["seconds"] == "-"


class TestPicture:
    @pytest.fixture(autouse=True)
    def closed_figures(self):
        yield
        plt.close("all")

    def test_bars_have_the_lengths_of_the_record(self):
        (axes,) = render.draw_ladder(measurements.record()).axes
        assert [bar.get_width() for bar in axes.patches] == [10, 10.1, 13.5, 20, 30, 50, 50, 60, 60, 240, 50, 0]
        assert [axes.texts[9].get_text(), axes.texts[-1].get_text()] == ["240.0", "out of memory"]


class TestDraft:
    """The page of one's own measurements, printed."""

    def test_it_has_tables_source_and_prediction(self, tmp_path, capsys):
        path = measurements.write(tmp_path / "mine.json", dirty=True)
        assert render.main([str(path)]) == 0
        printed = capsys.readouterr().out
        assert "| the batch rung | 240.0 | 4.00 | 24.00 |" in printed
        assert f"`{path}`" in printed and "commit: `0123456789`, with uncommitted changes" in printed
        assert "second host" not in printed and "Not predicted" not in printed

    @pytest.mark.parametrize(
        ("results", "gpu", "reason"),
        [
            (None, "NVIDIA B300", "the memory bandwidth of NVIDIA B300 is not known"),
            (measurements.without("lean"), "NVIDIA H100", "`lean`: not measured"),
        ],
    )
    def test_it_is_there_where_nothing_can_be_predicted(self, tmp_path, capsys, results, gpu, reason):
        path = measurements.write(tmp_path / "mine.json", results, gpu=gpu)
        assert render.main([str(path)]) == 0
        printed = capsys.readouterr().out
        assert "| the batch rung | 240.0 |" in printed
        assert re.search(rf"Not predicted: .*{reason}", printed)

    def test_a_file_that_cannot_be_read_is_one_sentence(self, tmp_path, capsys):
        assert render.main([str(tmp_path / "mine.json")]) == 2
        assert "no such file; measure it on a GPU first" in capsys.readouterr().err


class TestPublishing:
    @pytest.fixture
    def record(self, tmp_path, monkeypatch):
        path = measurements.write(tmp_path / "results" / "h100.json")
        monkeypatch.setattr(render, "PUBLISHED", (path, path))
        monkeypatch.setattr(render, "PAGE", tmp_path / "docs" / "speed.md")
        return path

    def test_page_and_picture_are_written_once(self, record):
        page = render.PAGE
        assert render.publish() == [page, page.with_suffix(".svg")]
        assert "| the batch rung | 240.0 | 240.0 | 4.00 |" in page.read_text() and "(speed.svg)" in page.read_text()
        assert render.publish() == []

    def test_what_nobody_could_repeat_is_refused(self, record):
        measurements.write(record, dirty=True)
        with pytest.raises(DataError, match="tree with uncommitted changes: commit, then measure again"):
            render.publish()
        assert not render.PAGE.exists()


PAGE = render.PAGE.read_text(encoding="utf-8")


def tables() -> list[list[dict[str, str]]]:
    """The page's tables, read back."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        head, _, *lines = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in block.splitlines())
        head = ["", *head] if len(lines[0]) > len(head) else head
        found.append([dict(zip(head, line, strict=True)) for line in lines])
    return found


class TestPage:
    """The committed page."""

    def test_it_is_what_the_records_give(self):
        assert render.page(*render.PUBLISHED, picture="speed.svg") + "\n" == PAGE
        assert "Not predicted" not in PAGE

    def test_every_measurement_is_on_it(self):
        shown = {key for part in ladder.ALL_PARTS for key in ladder.keys_of(part)}
        for path in render.PUBLISHED:
            assert {row["key"] for row in json.loads(path.read_text())["results"]} <= shown

    def test_measured_figures_are_the_record_s_own(self):
        """Each line found in the file by name and speed, without the code that made the page."""
        rows = json.loads(render.PUBLISHED[0].read_text())["results"]
        forms = {
            "tokens/s": ("tokens_per_second", "{:,.0f}"),
            "TFLOP/s": ("tflops", "{:.0f}"),
            "share of peak": ("share_of_peak", "{:.1%}"),
            "peak GiB": ("peak_gib", "{:.1f}"),
        }
        first = next(row["articles_per_second"] for row in rows if row["key"] == "trl_seed")
        checked = 0
        for line in (line for table in tables()[1:4] for line in table):
            name = line[""].strip("*")
            matching = [
                row
                for row in rows
                if row["name"].removeprefix("+ ") == name.removeprefix("+ ")
                and line["articles/s"] == f"{row.get('articles_per_second', 0):.1f}"
            ]
            if line["articles/s"] == "out of memory":
                continue
            (row,) = matching
            for column in forms.keys() & line.keys():
                field, form = forms[column]
                assert line[column] == (form.format(row[field]) if field in row else "-"), (name, column)
                checked += 1
            if "x the first" in line:
                assert line["x the first"] == f"{row['articles_per_second'] / first:.2f}"
        assert checked > 150
