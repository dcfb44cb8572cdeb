"""What the user is told of a run that goes on where it stopped, and of checkpoints that cannot be written."""

import resource
import sys

import pytest

from dpft.harness import cli
from dpft.harness.records.store import Store
from dpft.harness.runs import registry

SMALL = ["--steps", "4", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=16"]
SHORT = """
import os
from dpft.methods.full import DPAdam


class Short(DPAdam):
    name = "short"

    def step(self, ask, step):
        if step == 2 and "MEMORY_IS_SHORT" in os.environ:
            raise MemoryError
        return super().step(ask, step)
"""


@pytest.fixture
def dpft(monkeypatch, capsys, tiny_bert, mirror, tmp_path):
    """dpft(method, *more) runs it for four steps -> (exit code, stderr); the records are in dpft.store."""

    def call(method, *more):
        command = [
            "run",
            "--task",
            "sst2",
            "--model",
            tiny_bert,
            "--data-dir",
            mirror,
            "--method",
            method,
            *SMALL,
            *more,
        ]
        monkeypatch.setattr(sys, "argv", ["dpft", *map(str, command), "--results", str(call.store.folder)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    call.store = Store(tmp_path / "runs")
    return call


@pytest.fixture
def short(tmp_path):
    """The method `short`, dp-adam that runs out of memory at its third step while MEMORY_IS_SHORT is set."""
    path = tmp_path / "short.py"
    path.write_text(SHORT)
    registry.load_plugin(path)
    yield
    registry._PLUGINS.pop()
    registry.forget()


def test_a_run_short_of_memory_goes_on_from_its_checkpoint_and_says_so(dpft, short, monkeypatch):
    monkeypatch.setenv("MEMORY_IS_SHORT", "1")
    code, err = dpft("short", "--checkpoint-every", "0")
    assert code == 2 and "Out of memory" in err
    monkeypatch.delenv("MEMORY_IS_SHORT")
    code, err = dpft("short")
    assert code == 0 and err.count("continued from step 2 of 4") == 1, err
    assert not list(dpft.store.folder.glob("*.ckpt"))
    [resumed] = dpft.store.records()
    code, err = dpft("short", "--overwrite", "--quiet")
    [whole] = dpft.store.records()
    assert (code, err) == (0, "")
    assert {key: resumed[key] for key in ("privacy", "result")} == {key: whole[key] for key in ("privacy", "result")}


def test_quiet_says_nothing_of_a_resumed_run(dpft):
    assert dpft("last-layer", "--timeout", "0.001")[0] == 2
    assert dpft("last-layer", "--quiet") == (0, "")


def test_a_checkpoint_that_cannot_be_written_is_said_once_and_costs_no_run(dpft):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes: above a record, below a checkpoint
    try:
        code, err = dpft("dp-adam", "--checkpoint-every", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 0 and err.count("No checkpoint can be written") == 1, err
    assert dpft.store.records()[0]["status"] == "done"


def test_what_a_killed_process_left_half_written_is_removed_when_the_run_is_made(tiny_bert, settings, tmp_path):
    """A checkpoint that kill -9 cut short is a whole model state that nobody would ever read."""
    from small_runs import a_spec

    from dpft.harness.execution import local as execution
    from dpft.harness.execution.progress import Quiet
    from dpft.harness.records.store import Store

    one, other = a_spec("last-layer", tiny_bert), a_spec("last-layer", tiny_bert, seed=1)
    left = [tmp_path / f".{spec.run_id}.{kind}.999999.tmp" for spec in (one, other) for kind in ("ckpt", "json")]
    for path in left:
        path.write_bytes(b"half")
    execution.run_all([one], Store(tmp_path), settings, execution.Policy(), Quiet())
    assert [path.exists() for path in left] == [False, False, True, True], "another run may be being written now"
