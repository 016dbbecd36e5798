"""The CSV source reads what is right, and says where it is wrong."""

import re

import pytest

from data_prep import DataError, UserError
from data_prep.sources import Files, open_source
from data_prep.task import AG_NEWS

GOOD = b'"1","Title","Text one."\n"2","","Text two."\n'
BAD = {
    "two columns": (GOOD + b'"3","Title"\n' + GOOD, 3, "2 columns instead of 3"),
    "four columns": (GOOD + b'"3","Title","Text","more"\n' + GOOD, 3, "4 columns instead of 3"),
    "an unquoted comma": (GOOD + b"3,Title,Text, and more\n", 3, "4 columns instead of 3"),
    "a blank line": (GOOD + b"\n" + GOOD, 3, "an empty line; delete it"),
    "class 5": (GOOD + b'"5","Title","Text"\n', 3, "unknown class index '5'"),
    "class 0": (b'"0","Title","Text"\n' + GOOD, 1, "unknown class index '0'"),
    "class 1.5": (GOOD + b'"1.5","Title","Text"\n', 3, "unknown class index '1.5'"),
    "a class by another name": (GOOD + b'"Politics","Title","Text"\n', 3, "unknown class index 'Politics'"),
    "no class": (GOOD + b'"","Title","Text"\n', 3, "unknown class index ''"),
    "a header further down": (GOOD + b"Class Index,Title,Description\n", 3, "unknown class index 'Class Index'"),
    "another header": (b"topic,title,description\n" + GOOD, 1, "unknown class index 'topic'"),
    "empty text": (GOOD + b'"3","",""\n', 3, "empty text"),
    "text of spaces": (GOOD + b'"3","  ","\t "\n', 3, "empty text"),
    "a Latin-1 byte": (GOOD + b'"3","Caf\xe9","Text"\n' + GOOD, 3, "not UTF-8"),
    "UTF-16 without a mark": ('"1","Title","Text"\n'.encode("utf-16-le"), 1, "not UTF-8"),
    "a character cut in two": (GOOD + '"3","Title","São'.encode()[:-2], 3, "not UTF-8"),
    "cut within a quoted field": (GOOD + b'"3","Title","Text that ends', 3, "not valid CSV"),
    "text after a closing quote": (GOOD + b'"3","Title","Text" more\n' + GOOD, 3, "not valid CSV"),
    "an unclosed quote amid the file": (GOOD + b'"3","Title","Text\n' + GOOD + GOOD, 3, "not valid CSV"),
    "columns wrong in a row of two lines": (GOOD + b'"3","Title,\nText"\n' + GOOD, 3, "2 columns instead of 3"),
}


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_bytes(GOOD)
    return tmp_path


def read(folder, split="train"):
    return list(Files(folder, AG_NEWS).rows(split))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("content", "line", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_is_refused_with_file_line_and_reason(folder, split, content, line, reason):
    path = folder / f"{split}.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{path}:{line}: ") + f".*{reason}"):
        read(folder, split)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_missing_file_is_named(folder, missing):
    (folder / f"{missing}.csv").unlink()
    with pytest.raises(DataError, match=re.escape(str(folder / f"{missing}.csv")) + ": no such file"):
        Files(folder, AG_NEWS).splits()
    with pytest.raises(DataError, match="no such file"):
        read(folder, missing)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        Files(tmp_path / "nowhere", AG_NEWS).provenance()


@pytest.mark.parametrize(
    "prefix",
    [b"", b"\xef\xbb\xbf", b"Class Index,Title,Description\n", b'\xef\xbb\xbf"class index","title","description"\r\n'],
    ids=["plain", "BOM", "header", "BOM and header"],
)
def test_byte_order_mark_and_header_are_accepted(folder, prefix):
    (folder / "train.csv").write_bytes(prefix + GOOD)
    assert [(*row.texts, row.label) for row in read(folder)] == [
        ("Title", "Text one.", "World"),
        ("", "Text two.", "Sports"),
    ]


def test_quotes_newlines_and_windows_line_ends_are_read(folder):
    (folder / "train.csv").write_bytes('4,"He said ""go""","Two\nlines, São"\r\n3,Plain,Text\r\n'.encode())
    assert [(*row.texts, row.label) for row in read(folder)] == [
        ('He said "go"', "Two\nlines, São", "Sci/Tech"),
        ("Plain", "Text", "Business"),
    ]


def test_a_validation_file_makes_a_split(folder):
    assert Files(folder, AG_NEWS).splits() == ("train", "test")
    (folder / "validation.csv").write_bytes(GOOD)
    assert Files(folder, AG_NEWS).splits() == ("train", "validation", "test")


def test_provenance_changes_with_any_byte(folder):
    before = Files(folder, AG_NEWS).provenance()
    assert before == Files(folder, AG_NEWS).provenance()
    (folder / "test.csv").write_bytes(GOOD.replace(b"one", b"ONE"))
    assert Files(folder, AG_NEWS).provenance() != before


def test_open_source_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="task ag_news has no source 'kaggle'; its sources are: sample, csv, hub"):
        open_source("kaggle", AG_NEWS)
    with pytest.raises(UserError, match="data_path"):
        open_source("csv", AG_NEWS)


def test_open_source_finds_the_sources(folder):
    assert len(list(open_source("csv", AG_NEWS, str(folder)).rows("train"))) == 2
    assert open_source("sample", AG_NEWS).provenance()["kind"] == "sample"
    assert open_source("hub", AG_NEWS).dataset == "fancyzhx/ag_news"
