"""The embedded model: fetched once, whoever asks for it."""

import contextlib
import io
import shutil
import threading
import time

import pytest

from data_prep import UserError
from finetune.model import load, smollm2


def test_two_who_need_it_at_once_fetch_it_once(home, monkeypatch):
    fetching, go_on = threading.Event(), threading.Event()
    fetched = []

    def download(scratch):
        fetched.append(scratch)
        fetching.set()
        go_on.wait(60)

    monkeypatch.setattr(smollm2, "_download", download)
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, target: target.mkdir())
    first, second = (threading.Thread(target=smollm2.ensure) for _ in range(2))
    # Not capsys: what is printed while it reads gets lost.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        first.start()
        assert fetching.wait(60)
        second.start()
        while "Waiting for SmolLM2-135M-Instruct: another process fetches it" not in printed.getvalue():
            assert second.is_alive()
            time.sleep(0.01)
    go_on.set()
    first.join()
    second.join()
    assert smollm2.folder().is_dir() and len(fetched) == 1


def test_a_damaged_file_of_it_is_told(home, monkeypatch, tiny_model):
    def convert(_, target):
        shutil.copytree(tiny_model, target)
        (target / smollm2.WHOLE).write_text(smollm2._digests(target))

    monkeypatch.setattr(smollm2, "_download", lambda scratch: None)
    monkeypatch.setattr(smollm2, "_convert", convert)
    smollm2.ensure()
    smollm2.check()
    weights = smollm2.folder() / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    with pytest.raises(UserError, match="are damaged: delete this folder, and run again"):
        load.load_model("embedded")


@pytest.mark.parametrize("content", [b"", b"\x08" + bytes(40)])
def test_weights_that_are_cut_are_one_sentence(tmp_path, tiny_model, content):
    model = shutil.copytree(tiny_model, tmp_path / "copy")
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"could not be loaded .*that its files are whole"):
        load.load_model(model)
