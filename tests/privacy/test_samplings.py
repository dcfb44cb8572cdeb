"""Batches that are not Poisson's: what they cost against other accountants and against what an attacker sees."""

import itertools
import json

import numpy
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from privacy_cases import DELTA, gaussian
from scipy import stats

from dpft.harness.errors import BadInput
from dpft.harness.privacy import Ledger, certify, epsilon, matched
from dpft.harness.privacy.calibration import Wanted, curve_of, fit
from dpft.harness.privacy.recompute import verify_record
from dpft.harness.privacy.samplings import POISSON, Cyclic, Truncated, default_cap, made

pytestmark = pytest.mark.usefixtures("own_cache")
N, B = 1000, 50


def ledger(sampling, sigma, steps, batch=B):
    found = Ledger()
    for step in range(steps):
        found.append(step, sampling.probability(batch / N), gaussian(sigma), sampling)
    return found


def by_pld(event):
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    accountant.compose(event)
    return accountant.get_epsilon(DELTA)


@pytest.mark.parametrize("cap, sigma, steps", [(55, 1.5, 20), (80, 0.8, 10)])
def test_truncated_batches_cost_what_dp_accounting_says_and_more_than_whole_ones(cap, sigma, steps):
    found = ledger(Truncated(N, cap), sigma, steps)
    lower, estimate, upper = epsilon(found.events, DELTA, 4.0)
    theirs = by_pld(SelfComposedDpEvent(Truncated(N, cap).dp_event(B / N, sigma), steps))
    assert estimate == pytest.approx(theirs, abs=2e-3) and lower < estimate < upper
    poisson = epsilon(ledger(POISSON, sigma, steps).events, DELTA, 4.0)
    assert upper > poisson[1], "a cut is never free"
    certificate = certify(found.events, DELTA, 4.0, 2)
    assert certificate["error"] is None and certificate["cross_checks"]["pld"] == pytest.approx(estimate, abs=2e-3)


@pytest.mark.parametrize("cap", [1, 2, 4])
@pytest.mark.parametrize("q", [0.3, 0.7])
def test_no_attacker_sees_more_of_one_truncated_step_than_its_divergence(cap, q):
    """Five examples, every one of whose gradients is 1 or -1 on a line: hockey-stick divergence of the exact mixtures of all
    batches, for a zero-out neighbour (who keeps a place in the batch) and for one who is not there at all."""
    x, eps, sigma = numpy.linspace(-12, 12, 4001), numpy.array([0.1, 0.5, 1.0, 2.0]), 1.0
    bounds = [Truncated(5, cap).divergence(q, sigma, way)(eps) for way in (True, False)]
    tightest = numpy.inf
    for signs in itertools.product((-1.0, 1.0), repeat=4):
        present, zeroed = (_density(x, [one, *signs], q, cap, sigma) for one in (1.0, 0.0))
        absent = _density(x, signs, q, cap, sigma)
        for without in (zeroed, absent):
            for (first, second), bound in zip(((present, without), (without, present)), bounds, strict=True):
                seen = [(numpy.maximum(first - numpy.exp(e) * second, 0)).sum() * (x[1] - x[0]) for e in eps]
                assert (seen <= bound + 1e-9).all(), (signs, seen, bound)
                tightest = min(tightest, (bound[0] - seen[0]) / bound[0])
    assert tightest < 0.5, "the bound is so wide that the test would miss a mistake"


def _density(x, gradients, q, cap, sigma):
    """Of the sum over a truncated Poisson batch, with noise."""
    n, total = len(gradients), numpy.zeros_like(x)
    for size in range(n + 1):
        chance = stats.binom.pmf(size, n, q)
        batches = list(itertools.combinations(range(n), min(size, cap)))
        for batch in batches:
            total += chance / len(batches) * stats.norm.pdf(x, sum(gradients[i] for i in batch), sigma)
    return total


@pytest.mark.parametrize("groups, steps, sigma", [(1, 20, 1.0), (2, 21, 1.0), (4, 40, 1.3), (8, 44, 2.0)])
def test_rounds_cost_what_one_poisson_step_of_a_group_costs(groups, steps, sigma):
    """As jax_privacy's amplified_bandmf_event: ceil(T / b) Poisson-sampled Gaussians at b B / N."""
    found = epsilon(ledger(Cyclic(groups), sigma, steps).events, DELTA, 4.0)
    gaussians = PoissonSampledDpEvent(groups * B / N, GaussianDpEvent(sigma))
    theirs = by_pld(SelfComposedDpEvent(gaussians, -(-steps // groups)))
    assert found[0] - 0.01 <= theirs <= found[2] + 0.01
    plain = epsilon(ledger(POISSON, sigma, steps).events, DELTA, 4.0)
    assert found[2] > plain[1] if groups > 1 else found == plain


def test_calibration_and_curve_are_those_of_rounds():
    wanted = [Wanted(2.0, DELTA, s.probability(0.05), s.participations(30), 2, (), s) for s in (POISSON, Cyclic(4))]
    plain, banded = (fit(one, "gaussian", "spherical", None, None).noise_multiplier for one in wanted)
    assert banded > plain
    found = ledger(Cyclic(4), banded, 30)
    certificate = certify(found.events, DELTA, 2.0, 2)
    assert certificate["within_budget"] and certificate["epsilon"][2] > 2.0 * 0.999


def test_truncated_calibration_meets_its_target_and_its_curve_grows_to_it():
    sampling = Truncated(N, 60)
    wanted = Wanted(2.0, DELTA, 0.05, 20, 2, (), sampling)
    noise = fit(wanted, "gaussian", "spherical", None, None)
    curve, certificate = (
        curve_of(noise, wanted),
        certify(ledger(sampling, noise.noise_multiplier, 20).events, DELTA, 2.0, 2),
    )
    assert certificate["within_budget"] and curve == sorted(curve) and len(curve) == 21
    assert curve[-1] == pytest.approx(certificate["epsilon"][2], abs=1e-9)
    assert curve[5] >= epsilon(ledger(sampling, noise.noise_multiplier, 5).events, DELTA, 2.0)[1]


def test_ledgers_hold_their_sampling_and_only_one():
    events = ledger(Cyclic(4), 1.0, 6).events
    assert len(events) == 1 and events[0]["sampling"] == {"kind": "cyclic", "groups": 4}
    assert Ledger.from_events(json.loads(json.dumps(events))).sampling == Cyclic(4)
    mixed = ledger(Truncated(N, 60), 1.0, 2)
    with pytest.raises(ValueError, match="after others that were not drawn so"):
        mixed.append(2, 0.05, gaussian(1.0), Truncated(N, 61))
    with pytest.raises(BadInput, match="only where all steps are alike"):
        Ledger.from_events([*events, {**events[0], "step_from": 6, "step_to": 7, "sampling_probability": 0.3}])
    for sampling in (Truncated(N, 60), Cyclic(2)):
        with pytest.raises(ValueError, match="one release a step"):
            Ledger().append(0, 0.05, gaussian(1.0, 2.0), sampling)
    Ledger().append(0, 0.05, gaussian(1.0, 2.0), Cyclic(1))  # one group is Poisson sampling


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "poisson"},
        {"kind": "shuffled"},
        {"kind": ["cyclic"], "groups": 2},
        {"kind": "cyclic"},
        {"kind": "cyclic", "groups": 0},
        {"kind": "cyclic", "groups": 2.0},
        {"kind": "cyclic", "groups": 2, "more": 1},
        {"kind": "truncated", "num_examples": 10, "truncated_batch_size": True},
        [],
        None,
    ],
)
def test_a_sampling_that_nobody_knows_is_refused(content):
    event = {**ledger(Cyclic(4), 1.0, 6).events[0], "sampling": content}
    with pytest.raises(BadInput, match="Event 0 of the ledger"):
        Ledger.from_events([event])


def test_another_programs_ledger_of_truncated_batches_is_recomputed():
    found = ledger(Truncated(N, 60), 1.2, 10)
    values = epsilon(found.events, DELTA, 4.0)
    privacy = {"ledger": found.events, "target": 4.0, "delta": DELTA, "epsilon": list(values), "sampling": "truncated"}
    assert verify_record({"privacy": privacy}) == []
    as_poisson = [{key: value for key, value in event.items() if key != "sampling"} for event in found.events]
    assert any(
        "the ledger's batches are poisson" in text
        for text in verify_record({"privacy": {**privacy, "ledger": as_poisson}})
    )
    assert any(
        "epsilon is recorded as" in text for text in verify_record({"privacy": {**privacy, "ledger": as_poisson}})
    )


def test_rows_of_different_samplers_do_not_match():
    common = {
        "num_examples": N,
        "sampling_probability": 0.05,
        "steps_planned": 3,
        "steps_run": 3,
        "delta": DELTA,
        "target": 2.0,
    }
    rows = [
        {**common, "adjacency": "a", "sampling": kind, "epsilon": [1.97, 1.98, 2.0]}
        for kind in ("poisson", "truncated")
    ]
    assert "differ in sampling: 'poisson' against 'truncated'" in matched(rows)


def test_settings_that_do_not_go_together():
    with pytest.raises(BadInput, match="below the expected batch size 50"):
        made("truncated", N, B, 40, 1)
    with pytest.raises(BadInput, match="probability above 1"):
        made("cyclic", N, B, None, 21)
    assert made("truncated", N, B, None, 1) == Truncated(N, default_cap(N, B))
    assert default_cap(60, 60) == 60
