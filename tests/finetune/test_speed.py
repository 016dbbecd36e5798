"""The tables of speed show the file's figures, and nothing that was not measured."""

import matplotlib.pyplot as plt
import measurements
import pytest

from data_prep import DataError, UserError
from finetune import speed
from finetune.compare import plots, publish


def cells(table, name: str) -> dict[str, str]:
    """The line of a table with this name, bold or not."""
    (line,) = (line for line in table.to_dict("records") if line[""].strip("*") == name)
    return line


class TestLadder:
    def test_each_rung_has_its_factors(self):
        table = speed.ladder_table(measurements.file())
        assert list(table[""][:3]) == ["the trl_seed rung", "the trl_cudnn rung", "the trl_packed rung"]
        line = cells(table, "the unsloth_seed rung")
        assert (line["articles/s"], line["x the rung before"], line["x the first"]) == ("20.0", "1.48", "2.00")
        assert (line["tokens/s"], line["peak GiB"]) == ("2,000", "24.0")
        # 4 x 7.656e9 x 270 x 20 / 800e12.
        assert (line["TFLOP/s"], line["share of peak"]) == ("165", "20.7%")

    def test_a_peer_is_held_against_the_first_rung_alone(self):
        line = cells(speed.ladder_table(measurements.file()), "the peer rung")
        assert (line["x the rung before"], line["x the first"]) == ("-", "5.00")

    def test_what_failed_stays_and_the_next_rung_is_held_against_the_last_measured(self):
        results = [row for row in measurements.rows() if row["key"] != "trl_packed"]
        table = speed.ladder_table(measurements.file([*results, measurements.failed("trl_packed")]))
        assert cells(table, "the trl_packed rung")["articles/s"] == "out of memory"
        assert cells(table, "the unsloth_seed rung")["x the rung before"] == "1.98"

    def test_what_is_missing_says_so(self):
        table = speed.ladder_table(measurements.file(measurements.without("trl_seed")))
        assert cells(table, "`trl_seed`") == {
            "": "`trl_seed`",
            "articles/s": "not measured",
            "x the rung before": "-",
            "x the first": "-",
            "tokens/s": "-",
            "TFLOP/s": "-",
            "share of peak": "-",
            "peak GiB": "-",
        }
        assert set(table["x the first"]) == {"-"}, "without the first rung there is nothing to compare with"


class TestMethods:
    def test_the_fastest_and_the_thriftiest_that_is_still_quick_are_bold(self):
        table = speed.methods_table(measurements.file())
        bold = [line[""] for line in table.to_dict("records") if line[""].startswith("**")]
        # Unsloth's checkpointing takes less memory still, at 67 % of the speed.
        assert bold == [
            "**the batch rung**",
            "**the lora_checkpointing rung**",
            "**the qlora rung**",
            "**the full rung**",
        ]
        assert cells(table, "the lora_unsloth_checkpointing rung")["of the best"] == "67%"

    def test_a_method_without_figures_is_not_measured(self):
        table = speed.methods_table(measurements.file(measurements.without("qlora")))
        assert set(table[table["method"] == "QLoRA"]["articles/s"]) == {"not measured"}


def test_scoring_stands_beside_its_ceiling():
    table = speed.evaluation_table(measurements.file())
    # 800e12 / (2 x 6.5256e9 x 70 + 2 x 0.545e9 x 7) = 868.4
    line = cells(table, "scoring")
    assert (line["articles/s"], line["ceiling"], line["of the ceiling"]) == ("500.0", "868", "58%")
    assert cells(table, "generation, lean prompt")["ceiling"] == "-"
    assert cells(table, "`scoring_verbose_128`")["articles/s"] == "not measured"


def test_start_up_is_told():
    assert speed.start_sentence(measurements.file()) == "Start-up: 45.2 s (LoRA, from the first import)."
    assert speed.start_sentence(measurements.file(measurements.without("start"))) == "Start-up: not measured."


def test_rows_that_no_table_knows_are_shown_too():
    text = speed.throughput_text(
        measurements.file([*measurements.rows(), measurements.training("new_idea", 99.5, 100, measurements.LARGE, 20)]),
        "h100",
    )
    assert "| the new_idea rung | 99.5 |" in text


def test_the_provenance_names_gpu_commit_command_packages_and_file():
    text = speed.throughput_text(measurements.file(), "h100")
    for part in (
        "NVIDIA H100 80GB HBM3, matrix peak 800 TFLOP/s",
        "commit `0123456789`;",
        "`make demo`",
        "torch 2.0.0",
    ):
        assert part in text
    assert "`results/reference/throughput/h100.json`" in text and "unsloth None" not in text
    assert "commit `0123456789` with changes" in speed.throughput_text(measurements.file(dirty=True), "h100")


class TestPicture:
    @pytest.fixture(autouse=True)
    def closed_figures(self):
        yield
        plt.close("all")

    def test_bars_have_the_lengths_of_the_file(self):
        (axes,) = plots.ladder(measurements.file(), speed.LADDER, speed.PEERS).axes
        assert [bar.get_width() for bar in axes.patches] == [10, 10.1, 13.5, 20, 30, 50, 50, 60, 60, 240, 50, 0]
        assert axes.texts[9].get_text().strip() == "240.0  (24.0x)"
        assert axes.texts[-1].get_text().strip() == "out of memory"

    def test_it_is_the_same_bytes_each_time(self):
        first, second = (plots.as_svg(plots.ladder(measurements.file(), speed.LADDER, speed.PEERS)) for _ in range(2))
        assert first == second and first.startswith(b"<?xml")

    def test_a_file_of_which_nothing_ran_can_be_drawn(self):
        found = measurements.file([measurements.failed("trl_seed")])
        (axes,) = plots.ladder(found, speed.LADDER, speed.PEERS).axes
        assert axes.texts[0].get_text().strip() == "out of memory"


PAGE = "# A page\n\n<!-- {kind}:h100 -->\nold figures\n<!-- /{kind} -->\n\nThe end.\n"


class TestBlocks:
    @pytest.mark.parametrize(
        ("kind", "figure"),
        [
            ("throughput", "| the batch rung | 240.0 | 4.00 | 24.00 |"),
            ("claims", "10.0 to 10.1 articles/s: +1.0 %"),
            ("spark", "A prediction, not a measurement: no run on a GB10 was made"),
        ],
    )
    def test_a_block_is_made_from_its_file(self, tmp_path, kind, figure):
        measurements.write(tmp_path / "h100.json")
        page = speed.with_blocks(PAGE.format(kind=kind), tmp_path)
        assert figure in page and "old figures" not in page
        assert page.startswith("# A page\n\n<!-- ") and page.endswith(f"<!-- /{kind} -->\n\nThe end.\n")
        assert speed.with_blocks(page, tmp_path) == page

    def test_two_blocks_stay_two(self, tmp_path):
        measurements.write(tmp_path / "h100.json")
        page = speed.with_blocks(PAGE.format(kind="claims") * 2, tmp_path)
        assert page.count("<!-- claims:h100 -->") == 2 and page.count("The end.") == 2

    def test_a_block_without_its_file_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"h100\.json: no such file"):
            speed.with_blocks(PAGE.format(kind="spark"), tmp_path)

    def test_a_block_of_a_changed_tree_is_refused(self, tmp_path):
        measurements.write(tmp_path / "h100.json", dirty=True)
        with pytest.raises(DataError, match="uncommitted changes"):
            speed.with_blocks(PAGE.format(kind="throughput"), tmp_path)

    def test_a_block_without_an_end_is_refused(self, tmp_path):
        measurements.write(tmp_path / "h100.json")
        page = PAGE.format(kind="claims").replace("<!-- /claims -->", "") + PAGE.format(kind="claims")
        with pytest.raises(UserError, match=r"does not end with <!-- /claims -->"):
            speed.with_blocks(page, tmp_path)


def test_the_command_fills_the_readme_and_draws_the_ladder(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "README", tmp_path / "README.md")
    monkeypatch.setattr(publish, "FOLDER", tmp_path / "reference")
    publish.README.write_text(PAGE.format(kind="throughput"))
    path = measurements.write(publish.FOLDER / "throughput" / "h100.json")
    assert publish.regenerate() == [path.with_suffix(".svg"), publish.README]
    assert "| the batch rung | 240.0 |" in publish.README.read_text()
    assert publish.regenerate() == []
    path.with_suffix(".svg").unlink()
    assert publish.regenerate() == [path.with_suffix(".svg")]
