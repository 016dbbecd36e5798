"""Reading prepared data back: everything that was changed since is refused."""

import errno
import json
from pathlib import Path

import pytest

from data_prep import DataError, UserError, load_manifest, prepare, read_examples
from data_prep.files import replacing, write_json, writing


@pytest.fixture
def folder(make_source, tmp_path) -> Path:
    prepare(make_source(train=80, test=20), tmp_path / "out", prompt="lean", validation_rows=12)
    return tmp_path / "out"


def rewrite_line(path: Path, number: int, line: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = line
    path.write_bytes(b"".join(lines))


def example(**changes) -> bytes:
    messages = [
        {"role": "system", "content": "Which?"},
        {"role": "user", "content": "Text"},
        {"role": "assistant", "content": '{"category":"World"}'},
    ]
    row = {"id": "train-4", "text": "Text", "label": "World", "messages": messages, "has_duplicate": False}
    return json.dumps(row | changes).encode() + b"\n"


BROKEN_LINES = {
    "cut JSON": (example()[:-20] + b"\n", "not valid JSON"),
    "an empty line": (b"\n", "not valid JSON"),
    "a byte that is not UTF-8": (b"\xff" + example(), "UTF-8"),
    "a number": (b"7\n", "not an example"),
    "a list": (b"[]\n", "not an example"),
    "no id": (example().replace(b'"id"', b'"key"'), "not an example"),
    "another word for duplicate": (example().replace(b"has_duplicate", b"has_twin"), "not an example"),
    "the first version's row": (example().replace(b'"text": "Text", "label": "World", ', b""), "not an example"),
}


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES.values(), ids=BROKEN_LINES)
def test_a_broken_line_is_refused_with_its_number(folder, line, reason):
    rewrite_line(folder / "train.jsonl", 5, line)
    with pytest.raises(DataError, match=rf"train\.jsonl:5: .*({reason})"):
        list(read_examples(folder, "train"))


@pytest.mark.parametrize("line", [example(), b""], ids=["another text", "a row less"])
def test_a_valid_change_is_refused_too(folder, line):
    rewrite_line(folder / "train.jsonl", 5, line)
    with pytest.raises(DataError, match=r"train\.jsonl: was changed"):
        list(read_examples(folder, "train"))
    assert list(read_examples(folder, "validation")), "the other splits are whole"


def test_a_file_cut_within_a_row_is_refused_with_its_last_line(folder):
    path = folder / "train.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"train\.jsonl:68: .*cut short"):
        list(read_examples(folder, "train"))


def test_a_file_cut_within_a_character_is_refused_with_its_last_line(make_source, tmp_path):
    rows = [(str(1 + row % 4), "Title", f"Text {row} 東") for row in range(20)]
    prepare(make_source(rows, rows), tmp_path / "out", prompt="lean", validation_rows=4)
    path = tmp_path / "out" / "train.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex("東".encode()) + 1])
    with pytest.raises(DataError, match=r"train\.jsonl:16: "):
        list(read_examples(tmp_path / "out", "train"))


@pytest.mark.parametrize("name", ["train.jsonl", "manifest.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: no such file"):
        list(read_examples(folder, "train"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema_version": 1}, "schema_version"),
        ({"owner": "me"}, "owner"),
        ({"seed": "many"}, "seed"),
        ({"rows": {"train": {"World": "all"}}}, "rows"),
        ({"duplicates": None}, "duplicates"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_manifest_of_another_form_is_refused_with_the_field(folder, change, named):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(DataError, match=f"not a manifest of this version .*{named}"):
        load_manifest(folder)


def test_the_fingerprint_changes_with_text_label_and_prompt(make_source, tmp_path):
    rows = [(str(1 + row % 4), "Title", f"Text {row}") for row in range(40)]
    variants = {
        "same": (rows, "lean"),
        "same again": (rows, "lean"),
        "prompt": (rows, "verbose"),
        "text": ([*rows[:-1], (*rows[-1][:2], "Another text")], "lean"),
        "label": ([*rows[:-1], ("1", *rows[-1][1:])], "lean"),
    }
    prints = {}
    for name, (train, prompt) in variants.items():
        source = make_source(train, name=name)
        manifest, _ = prepare(source, tmp_path / name, prompt=prompt, validation_rows=8)
        prints[name] = manifest.fingerprint
    assert prints["same"] == prints["same again"]
    assert len(set(prints.values())) == 4


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write("new")
        _ = 1 / 0
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file", "old")]


def test_write_json_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": "ä"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_user_errors_show_as_one_line_in_a_notebook():
    assert UserError("say what to do")._render_traceback_() == ["UserError: say what to do"]
    assert str(DataError("file.csv", "wrong", 3)) == "file.csv:3: wrong"
    assert str(DataError("file.csv", "wrong")) == "file.csv: wrong"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["Python", "PyTorch", "safetensors"],
)
def test_a_full_disk_is_one_sentence_whoever_meets_it(tmp_path, error):
    with pytest.raises(UserError, match="cannot be written: no space left on the disk"), writing(tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="another"), writing(tmp_path):
        raise RuntimeError("another")
