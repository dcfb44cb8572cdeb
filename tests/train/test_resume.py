"""What the user is told of a run that goes on where it stopped, and of checkpoints that cannot be written."""

import resource
import signal
import sys
import time

import pytest

from dpft.harness import cli
from dpft.harness.execution import interrupts
from dpft.harness.records.store import Store, atomic
from dpft.harness.runs import registry
from dpft.harness.train import evaluation

SMALL = ["--steps", "4", "--batch-size", "60", "--epsilon", "3", "--set", "eval_every=2", "--set", "max_length=16"]
SHORT = """
import os
from dpft.methods.full import DPAdam


class Short(DPAdam):
    name = "short"

    def step(self, ask, step):
        if step == 2 and "TROUBLE" in os.environ:
            exec(os.environ["TROUBLE"])
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
    """The method `short`, dp-adam that does at its third step what TROUBLE says."""
    path = tmp_path / "short.py"
    path.write_text(SHORT)
    registry.load_plugin(path)
    yield
    registry._PLUGINS.pop()
    registry.forget()


def test_a_run_short_of_memory_goes_on_from_its_checkpoint_and_says_so(dpft, short, monkeypatch):
    monkeypatch.setenv("TROUBLE", "raise MemoryError")
    code, err = dpft("short", "--checkpoint-every", "0")
    assert code == 2 and "Out of memory" in err
    monkeypatch.delenv("TROUBLE")
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


def test_a_run_goes_on_after_an_error_of_the_machine_and_its_times_add_up(dpft, short, monkeypatch):
    monkeypatch.setenv("TROUBLE", "import time; time.sleep(1); raise RuntimeError('the card fell off the bus')")
    code, err = dpft("short", "--checkpoint-every", "0")
    assert code == 2 and "fell off the bus" in err
    [failed] = dpft.store.records()
    monkeypatch.delenv("TROUBLE")
    monkeypatch.setattr(time, "perf_counter", lambda clock=time.perf_counter: clock() + 1000)  # another machine's
    code, err = dpft("short")
    assert code == 0 and "continued from step 2 of 4" in err, err
    [record] = dpft.store.records()
    assert 1 < failed["cost"]["total_s"] < 100 and 0 < record["cost"]["total_s"] < 100
    assert record["cost"]["total_s"] > record["cost"]["train_s"] + record["cost"]["eval_s"], (
        "two steps are of the first process"
    )


def test_other_code_does_not_go_on_from_a_checkpoint(dpft, short, monkeypatch, tmp_path):
    """Half a run of the code that was wrong and half of the mended one is a run of neither."""
    monkeypatch.setenv("TROUBLE", "raise RuntimeError('a bug')")
    assert dpft("short", "--checkpoint-every", "0")[0] == 2
    (tmp_path / "short.py").write_text(SHORT + "# mended\n")
    registry._PLUGINS.pop()
    registry.load_plugin(tmp_path / "short.py")
    monkeypatch.delenv("TROUBLE")
    code, err = dpft("short")
    assert code == 0 and "was made with other code; the run starts anew" in err, err


def test_a_run_that_diverged_leaves_no_checkpoint(dpft, short, monkeypatch):
    monkeypatch.setenv("TROUBLE", "from dpft.harness.errors import Diverged; raise Diverged('not finite')")
    assert dpft("short", "--checkpoint-every", "0")[0] == 2
    assert [r["status"] for r in dpft.store.records()] == ["diverged"] and not list(dpft.store.folder.glob("*.ckpt"))


def test_a_run_whose_final_metric_is_no_number_diverged(dpft, monkeypatch):
    before = evaluation.evaluate

    def evaluate(setup, run, examples):
        return before(setup, run, examples) | ({} if examples is not None else {setup.task.metric: float("nan")})

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    code, err = dpft("last-layer")
    assert code == 2 and "accuracy of the trained model is nan" in err
    assert [r["status"] for r in dpft.store.records()] == ["diverged"]


def test_a_damaged_checkpoint_is_named(dpft, short, monkeypatch):
    monkeypatch.setenv("TROUBLE", "raise MemoryError")
    assert dpft("short", "--checkpoint-every", "0")[0] == 2
    [path] = dpft.store.folder.glob("*.ckpt")
    path.write_bytes(path.read_bytes()[:-8])
    monkeypatch.delenv("TROUBLE")
    code, err = dpft("short")
    assert code == 0 and "is damaged or of another version; the run starts anew" in err, err


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(dpft, short, monkeypatch, name, code):
    monkeypatch.setenv("TROUBLE", f"import signal; signal.raise_signal(signal.{name})")
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    found, err = dpft("short")  # no other checkpoint within 5 minutes
    assert found == code and "interrupted; finished runs are kept" in err and "Traceback" not in err
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)] == before
    monkeypatch.delenv("TROUBLE")
    found, err = dpft("short")
    assert found == 0 and "continued from step 3 of 4" in err, err


def test_a_long_step_is_not_waited_for(dpft, short, monkeypatch):
    monkeypatch.setattr(interrupts, "GRACE", 0.1)
    monkeypatch.setenv("TROUBLE", "import signal, time; signal.raise_signal(signal.SIGTERM); time.sleep(60)")
    start = time.monotonic()
    assert dpft("short", "--checkpoint-every", "0")[0] == 143 and time.monotonic() - start < 30
    monkeypatch.delenv("TROUBLE")
    assert "continued from step 2 of 4" in dpft("short")[1]


def test_what_killed_processes_left_half_written_is_removed_and_what_a_living_one_writes_is_not(dpft):
    """A checkpoint that kill -9 cut short is a whole model state that nobody would ever read."""
    dpft.store.open_for_writing()
    left = [dpft.store.folder / f".{'0' * 12}.{kind}.{pid}.tmp" for kind in ("ckpt", "json") for pid in (1, 999999)]
    for path in left[:2]:  # as an older dpft left them
        path.write_bytes(b"half")
    for path in left[2:]:
        path.mkdir()
        for name in ("lock", "one.json", ".tmpOfALibrary"):
            (path / name).write_bytes(b"half")
    with atomic(dpft.store.folder / "other.json") as living:
        living.write_bytes(b"half")
        assert dpft("last-layer", "--quiet") == (0, "")
        assert [path.exists() for path in [*left, living]] == [False] * 4 + [True]
