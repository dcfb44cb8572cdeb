"""What a run may spend: every noise mechanism through a whole run, secret noise, releases that were lost, the end of the plan."""

import copy
import dataclasses
import json

import pytest
import torch
from small_runs import a_spec, quiet, stopped, trained

from dpft.harness.privacy import matched, verify_record
from dpft.harness.records.store import Store
from dpft.harness.runs.plan import plan
from dpft.harness.train import checkpoint, journal, loop, run
from dpft.harness.train.parts import Run

NOISES = {
    "laplace": {"mechanism": "laplace"},
    "coordinates": {"mechanism": "laplace", "noise_shape": "coordinates"},
    "plrv": {"mechanism": "plrv", "noise_law": "gamma(9,1)"},
    "lmo": {"mechanism": "lmo", "noise_law": "0.4*gamma(2,1)+0.1*exponential(5)+0.3*uniform(0,1)"},
}


@pytest.mark.parametrize("name", NOISES)
def test_every_mechanism_is_recorded_verified_and_resumed(name, tiny_bert, settings, setup_of, tmp_path):
    one = a_spec("last-layer", tiny_bert, **NOISES[name])
    record, curve = run.execute(one, settings, quiet)
    assert record["status"] == "done", record["error"]
    record = json.loads(json.dumps(record))
    privacy = record["privacy"]
    (release,) = privacy["ledger"][0]["releases"]
    assert privacy["mechanism"] == release["mechanism"] == NOISES[name]["mechanism"]
    assert release["parameters"].get("dimension") in (None, record["cost"]["trainable_parameters"])
    assert privacy["epsilon"][2] <= 3 and curve[-1]["epsilon"] == pytest.approx(privacy["epsilon"][2], abs=1e-9)
    assert verify_record(record, 4) == []
    path = tmp_path / "run.ckpt"
    stopped(setup_of("last-layer", path, **NOISES[name]))
    again = trained(setup_of("last-layer", path, **NOISES[name])).progress.curve
    assert [row["loss"] for row in again] == [row["loss"] for row in curve], "a resumed run goes on bit for bit"
    for change in ({"dimension": 10**6}, {"shape": "coordinates"}, {"law": "1*gamma(9,2)"}, {"b": 1}):
        forged = copy.deepcopy(record)
        forged["privacy"]["ledger"][0]["releases"][0]["parameters"].update(change)
        assert verify_record(forged, 4) or change == {"shape": release["parameters"]["shape"]}
    forged = copy.deepcopy(record)
    forged["privacy"]["ledger"][0]["releases"][0]["mechanism"] = forged["privacy"]["ledger"][0]["mechanism"] = "cauchy"
    assert any("cannot be accounted" in finding for finding in verify_record(forged, 4))
    forged = copy.deepcopy(record)
    forged["privacy"]["cross_checks"]["fisher"] = 0.01
    assert any("cross-check fisher" in finding for finding in verify_record(forged, 4))


def test_secure_noise_cannot_be_repeated_and_leaves_no_state_behind(tiny_bert, settings, setup_of, tmp_path):
    one, secret = a_spec("last-layer", tiny_bert), dataclasses.replace(settings, secure_noise=True)
    records, curves = zip(*(run.execute(one, secret, quiet) for _ in range(2)), strict=True)
    assert records[0]["run_id"] == records[1]["run_id"] and curves[0] != curves[1]
    assert {r["privacy"]["noise_seed"] for r in records} == {"os"} and verify_record(records[0], 4) == []
    assert run.execute(one, settings, quiet)[0]["privacy"]["noise_seed"] == "seed of the run"
    path = tmp_path / "run.ckpt"
    budget = plan(one, settings.data_dir)

    def begun(some):
        return dataclasses.replace(run.build(one, some, budget, path), checkpoint_seconds=0.0)

    def steps(setup):
        seen = []

        def observe(step, row):
            seen.append(step)
            if len(seen) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            loop.train(setup, Run(), observe)
        return seen

    first = begun(secret)
    assert steps(first) == [1, 2]
    stored, _ = checkpoint.load(path, one.run_id)
    assert not {"sampler", "noise"} & set(stored), "a generator's state would give the noise away"
    resumed = begun(secret)
    draws = [setup.mechanism.release({"a": torch.zeros(9)}).tensors["a"] for setup in (first, resumed)]
    assert draws[0].ne(draws[1]).all()
    assert steps(resumed) == [2, 3]
    assert steps(begun(settings)) == [1, 2], (
        "steps with secret noise are not continued with known noise, nor vice versa"
    )
    journal.path_of(path).unlink()  # as Store.write does when a run has ended
    assert steps(begun(secret)) == [1, 2]


def test_a_killed_run_with_secure_noise_books_every_release_it_made(tiny_bert, settings, tmp_path):
    """Its noise cannot be drawn again: what it released after the last checkpoint is charged, and it trains fewer steps."""
    one, secret = a_spec("last-layer", tiny_bert), dataclasses.replace(settings, secure_noise=True)
    path, made = tmp_path / "run.ckpt", []

    def killed(step, row):
        made.append(step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.execute(one, secret, killed, path)
    record, curve = run.execute(one, secret, lambda step, row: made.append(step), path)
    booked = record["privacy"]["ledger"][-1]["step_to"]
    assert booked == len(made) == 4, "as many as were made, and no more than planned"
    assert (record["privacy"]["steps_lost"], len(curve)) == (1, 3)
    assert record["privacy"]["epsilon"][2] <= 3.0 and record["privacy"]["within_budget"]
    assert curve[-1]["metric"] is not None and curve[0]["epsilon"] > 0.1
    assert "lost 1 of its 4 releases" in matched([record["privacy"]])
    Store(tmp_path).write({**record, "run_id": "run"}, curve)
    assert not journal.path_of(path).exists()


def test_nothing_is_released_that_the_witness_of_secure_noise_cannot_count(tiny_bert, settings, tmp_path):
    """Where it sits on another machine, it may be gone; what is not counted there would be forgotten with this process."""
    one, secret = a_spec("last-layer", tiny_bert), dataclasses.replace(settings, secure_noise=True)
    counted = []

    def witness():
        counted.append(1)
        if len(counted) == 3:
            raise ConnectionError("gone")

    record, curve = run.execute(one, secret, lambda step, row: None, tmp_path / "run.ckpt", witness=witness)
    assert record["status"] == "error" and "gone" in record["error"] and len(curve) == 2
    assert len(counted) == record["privacy"]["ledger"][-1]["step_to"] == 3


def test_a_step_outside_the_plan_is_refused(setup_of):
    setup, declared = setup_of("dp-adam"), {"gradient": 1.0}
    late = Run()
    late.progress.step = 4
    with pytest.raises(RuntimeError, match="outside the certified plan"):
        loop._book(setup, late, declared)
    tight = dataclasses.replace(setup.plan, epsilon_curve=[0.0, 9.0, 9.0, 9.0, 9.0])
    with pytest.raises(RuntimeError, match="outside the certified plan"):
        loop._book(dataclasses.replace(setup, plan=tight), Run(), declared)
    lost = Run()
    lost.progress.lost = 4
    with pytest.raises(RuntimeError, match="outside the certified plan"):
        loop._book(setup, lost, declared)
