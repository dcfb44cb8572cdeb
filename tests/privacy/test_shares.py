"""Several releases in one step share its budget: what they merge to, what their tails cost, and what a run declares."""

import json
import math
import random

import pytest
import shared_budget_cases as cases

from dpft.harness.errors import BadInput
from dpft.harness.privacy import (
    Ledger,
    Release,
    accountant,
    calibration,
    certify,
    epsilon,
    merged_noise_multiplier,
    shares,
    tail,
)
from dpft.harness.privacy.calibration import Wanted, curve_of, fit
from dpft.harness.privacy.spent import covering
from dpft.harness.runs.releases import schedule
from dpft.harness.runs.releases import shares as shares_of_step
from dpft.methods.base import Method
from dpft.methods.clipping.base import ClippingRule


def merged(sigma, found):
    multipliers = shares.noise_multipliers(sigma, found)
    return merged_noise_multiplier(Release(name=k, noise_multiplier=v) for k, v in multipliers.items())


def test_what_merges_is_never_below_sigma_and_hardly_above():
    rng = random.Random(0)
    for _ in range(2000):
        sigma, weights = rng.uniform(0.3, 50), [rng.random() ** 6 + 1e-9 for _ in range(rng.randrange(2, 7))]
        found = {f"r{i}": weight / sum(weights) for i, weight in enumerate(weights)}
        assert sigma <= merged(sigma, found) <= sigma * (1 + 2e-12)
        off = rng.uniform(-9e-10, 9e-10)  # as far from 1 as a sum may be
        assert sigma <= merged(sigma, {k: v * (1 + off) for k, v in found.items()}) <= sigma * (1 + 2e-12)
        assert shares.checked(shares.checked(found)) == shares.checked(found)
    for sigma in (0.3, 0.7355225981777119, 1 / 3):
        assert shares.noise_multipliers(sigma, {"gradient": 1.0}) == {"gradient": sigma}
        assert shares.noise_multipliers(sigma, {"gradient": 1 - 1e-10}) == {"gradient": sigma}
    assert shares.noise_multipliers(2.0, {"a": 0.99, "b": 0.01})["b"] == pytest.approx(20.0)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({}, "shares by name"),
        ([("gradient", 1.0)], "shares by name"),
        (None, "shares by name"),
        ({"": 1.0}, "called ''"),
        ({3: 1.0}, "called 3"),
        ({"gradient": 1.0, "count": 0.0}, "'count' the share 0.0"),
        ({"gradient": 1.5, "count": -0.5}, "'count' the share -0.5"),
        ({"gradient": math.nan, "count": 0.5}, "'gradient' the share nan"),
        ({"gradient": math.inf}, "'gradient' the share inf"),
        ({"gradient": True}, "'gradient' the share True"),
        ({"gradient": "1"}, "'gradient' the share '1'"),
        ({"gradient": 0.9, "count": 0.01}, "sum to 0.91, not to 1 (gradient 0.9, count 0.01)"),
        ({"gradient": 1.0, "count": 1e-8}, "not to 1"),
        ({"gradient": 0.99}, "not to 1"),
    ],
)
def test_shares_that_do_not_add_up_are_a_sentence(wrong, words):
    with pytest.raises(BadInput) as problem:
        shares.noise_multipliers(1.0, wrong)
    assert words in str(problem.value) and str(problem.value).endswith(".")


KINDS = {
    "two": ((60, (0.01, 0.99)),),
    "kinds": ((20, (1.0,)), (30, (0.5, 0.5)), (10, (0.01, 0.99))),
    "many": tuple((6, tuple(1 / k for _ in range(k))) for k in range(1, 11)),
}


def ledger_of(sigma, q, kinds, order=sorted, shuffled=False):
    """The steps booked one by one, by names as a run has them."""
    steps = [kind for number, kind in kinds for _ in range(number)]
    if shuffled:
        random.Random(0).shuffle(steps)
    ledger = Ledger()
    for step, kind in enumerate(steps):
        found = {f"r{i}": share for i, share in enumerate(order(kind))}
        releases = [Release(name=k, noise_multiplier=v) for k, v in shares.noise_multipliers(sigma, found).items()]
        ledger.append(step, q, releases)
    return ledger


@pytest.mark.parametrize("target", [1.0, 8.0])
@pytest.mark.parametrize("name", KINDS)
def test_a_run_with_several_releases_meets_its_target(name, target):
    wanted = Wanted(target, 1e-5, 0.02, 60, noise_stream=2, shares=KINDS[name])
    noise = fit(wanted, "gaussian", "spherical", None, None)
    ledger = ledger_of(noise.noise_multiplier, 0.02, KINDS[name], shuffled=True)
    found = certify(ledger.events, 1e-5, target, 2)
    assert found["within_budget"] and found["epsilon"][2] >= target * (1 - accountant.CLOSE)
    assert len(covering(ledger)) == 1, "steps that merge to one noise multiplier are accounted as one kind"
    # the certificate is computed from exactly what the noise was calibrated to
    assert wanted.delta_for(noise) == tail.checked(ledger.events, 1e-5, 2)
    curve = curve_of(noise, wanted)
    assert curve[-1] == found["epsilon"][2] and curve == sorted(curve) and len(curve) == 61
    alone = fit(Wanted(target, 1e-5, 0.02, 60, noise_stream=2), "gaussian", "spherical", None, None)
    assert noise.noise_multiplier == pytest.approx(alone.noise_multiplier, rel=1e-6)


def test_every_release_is_charged_for_its_tail(monkeypatch):
    """Where the tail is a part of delta, what is calibrated for one release a step is too little for twenty."""
    monkeypatch.setitem(tail.REACH, "gaussian", 6.5)
    monkeypatch.setattr(tail, "MOST_COORDINATES", 10**6)
    kinds = ((60, (0.05,) * 20),)
    one, twenty = (
        fit(Wanted(8.0, 1e-5, 0.02, 60, 2, shared), "gaussian", "spherical", None, None).noise_multiplier
        for shared in ((), kinds)
    )
    ledgers = [ledger_of(sigma, 0.02, kinds).events for sigma in (one, twenty)]
    few, many = (epsilon(events, tail.checked(events, 1e-5, 2), 8.0)[2] for events in ledgers)
    assert many <= 8.0 < few and twenty > one


def test_the_tail_counts_releases_and_neither_names_nor_order():
    ledger = ledger_of(1.0, 0.02, KINDS["kinds"])
    mixed = ledger_of(1.0, 0.02, KINDS["kinds"], lambda kind: sorted(kind, reverse=True), shuffled=True)
    assert len(mixed.events) > len(ledger.events)
    assert tail.missing(ledger.events, 1e-5, 2) == tail.missing(mixed.events, 1e-5, 2)
    events = json.loads(json.dumps(ledger.events))
    by_hand = sum(
        tail.missing([{**event, "releases": [release]}], 1e-5, 2) for event in events for release in event["releases"]
    )
    assert tail.missing(events, 1e-5, 2) == pytest.approx(by_hand, rel=1e-9)
    del events[-1]["releases"][-1]
    assert tail.missing(events, 1e-5, 2) < tail.missing(ledger.events, 1e-5, 2)


def test_a_run_of_single_releases_is_calibrated_as_ever(monkeypatch):
    """Nothing that a calibration on disk is found by has changed, and no name but the share makes a kind."""
    seen = []
    monkeypatch.setattr(accountant, "cached", lambda kind, inputs, valid, compute: seen.append((kind, inputs)) or 1.25)
    fit(Wanted(3.0, 1e-5, 0.02, 20, 2), "gaussian", "spherical", None, None)
    fit(Wanted(3.0, 1e-5, 0.02, 20), "gaussian", "spherical", None, None)
    inputs = {"target": 3.0, "delta": 1e-5, "q": 0.02, "steps": 20, "prv_accountant": accountant.library_version()}
    assert seen == [("sigma", {**inputs, "noise_stream": 2, "reach": tail.REACH}), ("sigma", inputs)]
    assert shares.counted([(12, {"vote": 1.0}), (8, {"gradient": 1.0})]) == ()
    two = shares.counted([(5, {"a": 0.3, "b": 0.7}), (10, {"gradient": 1.0}), (5, {"c": 0.7, "d": 0.3})])
    assert two == ((10, (0.3, 0.7)), (10, (1.0,)))
    fit(Wanted(3.0, 1e-5, 0.02, 20, 2, two), "gaussian", "spherical", None, None)
    assert seen[-1][1]["shares"] == two
    assert shares.least(0.7355225981777119, ()) == 0.7355225981777119
    assert "shares" not in Wanted(3.0, 1e-5, 0.02, 20, 2).key


def test_only_gaussians_share_a_step():
    wanted = Wanted(3.0, 1e-5, 0.02, 60, 2, KINDS["two"])
    with pytest.raises(ValueError, match="Gaussian"):
        calibration.fit(wanted, "laplace", "spherical", None, 100)
    with pytest.raises(ValueError, match="61 steps"):
        Wanted(3.0, 1e-5, 0.02, 61, 2, KINDS["two"])


class Plain(Method):
    name = "plain"


class Phased(Method):
    """One vote, then gradients, every third step with a second look."""

    name = "phased"

    def releases(self, step):
        if step == 0:
            return {"vote": 1.0}
        return {"touched": 0.2, "gradient": 0.8} if step % 3 == 0 else {"gradient": 1.0}


class Counting(ClippingRule):
    name = "counting"

    def shares(self):
        return {"below": 0.1}


def test_a_schedule_is_what_method_and_rule_declare():
    assert schedule(Plain(), ClippingRule(), 7) == ((0, 7, {"gradient": 1.0}),)
    assert schedule(Plain(), Counting(), 7) == ((0, 7, {"gradient": 0.9, "below": 0.1}),)
    together = [0.8 * 0.9, 0.8 * 0.1]
    method, rule = Phased(), Counting()
    found = schedule(method, rule, 5)
    assert [stretch[:2] for stretch in found] == [(0, 1), (1, 3), (3, 4), (4, 5)]
    assert found[0][2] == {"vote": 1.0}, "a rule goes with the gradient alone"
    assert found[2][2] == pytest.approx({"touched": 0.2, "gradient": together[0], "below": together[1]})
    method.rule = rule
    for first, last, kind in found:
        assert all(shares_of_step(method, step) == kind for step in range(first, last))


def test_declarations_that_do_not_add_up_name_the_step_or_the_rule():
    class Late(Plain):
        def releases(self, step):
            return {"gradient": 1.0} if step < 3 else {"gradient": 0.5}

    class Greedy(Counting):
        def shares(self):
            return {"below": 1.2}

    class Clashing(Counting):
        def shares(self):
            return {"touched": 0.1}

    class Own(Counting):
        def shares(self):
            return {"gradient": 0.1}

    with pytest.raises(BadInput, match="Step 3 of plain"):
        schedule(Late(), ClippingRule(), 5)
    with pytest.raises(BadInput, match="clipping rule counting"):
        schedule(Plain(), Greedy(), 5)
    with pytest.raises(BadInput, match="both release 'touched'"):
        schedule(Phased(), Clashing(), 5)
    with pytest.raises(BadInput, match="both release 'gradient'"):
        schedule(Plain(), Own(), 5)


@pytest.fixture
def several(tmp_path):
    yield cases.register(tmp_path)
    cases.unregister()


def test_a_plan_says_what_is_released_when(several):
    from dpft.harness.runs.plan import plan
    from dpft.harness.runs.resolve import resolve

    spec = resolve({"task": "digits", "method": cases.NAME, "steps": 12, "batch_size": 40})
    made = plan(spec, None)
    sigma = made.noise_multiplier
    assert [stretch[:2] for stretch in made.releases] == [(0, 5), (5, 9), (9, 10), (10, 12)]
    assert made.shares[1] == (5, 9, {"gradient": 0.99, "count": 0.01}) and made.releases[2][2] == {"gradient": sigma}
    assert made.releases[1][2] == shares.noise_multipliers(sigma, made.shares[1][2])
    assert made.noises(9) == {"gradient": made.noise} and made.noises(10) == made.noises(5) != made.noises(4)
    assert made.noises(5)["count"].entry("count").noise_multiplier == made.releases[1][2]["count"]
    ledger = cases.ledger_of(made)
    found = certify(ledger.events, made.delta, spec.epsilon, 2)
    assert found["within_budget"] and found["epsilon"][2] == made.epsilon_curve[-1]
    laplace = resolve({"task": "digits", "method": cases.NAME, "mechanism": "laplace", "noise_shape": "coordinates"})
    with pytest.raises(BadInput, match="Step 0 of several-questions releases vote and gradient; only Gaussian"):
        plan(laplace, None)


def test_a_run_of_one_release_is_planned_as_ever():
    from dpft.harness.runs.plan import plan
    from dpft.harness.runs.resolve import resolve

    made = plan(resolve({"task": "digits", "method": "dp-adam", "steps": 12, "batch_size": 40}), None)
    assert (
        made.releases == ((0, 12, {"gradient": made.noise_multiplier}),) and made.noises(11)["gradient"] == made.noise
    )
    public = plan(resolve({"task": "digits", "method": "non-private", "steps": 12}), None)
    assert public.releases == () and public.noises(0) == {} and public.shares == ((0, 12, {"gradient": 1.0}),)


def test_plans_show_shares_in_the_table_only_where_there_is_more_than_a_gradient(several, tmp_path):
    from click.testing import CliRunner

    from dpft.harness.cli import cli

    def said(method, *more):
        asked = ["plan", "--task", "digits", "--method", method, "--steps", "12", "--results", str(tmp_path), *more]
        return CliRunner().invoke(cli, asked, standalone_mode=False, catch_exceptions=False).stdout

    (row,) = json.loads(said("dp-adam", "--json"))
    assert row["releases"] == [{"from": 0, "to": 12, "shares": {"gradient": 1.0}}]
    assert "releases" not in said("dp-adam")
    (row,) = json.loads(said(cases.NAME, "--json"))
    assert row["releases"][1] == {"from": 5, "to": 9, "shares": {"gradient": 0.99, "count": 0.01}}
    text = said(cases.NAME)
    assert "5 steps: vote 50%, gradient 50%; 6 steps: gradient 99%, count 1%; 1 step: gradient" in text
    (row,) = json.loads(said(cases.NAME, "--json", "--set", "mechanism=laplace"))
    assert row["releases"] is None and "only Gaussian" in row["problem"]
