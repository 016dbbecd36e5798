"""CSV files in other forms: read as pandas reads them, told how, and said; or refused with file, line and remedy."""

import codecs
import gzip
import io
import re

import pandas as pd
import pytest

from data_prep import DataError
from data_prep.sources import Files
from data_prep.task import AG_NEWS

LABELS = AG_NEWS.labels
ROWS = [(str(1 + row % 4), f"Title {row}", f"Text, number {row}; it has 'all'") for row in range(12)]
FROM_0 = [(str(int(label) - 1), *texts) for label, *texts in ROWS]
NAMED = [(LABELS[int(label) - 1], *texts) for label, *texts in ROWS]
NAMES = ["label", "title", "description"]


def written(rows=ROWS, delimiter=",", header="", begin="", end="\n", encoding="utf-8") -> bytes:
    """Rows with all fields in quotes, under a header in its own words."""
    lines = [delimiter.join(f'"{field}"' for field in row) for row in rows]
    return begin.encode() + end.join([*([header] if header else []), *lines, ""]).encode(encoding)


def exported(frame: pd.DataFrame, **how) -> bytes:
    return frame.to_csv(**how).encode()


FRAME = pd.DataFrame(ROWS, columns=["Class Index", "Title", "Description"])
LONG = [*ROWS, ("1", "Long", "x" * 200_000)]
# The file; how pandas is told to read it; what of it is said.
READ = {
    "semicolons": (written(delimiter=";"), {"sep": ";", "names": NAMES}, "in train.csv .* separated by semicolons"),
    "tabs": (written(delimiter="\t"), {"sep": "\t", "names": NAMES}, "separated by tabs"),
    "bars": (written(delimiter="|", end="\r\n"), {"sep": "|", "names": NAMES}, "separated by bars"),
    "Excel's sep": (
        written(begin="sep=,\r\n", end="\r\n"),
        {"skiprows": 1, "names": NAMES},
        "in train.csv Excel's line sep=,$",
    ),
    "Excel's sep and header": (
        written(begin="\ufeffsep=;\r\n", delimiter=";", header="label;title;description"),
        {"skiprows": 1, "sep": ";"},
        "Excel's line sep=;, a header, with label as the label and title . description as the text",
    ),
    "pandas, no quotes": (exported(FRAME, sep="\t", index=False, header=False), {"sep": "\t", "names": NAMES}, "tabs"),
    "pandas index": (
        exported(FRAME),
        {"index_col": 0, "header": 0, "names": NAMES},
        "Class Index as the label .*not read: a column without a name",
    ),
    "header in another order": (
        written([(text, label, title) for label, title, text in ROWS], header="Description,class_index,TITLE"),
        {"header": 0, "names": ["description", "label", "title"]},
        "class_index as the label and TITLE . Description as the text",
    ),
    "more columns": (
        written([("u1", *row) for row in ROWS], header="url,label,title,description"),
        {},
        "not read: url",
    ),
    "a field over the csv module's limit": (written(LONG), {"names": NAMES}, None),
    "gzip": (gzip.compress(written()), {"names": NAMES, "compression": "gzip"}, None),
    "UTF-16": (
        codecs.BOM_UTF16_BE + written(encoding="utf-16-be"),
        {"names": NAMES, "encoding": "utf-16"},
        "^in train.csv UTF-16$",
    ),
    "UTF-32": (written(encoding="utf-32"), {"names": NAMES, "encoding": "utf-32"}, "^in train.csv UTF-32$"),
    "whole floats": (
        written([(f"{label}.0", *texts) for label, *texts in ROWS]),
        {"names": NAMES},
        None,
    ),
    "names": (written(NAMED), {"names": NAMES}, "labels by name: World, Sports, Business, Sci/Tech"),
    "names, spelled otherwise": (
        written([(f" {label.upper()} ", *texts) for label, *texts in NAMED]),
        {"names": NAMES},
        "labels by name: WORLD, SPORTS",
    ),
}


def refusal(content: bytes, *, line: int | None = None, reason: str, test: bytes | None = None):
    return content, test, line, reason


REFUSED = {
    "another header": refusal(
        written(header="topic,headline,body"),
        line=1,
        reason="'topic'.*is this a header. Then its names must be class index, title, description",
    ),
    "an index without a header": refusal(
        exported(FRAME, header=False), line=1, reason="4 columns instead of 3.*pandas index.*index=False"
    ),
    "other names": refusal(
        written([(label.replace("World", "Politics"), *texts) for label, *texts in NAMED]),
        line=1,
        reason=r"'Politics'; known are: 1 \(World\).*; the files have: Politics, Sports, Business, Sci/Tech",
    ),
    "labels from 0, others from 1": refusal(
        written(FROM_0), test=written(), line=1, reason=r"label is 0 here, and 4 in test\.csv:4; count from 1"
    ),
    "labels from 1, others from 0": refusal(
        written(), test=written(FROM_0), line=None, reason=r"test\.csv:1: the label is 0 here, and 4 in train\.csv:4"
    ),
    "labels from 0 to 4": refusal(
        written([*ROWS, ("0", "Title", "Text")]), line=13, reason=r"label is 0 here, and 4 in train\.csv:4"
    ),
    "labels from 0 to 2": refusal(
        written(FROM_0[:3]),
        test=written(FROM_0[:3]),
        line=1,
        reason="unknown class index '0'.*the files have: 0, 1, 2$",
    ),
    "Git LFS": refusal(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 29470338\n",
        line=1,
        reason="this is a Git LFS pointer, not the data; .*git lfs pull",
    ),
    "cut gzip": refusal(gzip.compress(written())[:-30], reason="not gzip to its end .*cut short"),
    "a workbook": refusal(b"PK\x03\x04\x14\x00", line=1, reason="Excel workbook"),
    "a web page": refusal(b"<!DOCTYPE html>\n<html>\n", line=1, reason="this is a web page"),
    "nothing": refusal(b"", reason="the file is empty"),
    "a header alone": refusal(b"Class Index,Title,Description\n", reason="the file holds no row"),
    "an empty line at the end": refusal(written() + b"\n", line=13, reason="an empty line; delete it"),
    "cut UTF-16": refusal(codecs.BOM_UTF16_LE + written(encoding="utf-16-le")[:-1], reason="not UTF-16 .*cut short"),
    "UTF-16 without a mark": refusal(
        written(encoding="utf-16-le"), line=1, reason="it looks like utf-16-le.*encoding: utf-16-le.*iconv -f UTF-16-LE"
    ),
    "Latin-1": refusal(
        written() + '"1","Café","Text"\n'.encode("latin-1"),
        line=13,
        reason='cp1252 .Latin-1.: \'"1","Café","Text"\'.*--encoding cp1252 .*iconv -f CP1252 -t UTF-8 train.csv',
    ),
    "Windows' quotes": refusal(written() + '"1","“A”","It’s"\n'.encode("cp1252"), line=13, reason="cp1252.*“A”.*It’s"),
    "Shift-JIS": refusal(
        written([("1", "東京で株価が上昇した", "首相は会見で述べた。")], encoding="cp932"),
        line=1,
        reason="cp932.*東京.*iconv",
    ),
    "two encodings": refusal(
        written([("1", "Café", "one")]) + written([("1", "Café", "two")], encoding="latin-1"),
        line=2,
        reason="but other lines are UTF-8",
    ),
    "a NUL": refusal(written() + b'"1","a\0b","c"\n', line=13, reason="a NUL character"),
    "carriage returns": refusal(written(end="\r"), line=1, reason="carriage return alone.*convert it: tr"),
    "one carriage return": refusal(
        written() + b'"1","a","b"\r"2","c","d"\n', line=13, reason="carriage return alone ends"
    ),
    "a quote that is never closed": refusal(
        written() + b'1,Title,"Open\n2,Title,Text\n', line=13, reason="never closed"
    ),
    "a quote that swallows rows": refusal(
        written() + b'1,Title,"Open\n2,Title,Text\n3,Title,Text"\n', line=13, reason="'2,Title,Text'.*quote missing"
    ),
    "a quote within a field": refusal(written() + b'"1","a" b","c"\n', line=13, reason="must be doubled"),
}


@pytest.fixture
def folder(tmp_path):
    def make(train: bytes, test: bytes) -> Files:
        (tmp_path / "train.csv").write_bytes(train)
        (tmp_path / "test.csv").write_bytes(test)
        return Files(tmp_path, AG_NEWS)

    return make


def read(source, split="train"):
    return [(*row.texts, row.label) for row in source.rows(split)]


@pytest.mark.parametrize(("content", "pandas", "said"), READ.values(), ids=READ)
def test_another_form_is_read_as_pandas_reads_it_and_said(folder, content, pandas, said):
    source = folder(content, written())
    frame = pd.read_csv(io.BytesIO(content), dtype=str, **pandas)
    labels = [LABELS[int(label[0]) - 1] if label[0].isdigit() else label.strip().title() for label in frame["label"]]
    assert read(source) == list(zip(frame["title"], frame["description"], labels, strict=True))
    assert read(source, "test") == [(title, text, LABELS[int(label) - 1]) for label, title, text in ROWS]
    recognised = "; ".join(source.recognised())
    assert re.search(said, recognised) if said else not recognised


@pytest.mark.parametrize(("content", "test", "line", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused_with_file_line_and_remedy(folder, content, test, line, reason):
    source = folder(content, written() if test is None else test)
    where = re.escape(f"{source.at / 'train.csv'}:{line}: ") if line else ""
    with pytest.raises(DataError, match=f"^{where}.*{reason}") as refused:
        read(source)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("header", ["", "label,title,description", "Text,Label"])
def test_labels_from_0_are_read_where_no_other_reading_is_possible(folder, header):
    rows = [(f"{title} {text}", label) for label, title, text in FROM_0] if header == "Text,Label" else FROM_0
    source = folder(written(rows, header=header), written(rows[:3], header=header))
    assert [label for *_, label in read(source)] == [LABELS[int(label)] for label, *_ in FROM_0]
    assert [row.text for row in source.rows("test")] == [f"{title} {text}" for _, title, text in FROM_0[:3]]
    assert source.recognised()[-1] == "the labels 0, 1, 2, 3 stand for World, Sports, Business, Sci/Tech"


def test_lines_of_a_field_that_are_no_rows_are_text(folder):
    text = "One\nBusiness, Sports, and more\n1. One\nend"
    assert read(folder(written([*ROWS, ("1", "Title", text)]), written()))[-1] == ("Title", text, "World")


def test_the_own_form_is_not_remarkable(folder):
    assert folder(written(), codecs.BOM_UTF8 + written(end="\r\n")).recognised() == []


def test_a_packed_file_is_found_by_its_name(folder):
    source = folder(gzip.compress(written()), written())
    (source.at / "train.csv").rename(source.at / "train.csv.gz")
    assert [label for *_, label in read(source)] == [LABELS[int(label) - 1] for label, *_ in ROWS]
