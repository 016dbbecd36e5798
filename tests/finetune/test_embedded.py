"""The embedded model: fetched once, whoever asks for it."""

import threading

from finetune import embedded


def test_two_who_need_it_at_once_fetch_it_once(home, monkeypatch, capsys):
    fetching, go_on = threading.Event(), threading.Event()
    fetched = []

    def download(scratch):
        fetched.append(scratch)
        fetching.set()
        go_on.wait(60)

    monkeypatch.setattr(embedded, "_download", download)
    monkeypatch.setattr(embedded, "_convert", lambda gguf, target: target.mkdir())
    first, second = (threading.Thread(target=embedded.ensure) for _ in range(2))
    first.start()
    assert fetching.wait(60)
    second.start()
    while "Waiting for SmolLM2-135M-Instruct: another process fetches it" not in capsys.readouterr().out:
        assert second.is_alive()
    go_on.set()
    first.join()
    second.join()
    assert embedded.folder().is_dir() and len(fetched) == 1
