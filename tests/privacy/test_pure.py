"""Pure epsilon: what one number with Laplace noise costs at delta 0, its draws, its records, and everything that has none."""

import copy
import json
import math

import numpy
import pytest
import torch
from scipy import stats
from small_runs import quiet, stopped, trained, weights

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.privacy import Release, certify, matched, pure, tail, verify_record
from dpft.harness.privacy.calibration import Noise, Wanted, curve_of, fit
from dpft.harness.privacy.ledger import Ledger
from dpft.harness.privacy.noise_kinds import ONE_NUMBER
from dpft.harness.privacy.spent import epsilon
from dpft.harness.records.verifying import verify_run
from dpft.harness.report import rows
from dpft.harness.runs.plan import plan
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.mechanism import Mechanism
from dpft.harness.train.noise import TAIL, endless_laplace, source
from dpft.harness.train.settings import Settings

LAPLACE = {"mechanism": "laplace", "noise_shape": "coordinates"}
ONE = {**LAPLACE, "directions": 1}
RUN = {"task": "low-rank", "model": "layers", "method": "dp-zo", "epsilon": 4.0, "batch_size": 200, "steps": 5}
SPEC = resolve({**RUN, **ONE, "delta": 0.0, "eval_every": 5, "eval_examples": 10})


def ledger(*kinds):
    """Of (q, sigma, steps) with one number a step."""
    made = Ledger()
    for q, sigma, steps in kinds:
        for _ in range(steps):
            made.append(made.steps, q, [Noise("laplace", sigma, ONE_NUMBER).entry("values")])
    return made


@pytest.fixture(scope="module")
def made():
    """(record, curve) of a run."""
    record, curve = run.execute(SPEC, Settings(), quiet)
    assert record["status"] == "done", record["error"]
    return json.loads(json.dumps(record)), curve


# --- what it costs


@pytest.mark.parametrize(("q", "b"), [(1.0, 2.0), (0.02, 0.3), (0.3, 1.0), (1e-4, 5.0)])
def test_a_step_costs_the_largest_ratio_of_densities_in_either_direction(q, b):
    x = numpy.linspace(-30 * b, 30 * b, 200_001)
    without, inside = stats.laplace.pdf(x, scale=b), stats.laplace.pdf(x, loc=1.0, scale=b)
    loss = numpy.log((1 - q) * without + q * inside) - numpy.log(without)
    found = pure.of_step(q, math.sqrt(2) * b)
    assert found == pytest.approx(loss.max(), rel=1e-9) and found >= -loss.min() - 1e-12
    assert found == pytest.approx(math.log(1 + q * (math.exp(1 / b) - 1)), rel=1e-9)


@pytest.mark.parametrize(("target", "q", "steps"), [(8.0, 0.05, 20), (1.0, 1.0, 1), (0.1, 0.01, 3000), (20.0, 1e-5, 7)])
def test_noise_is_the_least_that_meets_the_target(target, q, steps):
    wanted = Wanted(target, 0.0, q, steps, 2)
    noise = fit(wanted, "laplace", "coordinates", None, None)
    assert noise.parameters == {"shape": "coordinates", "dimension": 1}
    spent, curve = epsilon(ledger((q, noise.noise_multiplier, steps)).events, 0.0, target), curve_of(noise, wanted)
    assert spent[0] == spent[1] == spent[2] and target * (1 - 1e-9) < spent[2] <= target
    b = noise.noise_multiplier / math.sqrt(2)
    assert steps * math.log1p(q * math.expm1(1 / b)) == pytest.approx(target, rel=1e-9)
    assert len(curve) == steps + 1 and curve[0] == 0 and curve[-1] == spent[2] and curve == sorted(curve)
    assert curve[1] == pytest.approx(target / steps)


def test_unlike_steps_add_up_and_two_accountants_agree():
    kinds = [(0.1, 3.0, 4), (0.02, 1.0, 30)]
    whole = ledger(*kinds)
    assert pure.epsilon(whole) == pytest.approx(sum(n * pure.of_step(q, sigma) for q, sigma, n in kinds))
    found = certify(whole.events, 0.0, 4.0, 2)
    assert found["error"] is None and found["within_budget"] and found["tail_delta"] == 0.0
    assert found["cross_checks"]["pld"] == pytest.approx(found["epsilon"][2], abs=1e-3)
    assert found["cross_checks"]["pld"] >= found["epsilon"][2], "it rounds up"
    assert found["tolerance"] == {"eps_error": 0.01, "delta_error": 0.0}


def test_what_has_no_pure_epsilon_is_not_certified():
    for entry in (
        Release(name="gradient", noise_multiplier=2.0),
        Noise("laplace", 2.0, {"shape": "coordinates"}).entry("gradient"),  # a vector, for all that is known
        Noise("laplace", 2.0, {"shape": "spherical", "dimension": 1}).entry("gradient"),
    ):
        mixed = ledger((0.1, 3.0, 1))
        mixed.append(1, 0.1, [entry])
        found = certify(mixed.events, 0.0, 4.0, 2)
        assert found["epsilon"] is None and not found["within_budget"] and "delta 0" in found["error"]
    assert "ends" in certify(ledger((0.1, 3.0, 1)).events, 0.0, 4.0, 1)["error"]
    with pytest.raises(CannotRun, match="above 20"):
        pure.epsilon(ledger((1.0, 0.01, 5)))
    with pytest.raises(ValueError, match="dimension"):
        Noise("laplace", 2.0, {"shape": "coordinates", "dimension": 2}).entry("values")
    with pytest.raises(CannotRun, match="mechanism gaussian"):
        fit(Wanted(1.0, 0.0, 0.1, 5, 2), "gaussian", "spherical", None, None)


def test_with_a_delta_it_is_accounted_as_before():
    """And nothing is lacking at its end, as its draws have none."""
    events = ledger((0.1, 3.0, 5)).events
    bare = copy.deepcopy(events)
    del bare[0]["releases"][0]["parameters"]["dimension"]
    assert epsilon(events, 1e-5, 1.0) == epsilon(bare, 1e-5, 1.0)
    assert tail.missing(events, 1e-5, 2) == 0.0 < tail.missing(bare, 1e-5, 2)


# --- draws


def test_draws_are_those_of_laplace():
    uniform = source("cpu", "pure").uniform
    draws = [endless_laplace(lambda: float(uniform()[0])) for _ in range(20_000)]
    assert stats.kstest(draws, stats.laplace.cdf).pvalue > 1e-3
    assert len(set(draws)) == len(draws)


def test_draws_have_no_end():
    """A small u is no value but a step further, after which the rest is drawn anew."""
    numbers = iter([0.7, TAIL / 2, TAIL / 3, 0.5])
    assert endless_laplace(lambda: next(numbers)) == pytest.approx(-(2 * 20 * math.log(2) + math.log(2)))
    numbers = iter([0.2, *[2.0**-54] * 9, TAIL])
    found = endless_laplace(lambda: next(numbers))
    assert found == pytest.approx(200 * math.log(2)) and found > 3 * tail.REACH["laplace"]


def test_the_mechanism_releases_one_number_with_that_noise_and_nothing_else():
    mechanism = Mechanism(Noise("laplace", 0.8, dict(ONE_NUMBER)), 1.0, 10, source("cpu", "one"))
    found = torch.cat([mechanism.release({"values": torch.full((1,), 30.0)}, 2.0).values for _ in range(4000)])
    scale = 2.0 * 0.8 / math.sqrt(2) / 10
    assert stats.kstest((found - 3).numpy(), stats.laplace(scale=scale).cdf).pvalue > 1e-3
    with pytest.raises(RuntimeError, match="certified for 1"):
        mechanism.release({"values": torch.zeros(2)}, 2.0)


def test_a_run_that_was_cut_goes_on_bit_for_bit(setup_of, tmp_path):
    more = {**ONE, "delta": 0.0}
    whole = setup_of("dp-zo", **more)
    first, path = trained(whole), tmp_path / "run.ckpt"
    stopped(setup_of("dp-zo", path, **more))
    resumed, seen = setup_of("dp-zo", path, **more), []
    again = trained(resumed, lambda step, row: seen.append(step))
    assert seen[0] > 1 and again.progress.curve == first.progress.curve
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


# --- runs, records, reports


def test_a_record_says_so_and_verifies(made):
    record, curve = made
    privacy = record["privacy"]
    assert privacy["delta"] == 0 and privacy["epsilon"][2] == privacy["epsilon"][0] == pytest.approx(4.0)
    assert privacy["ledger"][0]["releases"][0]["parameters"] == ONE_NUMBER
    assert [row["epsilon"] for row in curve] == pytest.approx([0.8, 1.6, 2.4, 3.2, 4.0])
    assert verify_record(record, 5, [row["epsilon"] for row in curve]) == []
    assert verify_run(record, None).findings == ["The record has no curve beside it."]


def ledger_entry(record):
    return record["privacy"]["ledger"][0]["releases"][0]


def forged(record, how):
    privacy = record["privacy"]
    if how == "less noise":
        for one in (privacy, privacy["ledger"][0], ledger_entry(record)):
            one["noise_multiplier"] *= 0.9
    elif how == "a vector":
        del ledger_entry(record)["parameters"]["dimension"]
    elif how == "more numbers":
        ledger_entry(record)["parameters"]["dimension"] = 16
    elif how == "gaussian":
        entry = ledger_entry(record)
        del entry["parameters"]
        entry["mechanism"] = privacy["ledger"][0]["mechanism"] = privacy["mechanism"] = "gaussian"
    elif how == "a delta":
        privacy["delta"] = 1e-5
    elif how == "old noise":
        privacy["noise_stream"] = record["spec"]["noise_stream"] = 1
        del privacy["tail_delta"]
    elif how == "less epsilon":
        privacy["epsilon"] = [3.9, 3.9, 3.9]
    elif how == "another delta asked":
        record["spec"]["delta"] = None
    elif how == "a second accountant":
        privacy["cross_checks"]["pld"] = None
    elif how == "negative":
        privacy["delta"] = -1e-9
    return record


FORGED = ["less noise", "a vector", "more numbers", "gaussian", "a delta", "old noise", "less epsilon"]


@pytest.mark.parametrize("how", [*FORGED, "another delta asked", "a second accountant", "negative"])
def test_a_forged_record_is_refused(how, made):
    assert verify_record(forged(copy.deepcopy(made[0]), how), 5) != []


def test_a_spec_of_several_directions_cannot_have_it(made):
    record = copy.deepcopy(made[0])
    del record["spec"]["options"]["directions"]  # 16
    from dpft.harness.runs.spec import RunSpec

    record["run_id"] = RunSpec(**record["spec"]).run_id
    assert any("cannot be run" in text for text in verify_run(record, None).findings)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"method": "dp-zo"}, "Noise of mechanism gaussian has no pure epsilon"),
        ({"method": "dp-sgd"}, "Noise of mechanism gaussian has no pure epsilon"),
        ({"method": "dp-sgd", "mechanism": "laplace"}, "Noise of mechanism laplace has no pure epsilon"),
        ({"method": "dp-sgd", "mechanism": "lmo"}, "Noise of mechanism lmo has no pure epsilon"),
        ({"method": "dp-sgd", **LAPLACE}, "dp-sgd releases as many as what trains"),
        ({"method": "dp-zo", **ONE, "delta": -1e-9}, "delta must be at least 0"),
        ({"method": "dp-zo", **ONE, "delta": 1.0}, "delta must be less than 1"),
    ],
)
def test_everything_else_is_refused_with_a_sentence(more, says):
    with pytest.raises(BadInput, match=says):
        resolve({**RUN, "delta": 0.0, **more})


def test_it_is_another_run_with_another_plan():
    other = resolve({**RUN, **ONE, "eval_every": 5, "eval_examples": 10})
    assert other.run_id != SPEC.run_id and other.delta is None
    found, theirs = plan(SPEC, None), plan(other, None)
    assert found.delta == 0 < theirs.delta
    assert found.noise_multiplier == pytest.approx(pure.fit(4.0, 0.01, 5)) != theirs.noise_multiplier
    with pytest.raises(CannotRun, match="above 0 and at most 20"):
        plan(resolve({**RUN, **ONE, "delta": 0.0, "epsilon": 21.0}), None)


def test_reports_never_rank_it_with_a_delta(made):
    record, other = made[0], copy.deepcopy(made[0])
    other["spec"]["delta"], other["privacy"]["delta"] = None, 2.5e-5
    found = rows.groups([record, other])
    assert [len(group) for group in found] == [1, 1]
    assert "differ in delta" in matched([record["privacy"], other["privacy"]])
    assert "differ in delta" in matched([record["privacy"], other["privacy"]], free=("steps_planned",))


def test_the_tables_say_which_is_which(made, dpft, tmp_path):
    command = ["run", "--task", "low-rank", "--model", "layers", "--method", "dp-zo", "--epsilon", "4", "--steps", "5"]
    command += ["--batch-size", "200", "--set", "eval_every=5", "--set", "eval_examples=10", "--results", str(tmp_path)]
    for pair in ("directions=1", "mechanism=laplace", "noise_shape=coordinates"):
        command += ["--set", pair]
    assert dpft(*command, "--delta", "0")[0] == 0
    code, out, _ = dpft(*command)
    assert code == 0 and "(pure)" not in out
    out = dpft("report", str(tmp_path))[1]
    assert out.count("### low-rank (v1), layers, head `native`, ε ≤ 4 (pure)") == 1
    assert out.count("### low-rank (v1), layers, head `native`, ε ≤ 4\n") == 1
    assert "δ = 0 (pure)" in out and "δ = 2.5e-05" in out
    assert dpft("verify", str(tmp_path))[0] == 0
