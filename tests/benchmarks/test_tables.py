"""What the README would say, printed before anything is published."""

import measurements

from benchmarks import tables


def test_every_block_is_printed(tmp_path, capsys):
    assert tables.main([str(measurements.write(tmp_path / "h100.json"))]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("## ")] == [
        "## throughput",
        "## spark",
        "## claims",
    ]
    assert "| the batch rung | 240.0 |" in printed and "Not fit to be published" not in printed


def test_a_draft_says_what_keeps_it_from_being_published(tmp_path, capsys):
    assert tables.main([str(measurements.write(tmp_path / "h100.json", dirty=True))]) == 0
    assert capsys.readouterr().out.startswith("Not fit to be published: ")


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, capsys):
    assert tables.main([str(tmp_path / "h100.json")]) == 2
    assert "no such file; measure it on a GPU first" in capsys.readouterr().err
