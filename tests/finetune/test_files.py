"""Folders that appear whole or not at all, and what one process at a time may do."""

import contextlib
import io
import shutil
import threading
import time

import pytest

from finetune.files import folder_bytes, folder_digest, locked, replacing_folder


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "outputs" / "target"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("old")
    (folder / "sub" / "b").write_text("older")
    return folder


def files(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_replaces_the_old_one_whole(target, tmp_path):
    for leftover in (".target.partial", ".target.old"):
        shutil.copytree(target, target.with_name(leftover))  # by a killed process
    with replacing_folder(target) as beside:
        assert files(beside) == {}
        (beside / "c").write_text("new")
        assert files(target) == {"a": "old", "sub/b": "older"}, "the old one stays until the new one is whole"
    assert files(target) == {"c": "new"}
    assert list(target.parent.iterdir()) == [target]
    with replacing_folder(tmp_path / "x" / "y") as beside:
        (beside / "a").write_text("new")
    assert files(tmp_path / "x" / "y") == {"a": "new"}, "its parents are made"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_keeps_the_old_folder(target, tmp_path, error):
    with pytest.raises(error), replacing_folder(target) as beside:
        (beside / "a").write_text("new")
        raise error
    assert files(target) == {"a": "old", "sub/b": "older"}
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(error), replacing_folder(tmp_path / "none" / "before"):
        raise error
    assert list((tmp_path / "none").iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a").write_text("OLD"),
        lambda folder: (folder / "sub" / "b").write_text("oldest"),
        lambda folder: (folder / "a").rename(folder / "c"),
        lambda folder: (folder / "a").rename(folder / "sub" / "a"),
        lambda folder: (folder / "a").unlink(),
        lambda folder: (folder / "empty").touch(),
        lambda folder: (folder / "sub" / "README.md").touch(),
    ],
    ids=["content", "content below", "name", "place", "one less", "one more", "a README below"],
)
def test_the_digest_changes_with_any_file(target, tmp_path, change):
    before = folder_digest(target)
    assert folder_digest(shutil.copytree(target, tmp_path / "copy")) == before
    assert folder_bytes(target) == len("old") + len("older")
    (target / "README.md").write_text("for people")
    (target / ".cache").mkdir()
    (target / ".cache" / "metadata").touch()
    assert folder_digest(target) == before
    change(target)
    assert folder_digest(target) != before


def test_a_second_one_waits_for_the_first_and_says_so(tmp_path):
    log = []

    def second() -> None:
        with locked(tmp_path / "target", "waiting for the first"):
            log.append("second")

    thread = threading.Thread(target=second)
    # Not capsys: what is printed while it reads gets lost.
    with contextlib.redirect_stdout(io.StringIO()) as printed, locked(tmp_path / "target", "never printed"):
        thread.start()
        while not printed.getvalue().endswith("\n"):
            assert thread.is_alive()
            time.sleep(0.01)
        log.append("first")
    thread.join()
    assert printed.getvalue() == "waiting for the first\n" and log == ["first", "second"]


def test_a_lock_is_free_after_an_error(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "target", "waiting"):
        raise KeyboardInterrupt
    with locked(tmp_path / "target", "waiting"):
        assert capsys.readouterr().out == ""
