"""`dpft bench`: real processes on a tiny model, the steps it times, what it counts, and its arithmetic."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from dpft.harness import cli
from dpft.harness.bench import cells, floor, launch, peers, table, whole, worker, workload
from dpft.harness.bench.cells import Cell, Job
from dpft.harness.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads cost a tiny model more than they bring
DP_ENGINES = ["factored", "opacus", "reference", "opacus-hooks", "opacus-ghost"]


def bench(*arguments):
    return [sys.executable, "-m", "dpft.harness", "bench", *map(str, arguments)]


@pytest.mark.slow
def test_the_command_measures_real_engines(dpft, tiny_bert, tmp_path):
    page = tmp_path / "SPEED.md"
    page.write_text("before\n" + "\n".join(table.MARKERS) + "\nafter\n")
    command = ["bench", "--model", tiny_bert, "--cells", "B4T8", "--rounds", 1, "--steps", 2, "--json", "-o", page]
    code, out, err = dpft(*command, "--engines", "factored,opacus-ghost")
    assert code == 0, err
    document = json.loads(out)
    assert set(document) == {"machine", "baseline", "rows", "processes", "interrupted"}
    rows = {row["row"]: row for row in document["rows"]}
    assert list(rows) == ["non-private", "factored", "opacus-ghost"]
    assert rows["non-private"]["time"] == rows["non-private"]["memory"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for process in document["processes"][:3]:
        assert process["result"]["status"] == "done", process
        assert len(process["result"]["seconds"]) == 2
        assert process["result"]["before_bytes"] <= process["result"]["peak_bytes"]
    for name in ("factored", "opacus-ghost"):
        assert rows[name]["time"]["median"] > 0 and 0 < rows[name]["floor_share"] < 1
    assert document["machine"]["versions"]["torch"] == torch.__version__
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| opacus-ghost " in text and "1.00 / 1.00" in text


@pytest.mark.slow
def test_whole_runs_are_measured_by_their_parts(dpft, tiny_bert, mirror):
    command = ["bench", "--run", "--model", tiny_bert, "--task", "sst2", "--data-dir", mirror, "--cells", "B8T16"]
    code, out, err = dpft(*command, "--logical", 24, "--steps", 3, "--rounds", 1, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [row["row"] for row in document["rows"]] == ["non-private", "dpft", "opacus-hooks", "opacus-ghost"]
    for process in document["processes"]:
        result = process["result"]
        assert result["status"] == "done", process
        waited = result["waited"]
        assert result["median_s"] == waited["train"] and min(waited["load"], waited["train"], waited["evaluate"]) > 0
        assert 0 <= waited["metric"] <= 1
    assert document["rows"][1]["time"]["median"] == pytest.approx(
        document["processes"][1]["result"]["median_s"] / document["processes"][0]["result"]["median_s"]
    )
    records = [launch.Record(Job.from_json(json.dumps(p["job"])), p["result"]) for p in document["processes"]]
    machine = {**document["machine"], "hardware": {"cpu": "this"}}
    text = table.markdown(records, "non-private", machine)
    assert "one run of 3 steps" in text and "| run " in text and "loading s" in text


@pytest.mark.parametrize(("engine", "steps"), [("non-private", 3), ("opacus-hooks", 3), ("opacus-ghost", 3)])
def test_a_peer_takes_as_many_steps_as_dpft(monkeypatch, tiny_bert, mirror, engine, steps):
    """Counted where they are taken: the inner optimizer's, once for each logical batch."""
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: (taken.append(1), step(self, *rest))[1])
    whole.run(
        Job(engine, engine, 8, 16, model=str(tiny_bert), task="sst2", data_dir=str(mirror), steps=steps, logical=24)
    )
    assert len(taken) == steps


def test_whole_runs_train_everything(dpft):
    code, _, err = dpft("bench", "--run", "--training", "lora")
    assert code == 2 and "leave out --training lora" in err
    code, _, err = dpft("bench", "--run", "--text")
    assert code == 2 and "give one of them" in err


@pytest.mark.slow
def test_an_interrupt_prints_what_is_finished_and_leaves_no_process(tiny_bert):
    command = bench("--model", tiny_bert, "--cells", "B4T8", "--engines", "factored", "--rounds", 100)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    for line in process.stderr:
        if line.startswith("[1/200]"):
            break
    process.send_signal(signal.SIGINT)  # to the command alone: its worker must not be left behind
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert "| non-private " in out
    deadline = time.monotonic() + 20
    while (left := workers(tiny_bert)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def workers(model):
    """Command lines of running workers that measure `model`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_text())
    return [line for line in found if "bench.worker" in line and str(model) in line]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "factord"], "did you mean 'factored'"),
        (["--cells", "32x64"], "'32x64'"),
        (["--cells", "B0T8"], "'B0T8'"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--text", "--methods"], "give one of them"),
        (["--text", "--task", "sst-2"], "did you mean 'sst2'"),
        (["-o", "/nowhere/SPEED.md"], "does not exist"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["dpft", "bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and message in captured.err


def test_a_cell_that_the_model_cannot_take_is_bad_input(tiny_bert):
    with pytest.raises(BadInput, match="at most 32 tokens"):
        workload.build(Job("non-private", "non-private", 4, 64, model=str(tiny_bert)))
    with pytest.raises(BadInput, match="not a multiple"):
        workload.build(Job("non-private", "non-private", 4, 8, model=str(tiny_bert), logical=6))


def update(job):
    """What one step of plain SGD at lr 1 does to the parameters, as one vector."""
    model, source = workload.build(job)
    step = peers.step_of(job, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(source(0))
    return torch.cat([(before[name] - p.detach()).flatten() for name, p in model.named_parameters()])


def job(engine, tiny_bert, **settings):
    common = {"model": str(tiny_bert), "optimizer": "sgd", "lr": 1.0, "noise_multiplier": 0.0, "clip_norm": 1e6}
    return Job(engine, engine, 4, 8, **{**common, **settings})


@pytest.mark.parametrize("logical", [None, 8])
@pytest.mark.parametrize("engine", DP_ENGINES)
def test_without_noise_and_clipping_every_engine_makes_the_non_private_step(tiny_bert, engine, logical):
    plain = update(job("non-private", tiny_bert, logical=logical))
    private = update(job(engine, tiny_bert, logical=logical))
    assert plain.norm() > 0.01
    assert (private - plain).norm() <= 1e-4 * plain.norm()


@pytest.mark.parametrize("engine", DP_ENGINES)
def test_every_engine_clips_and_adds_the_noise(tiny_bert, engine):
    clipped = update(job(engine, tiny_bert, clip_norm=1e-2))
    assert 1e-4 < clipped.norm() <= 1e-2 * 1.001, "the mean of clipped gradients is within the bound"
    noisy = update(job(engine, tiny_bert, clip_norm=1e-2, noise_multiplier=100.0))
    assert noisy.std() == pytest.approx(100 * 1e-2 / 4, rel=0.05), "sigma * C / B"


@pytest.mark.parametrize("training", ["full", "lora"])
def test_flops_of_the_model_are_three_products_per_trained_linear_layer(tiny_bert, training):
    setting = job("non-private", tiny_bert, training=training)
    model, source = workload.build(setting)
    peers.step_of(setting, model)
    loss = workload.loss_of(setting)
    work = floor.count(model, lambda batch: loss(model, batch), source(0)[0])
    linear = sum(calls * 2 * t * d * p for (t, d, p), calls in work.shapes.items())
    attention = 2 * 2 * (2 * 8 * 8 * 32)  # layers, products, tokens^2, width
    if training == "full":
        assert work.flops == 3 * (linear + attention)
    else:
        assert 2 * linear < work.flops < 3 * (linear + attention)
    assert all(p.grad is None for p in model.parameters())
    assert floor.matmul_rate(work.shapes, 4, "cpu", torch.float32) > 1e6


def test_flops_by_hand():
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    work = floor.count(net, lambda batch: net(batch["x"]).sum((1, 2)), {"x": torch.randn(7, 4, 3)})
    first, second = 2 * 4 * 3 * 5, 2 * 4 * 5 * 2
    assert work.flops == 2 * first + 3 * second, "no gradient of the input is asked for"
    assert work.gram_flops == first + second, "gradients of so few features are cheaper than grams"
    assert work.shapes == {(4, 3, 5): 1, (4, 5, 2): 1}
    assert floor.norm_flops(2, 8, 8) == 2 * 2**2 * 16


def test_every_round_measures_every_row_once_and_rotates_them():
    rows = cells.engine_rows(Job("non-private", "non-private", 0, 0), ["non-private", "factored", "opacus-ghost"])
    grid = [Cell(4, 8), Cell(8, 8)]
    jobs = cells.interleave(rows, grid, 2)
    assert len(set(jobs)) == len(jobs) == 12
    order = [[j.row for j in jobs if j.round == number and j.cell == grid[0]] for number in range(2)]
    assert order == [["non-private", "factored", "opacus-ghost"], ["factored", "opacus-ghost", "non-private"]]
    assert Job.from_json(jobs[-1].to_json()) == jobs[-1]


def test_cells_and_engines_are_read():
    assert cells.parse_cells("B32T64, B1T8") == [Cell(32, 64), Cell(1, 8)]
    assert [cell.name for cell in cells.parse_cells("all")][::5] == ["B32T64", "B128T128"]
    assert cells.parse_engines("factored") == ["non-private", "factored"]
    assert cells.parse_engines("factored,non-private") == ["non-private", "factored"]


def record(row, number, seconds, peak, share=None):
    result = {"status": "done", "reason": None, "seconds": [seconds], "median_s": seconds, "peak_bytes": peak}
    result |= {"before_bytes": 0, "threads": 2}
    if share is not None:
        result["floor"] = {"non_private_s": share, "private_s": 2 * share, "flops_per_second": 1e9}
    return launch.Record(Job(row, row, 4, 8, round=number), result)


def test_ratios_are_paired_within_a_round():
    records = [
        record("non-private", 0, 1.0, 100, 0.5),
        record("factored", 0, 1.2, 150),
        record("factored", 1, 4.0, 110),
        record("non-private", 1, 2.0, 100, 1.0),  # the machine was busy in this round
        record("non-private", 2, 1.0, 100, 0.5),
        record("factored", 2, 1.1, 120),
        record("factored", 3, 9.0, 120),  # interrupted: its pair is missing
        launch.Record(Job("opacus-hooks", "opacus-hooks", 4, 8), {"status": "failed", "reason": "no memory"}),
    ]
    plain, factored, hooks = table.aggregate(records, "non-private")
    assert plain.time == table.Spread(1.0, 1.0, 1.0) and plain.floor_share == 0.5
    assert factored.time == table.Spread(1.2, 1.1, 2.0) and factored.memory == table.Spread(1.2, 1.1, 1.5)
    assert factored.floor_share == pytest.approx(1 / 1.2) and factored.seconds == 2.6
    assert hooks.time is None and hooks.status == "failed"
    machine = {"versions": dict.fromkeys(("torch", "opacus", "transformers", "dpft"), "1"), "git": None}
    text = table.markdown(records, "non-private", {**machine, "hardware": {"cpu": "abacus"}})
    assert "| 1.20 (1.10-2.00) / 1.20 | 83% " in text and "| 2.00 " in text and "abacus" in text


def test_a_row_is_measured_by_phases_too(tiny_bert):
    decoders = {row.row: row for row in cells.decoder_rows(job("factored", tiny_bert, steps=1), ["mean", "rmt"])}
    assert list(decoders) == ["mean", "rmt"] and decoders["rmt"].method == "dp-adam"
    records = []
    for one in decoders.values():
        model, source = workload.build(one)
        result = worker.measure(one, model, source)
        assert set(result["phases"]) == {"forward", "backward", "clip", "noise", "decode", "optimizer"}
        assert 0.2 * result["median_s"] < sum(result["phases"].values()) <= result["median_s"]
        records.append(launch.Record(one, {"status": "done", "reason": None, **result}))
    machine = {"versions": dict.fromkeys(("torch", "opacus", "transformers", "dpft"), "1"), "git": None}
    text = table.markdown(records, "mean", {**machine, "hardware": {"cpu": "abacus"}})
    line = next(line for line in text.split("Where the time goes")[1].splitlines() if line.startswith("| rmt"))
    share = records[1].result["phases"]["decode"] / records[0].result["median_s"]
    assert float(line.split("|")[7]) == pytest.approx(share, abs=1e-3)
