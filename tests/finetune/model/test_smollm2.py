"""The embedded model: fetched once, whoever asks for it."""

import contextlib
import io
import threading
import time

from finetune.model import smollm2


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
