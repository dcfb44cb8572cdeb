"""The comparison with autograd before the first step: once for runs of one process that share all it could find fault with."""

import gc

import pytest
from small_runs import a_spec, quiet

from dpft.harness.engine import agreement
from dpft.harness.execution import local
from dpft.harness.execution.progress import Quiet
from dpft.harness.records.store import Store
from dpft.harness.train import run


@pytest.fixture
def counted(monkeypatch):
    made, check = [], agreement.check

    def counting(*arguments):
        made.append(arguments)
        return check(*arguments)

    monkeypatch.setattr(agreement, "check", counting)
    return made


def results(records):
    return [(r["status"], r["chain"]["value"], r["result"]["final"], r["diagnostics"]["alignment"]) for r in records]


def test_seeds_rates_and_budgets_of_one_method_are_compared_once(tmp_path, tiny_bert, settings, prepared_once, counted):
    alike = [{}, {"seed": 1}, {"lr": 2e-3}, {"epsilon": 5.0}]
    others = [{"clip_norm": 0.5}, {"method": "dp-lora"}, {"precision": "bf16"}]
    runs = [a_spec(tiny_bert=tiny_bert, **{"method": "dp-adam", "steps": 2, **more}) for more in alike + others]
    with prepared_once():
        shared = local.run_all(runs, Store(tmp_path / "shared"), settings, local.Policy(), Quiet())
        assert len(counted) == 1 + len(others)
        alone = [run.execute(one, settings, quiet)[0] for one in runs]
    assert len(counted) == 1 + len(others) + len(runs), "a run by itself is compared whatever was made before"
    assert results(shared) == results(alone)


def test_each_kind_of_step_and_each_command_are_compared(tmp_path, tiny_bert, settings, prepared_once, counted):
    runs = [a_spec("lp-ft", tiny_bert, seed=seed) for seed in (0, 1)]
    compared = set()
    with prepared_once():
        local.run_all(runs[:1], Store(tmp_path), settings, local.Policy(), Quiet(), compared=compared)
        assert len(counted) == 2, "the head alone, then all"
        local.run_all(runs, Store(tmp_path), settings, local.Policy(), Quiet(), compared=compared)
        assert len(counted) == 2, "a leaderboard's next round is of the same command"
        local.run_all(runs, Store(tmp_path), settings, local.Policy(overwrite=True), Quiet())
    assert len(counted) == 4, "another command has compared nothing yet"


def test_what_was_refused_or_could_not_be_told_is_compared_again(
    tmp_path, monkeypatch, tiny_bert, settings, prepared_once, counted
):
    runs = [a_spec("dp-adam", tiny_bert, seed=seed) for seed in (0, 1)]
    monkeypatch.setattr(agreement, "TOLERANCE", -1.0)
    with prepared_once():
        refused = local.run_all(runs, Store(tmp_path / "refused"), settings, local.Policy(), Quiet())
        assert [r["status"] for r in refused] == ["error", "error"]
        assert len(counted) == 2
        monkeypatch.undo()
        monkeypatch.setattr(agreement, "_check", lambda *arguments: False)
        compared = set()
        local.run_all(runs, Store(tmp_path / "untold"), settings, local.Policy(), Quiet(), compared=compared)
    assert not compared


def test_no_model_outlives_its_run(tmp_path, tiny_bert, settings):
    gc.collect()
    before = sum(type(one).__name__ == "MeanClassifier" for one in gc.get_objects())
    gc.disable()  # as long as it takes: it comes by when so many small objects were made, and models are few
    try:
        runs = [a_spec("dp-adam", tiny_bert, steps=2, seed=seed) for seed in (0, 1)]
        local.run_all(runs, Store(tmp_path), settings, local.Policy(), Quiet())
        assert sum(type(one).__name__ == "MeanClassifier" for one in gc.get_objects()) == before
    finally:
        gc.enable()


def test_what_was_compared_with_sixteen_is_not_asked_of_four(tmp_path, monkeypatch, tiny_bert, settings, prepared_once):
    """The engine asks four of its first batch unless it was compared; of half precision it may know less than the loop."""
    from dpft.harness.engine import factored

    asked, agree = [], factored.agree
    monkeypatch.setattr(factored, "agree", lambda *arguments: asked.append(1) or agree(*arguments))
    runs = [a_spec("dp-lora", tiny_bert, steps=2, seed=seed, precision="bf16") for seed in (0, 1)]
    with prepared_once():
        records = local.run_all(runs, Store(tmp_path), settings, local.Policy(), Quiet())
    assert [r["status"] for r in records] == ["done", "done"] and not asked
