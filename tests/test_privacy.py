"""Accounting, calibration, curve, certificate, matching, cache and ledger."""

import itertools
import json
import math
import os
import warnings
from pathlib import Path

import pytest

from dpft.harness import cache
from dpft.harness.cache import cache_dir
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.privacy import (
    Ledger,
    Release,
    calibrate,
    certify,
    epsilon,
    epsilon_curve,
    matched,
    merged_noise_multiplier,
    tolerance,
)

DELTA = 1e-5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPFT_CACHE", str(tmp_path / "cache"))


def gaussian(*sigmas):
    return [Release(name=f"r{number}", noise_multiplier=sigma) for number, sigma in enumerate(sigmas)]


def ledger_of(*phases):
    """A ledger from (steps, q, releases) phases, booked step by step as the loop does."""
    ledger = Ledger()
    for steps, q, releases in phases:
        for _ in range(steps):
            ledger.append(ledger.steps, q, releases)
    return ledger


def events_of(q, sigma, steps):
    return ledger_of((steps, q, gaussian(sigma))).events


# -- ledger ----------------------------------------------------------------------------------------------------------


def test_ledger_is_run_length_encoded_and_round_trips():
    ledger = ledger_of((3, 0.1, gaussian(1.0)), (2, 0.1, gaussian(1.0, 2.0)), (1, 0.2, gaussian(1.0, 2.0)))
    events = ledger.events
    assert [(event["step_from"], event["step_to"]) for event in events] == [(0, 3), (3, 5), (5, 6)]
    assert ledger.steps == 6
    assert events[0] == {
        "step_from": 0,
        "step_to": 3,
        "sampling_probability": 0.1,
        "mechanism": "gaussian",
        "noise_multiplier": 1.0,
        "releases": [{"name": "r0", "mechanism": "gaussian", "noise_multiplier": 1.0, "sensitivity_ratio": 1.0}],
    }
    assert Ledger.from_events(json.loads(json.dumps(events))).events == events
    split = [{**events[0], "step_to": 1}, {**events[0], "step_from": 1}]
    assert Ledger.from_events(split).events == events[:1]
    assert Ledger.from_events([]).steps == 0


def test_ledger_cannot_be_changed_from_outside():
    ledger = ledger_of((2, 0.1, gaussian(1.0)))
    ledger.events[0]["step_to"] = 1
    ledger.events[0]["releases"].clear()
    assert ledger.events[0]["step_to"] == 2 and ledger.events[0]["releases"]


@pytest.mark.parametrize("step", [0, 1, 3, -1])
def test_ledger_takes_only_the_next_step(step):
    ledger = ledger_of((2, 0.1, gaussian(1.0)))
    with pytest.raises(ValueError, match="the next is 2"):
        ledger.append(step, 0.1, gaussian(1.0))
    assert ledger.steps == 2


@pytest.mark.parametrize(
    "q, releases", [(0.0, gaussian(1.0)), (1.1, gaussian(1.0)), (math.nan, gaussian(1.0)), (0.1, [])]
)
def test_ledger_refuses_meaningless_steps(q, releases):
    ledger = Ledger()
    with pytest.raises(ValueError):
        ledger.append(0, q, releases)
    assert ledger.steps == 0


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, "1", True])
def test_release_needs_a_finite_positive_noise_multiplier(sigma):
    with pytest.raises(ValueError, match="noise_multiplier"):
        Release(name="sum", noise_multiplier=sigma)


def test_release_refuses_what_cannot_be_accounted():
    with pytest.raises(ValueError, match="laplace"):
        Release(name="sum", mechanism="laplace", noise_multiplier=1.0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"step_from": 1}, "do not continue from step 0"),
        ({"step_to": 0}, "do not continue"),
        ({"step_to": 2.0}, "do not continue"),
        ({"sampling_probability": 0.0}, "sampling_probability"),
        ({"sampling_probability": 1.5}, "sampling_probability"),
        ({"sampling_probability": None}, "sampling_probability"),
        ({"noise_multiplier": 1.01}, "merge to 1"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"mechanism": "laplace"}, "laplace"),
        ({"releases": []}, "at least one release"),
        ({"releases": [{"name": "x"}]}, "keys"),
        ({"extra": 1}, "keys"),
    ],
)
def test_malformed_events_are_bad_input(change, words):
    event = {**events_of(0.1, 1.0, 2)[0], **change}
    with pytest.raises(BadInput, match=words):
        Ledger.from_events([event])


def test_gap_between_events_is_bad_input():
    first, second = ledger_of((2, 0.1, gaussian(1.0)), (2, 0.1, gaussian(2.0))).events
    with pytest.raises(BadInput, match="Event 1 .* do not continue from step 2"):
        Ledger.from_events([first, {**second, "step_from": 3}])


def test_merged_noise_multiplier():
    assert merged_noise_multiplier(gaussian(1.7)) == 1.7
    assert merged_noise_multiplier(gaussian(3.0, 4.0)) == pytest.approx(2.4, rel=1e-12)
    k = 9
    assert merged_noise_multiplier(gaussian(*[6.0] * k)) == pytest.approx(6.0 / math.sqrt(k), rel=1e-12)
    with pytest.raises(ValueError):
        merged_noise_multiplier([])


# -- epsilon ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "q, sigma, steps, target",
    [*itertools.product([0.01], [0.7, 1.0, 3.0], [1, 300], [4.0]), (0.2, 4.0, 50, 2.0), (1.0, 5.0, 4, 2.0)],
)
def test_two_accountants_agree(q, sigma, steps, target):
    certificate = certify(events_of(q, sigma, steps), DELTA, target)
    lower, estimate, upper = certificate["epsilon"]
    eps_error, delta_error = tolerance(target, DELTA)
    assert certificate["tolerance"] == {"eps_error": eps_error, "delta_error": delta_error}
    assert 0 <= lower < estimate < upper < estimate + 1.2 * eps_error
    assert lower <= certificate["cross_checks"]["pld"] <= upper
    assert abs(certificate["cross_checks"]["pld"] - estimate) < 0.2 * eps_error
    assert certificate["error"] is None


def test_unsubsampled_gaussian_has_the_closed_form():
    """Balle & Wang 1805.06530, Theorem 8: k full-batch steps are one Gaussian with sigma / sqrt(k)."""
    sigma, steps = 5.0, 4
    mu = math.sqrt(steps) / sigma

    def delta_at(eps):
        cdf = [0.5 * math.erfc(-x / math.sqrt(2)) for x in (mu / 2 - eps / mu, -mu / 2 - eps / mu)]
        return cdf[0] - math.exp(eps) * cdf[1]

    lower, estimate, upper = epsilon(events_of(1.0, sigma, steps), DELTA, 2.0)
    assert delta_at(upper) < DELTA < delta_at(lower)
    assert delta_at(estimate) == pytest.approx(DELTA, rel=2e-3)


def test_opacus_agrees_with_upper():
    pytest.importorskip("opacus")
    certificate = certify(events_of(0.05, 1.0, 100), DELTA, 4.0)
    assert certificate["cross_checks"]["opacus_prv"] == pytest.approx(certificate["epsilon"][2], abs=1e-4)


def test_two_gaussians_on_one_batch_are_merged():
    q, steps, sigma = 0.01, 1000, 0.8
    together = epsilon(ledger_of((steps, q, gaussian(sigma, sigma))).events, DELTA, 8.0)
    one = epsilon(events_of(q, sigma / math.sqrt(2), steps), DELTA, 8.0)
    assert together == pytest.approx(one, rel=1e-9)
    apart = epsilon(events_of(q, sigma, 2 * steps), DELTA, 8.0)  # the wrong way: two subsampled events
    assert (together[1], apart[1]) == (pytest.approx(8.97, abs=0.01), pytest.approx(4.29, abs=0.01))


def test_phases_compose_in_one_call_and_in_any_order():
    select, train = (50, 0.02, gaussian(1.0)), (200, 0.01, gaussian(1.0))
    both = epsilon(ledger_of(select, train).events, DELTA, 2.0)
    parts = [epsilon(ledger_of(phase).events, DELTA, 2.0) for phase in (select, train)]
    assert max(part[2] for part in parts) < both[0]
    assert both[2] < 0.9 * sum(part[0] for part in parts)
    assert epsilon(ledger_of(train, select).events, DELTA, 2.0) == both
    certificate = certify(ledger_of(select, train).events, DELTA, 2.0)
    assert both[0] <= certificate["cross_checks"]["pld"] <= both[2]


def test_nothing_released_costs_nothing():
    assert epsilon([], DELTA, 1.0) == (0.0, 0.0, 0.0)
    assert certify([], DELTA, 1.0)["within_budget"] is True


@pytest.mark.parametrize(
    "q, sigma, steps, delta, target, words",
    [
        (0.01, 0.2, 100, DELTA, 8.0, "noise multiplier 0.2"),
        (0.01, 1.0, 100, DELTA, 25.0, "epsilon 25.0"),
        (0.01, 1.0, 100, DELTA, 0.0, "epsilon 0.0"),
        (0.01, 1.0, 100, DELTA, math.nan, "epsilon nan"),
        (0.01, 1.0, 100, 1e-15, 1.0, "delta 1e-15"),
        (1.0, 1.2, 20, DELTA, 8.0, "above 20"),
        (0.2, 0.6, 100, DELTA, 8.0, "is above 20"),
        (0.5, 0.5, 3000, DELTA, 8.0, "increase the noise or decrease q or T"),
        (0.01, 1.0, 100_000, DELTA, 0.001, "increase epsilon or decrease T"),
    ],
)
def test_guards(q, sigma, steps, delta, target, words):
    event = {**events_of(q, sigma, 1)[0], "step_to": steps}
    with pytest.raises(CannotRun, match=words) as caught:
        epsilon([event], delta, target)
    assert str(caught.value).startswith("Cannot certify") and str(caught.value).endswith(".")
    assert caught.value.__cause__ is None
    certificate = certify([event], delta, target)
    assert certificate["within_budget"] is False
    assert certificate["epsilon"] is None and certificate["error"] == str(caught.value)


def test_exceptions_of_the_library_become_one_sentence():
    from dpft.harness.privacy.accountant import guarded

    with pytest.raises(CannotRun, match=r"change epsilon, q or T \(q=0.1 sigma=1 T=5, .*MemoryError"):  # noqa: SIM117
        with guarded(((0.1, 1.0, 5),), DELTA):
            raise MemoryError
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    mechanism = PoissonSubsampledGaussianMechanism(sampling_probability=0.1, noise_multiplier=1.0)
    with pytest.raises(CannotRun, match="ValueError: Floating point errors will dominate"):  # noqa: SIM117
        with guarded(((0.1, 1.0, 5),), DELTA):
            PRVAccountant([mechanism], 0.1, 1e-25, max_self_compositions=[5]).compute_epsilon(1e-22, [5])


def test_over_budget_is_not_within_budget():
    events = events_of(0.05, 1.0, 100)
    upper = epsilon(events, DELTA, 4.0)[2]
    assert certify(events, DELTA, 4.0)["within_budget"] is (upper <= 4.0)
    assert certify(events, DELTA, 0.5)["within_budget"] is False


# -- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, q, steps", [(0.1, 0.02, 20), (1.0, 0.01, 200), (4.0, 0.064, 60), (8.0, 0.02, 100), (2.0, 1.0, 1)]
)
def test_calibrated_noise_is_matched(target, q, steps):
    sigma = calibrate(target, DELTA, q, steps)
    lower, estimate, upper = epsilon(events_of(q, sigma, steps), DELTA, target)
    assert target * (1 - 0.025) <= estimate and upper <= target
    assert upper >= target * (1 - 0.002)
    assert certify(events_of(q, sigma, steps), DELTA, target)["within_budget"] is True


def test_calibration_is_monotone():
    by_target = [calibrate(target, DELTA, 0.05, 20) for target in (0.5, 1.0, 4.0)]
    assert by_target == sorted(by_target, reverse=True) and len(set(by_target)) == 3
    by_q = [calibrate(1.0, DELTA, q, 20) for q in (0.02, 0.05, 0.1)]
    by_steps = [calibrate(1.0, DELTA, 0.05, steps) for steps in (5, 20, 40)]
    for sigmas in (by_q, by_steps):
        assert sigmas == sorted(sigmas) and len(set(sigmas)) == 3


@pytest.mark.parametrize(
    "target, q, steps, words",
    [
        (20.0, 0.001, 5, "decrease epsilon, or increase the batch size or the number of steps"),
        (0.0005, 0.01, 100_000, "increase epsilon or decrease T"),
        (1.0, 0.0, 100, "batch size"),
        (1.0, 1.5, 100, "batch size"),
        (1.0, 0.01, 0, "T=0 steps"),
        (25.0, 0.01, 100, "epsilon 25.0"),
    ],
)
def test_unreachable_targets_say_what_to_change(target, q, steps, words):
    with pytest.raises(CannotRun, match=words):
        calibrate(target, DELTA, q, steps)


# -- curve -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "q, sigma, steps, delta", [(0.05, 1.0, 60, DELTA), (0.01, 0.8, 300, DELTA), (1.0, 6.0, 3, 1e-11)]
)
def test_curve_is_monotone_tight_and_never_understates(q, sigma, steps, delta):
    curve = epsilon_curve(sigma, q, steps, delta, 4.0)
    assert len(curve) == steps + 1 and curve[0] == 0.0
    assert all(earlier <= later for earlier, later in itertools.pairwise(curve))
    assert curve[-1] == epsilon(events_of(q, sigma, steps), delta, 4.0)[2]
    for step in {1, 2, steps // 3, steps // 2, steps - 1} - {0}:
        lower, estimate, upper = epsilon(events_of(q, sigma, step), delta, 4.0)
        assert curve[step] > estimate + 0.5 * (upper - estimate)
        assert curve[step] < upper + 0.1 + 0.02 * upper


def test_curve_of_no_steps():
    assert epsilon_curve(1.0, 0.1, 0, DELTA, 1.0) == [0.0]
    with pytest.raises(CannotRun):
        epsilon_curve(0.2, 0.1, 10, DELTA, 1.0)


# -- cache -----------------------------------------------------------------------------------------------------------


def stored_files():
    return sorted(cache_dir().rglob("*.json"))


def test_cache_is_hit_and_damage_is_recomputed():
    sigma = calibrate(3.0, DELTA, 0.1, 5)
    (path,) = stored_files()
    text = path.read_text()
    damages = [
        "",
        "{",
        "[]",
        "null",
        text[:-20],
        text.replace(str(sigma), str(sigma * 0.9)),
        json.dumps({"value": 0.9}),
    ]
    for damage in damages:
        path.write_text(damage)
        assert calibrate(3.0, DELTA, 0.1, 5) == sigma
        assert path.read_text() == text
    assert stored_files() == [path] and not list(path.parent.glob(".tmp-*"))


def test_cached_computes_once_per_input():
    calls = []

    def compute():
        calls.append(1)
        return [len(calls)]

    def always(value):
        return True

    assert [cache.cached("k", {"a": 1}, always, compute) for _ in range(3)] == [[1]] * 3
    assert cache.cached("k", {"a": 2}, always, compute) == [2]
    assert cache.cached("other", {"a": 1}, always, compute) == [3]
    assert cache.cached("k", {"a": 1}, lambda value: False, compute) == [4]
    assert cache.cached("k", {"a": 1}, always, compute) == [4]


def test_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("DPFT_CACHE", str(file / "below"))
    assert calibrate(3.0, DELTA, 0.1, 5) > 0.3
    assert file.read_text() == "in the way"


def test_cache_dir_follows_the_environment(monkeypatch):
    assert str(cache_dir()) == os.environ["DPFT_CACHE"]
    monkeypatch.delenv("DPFT_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "dpft"


# -- matched ---------------------------------------------------------------------------------------------------------


def section(**changes):
    return {
        "target": 2.0,
        "delta": DELTA,
        "adjacency": "zero-out, public N",
        "sampling": "poisson",
        "num_examples": 1000,
        "sampling_probability": 0.05,
        "steps_planned": 40,
        "steps_run": 40,
        "epsilon": [1.978, 1.988, 1.999],
    } | changes


def test_equal_budgets_are_matched():
    other_sigma = section(epsilon=[1.95, 1.96, 1.97], sampling_probability=0.05 * (1 + 1e-14))
    assert matched([section(), other_sigma, section()]) is None
    assert matched([section()]) is None and matched([]) is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_examples": 1001}, "differ in num_examples: 1000 against 1001"),
        ({"sampling_probability": 0.0501}, "differ in sampling_probability"),
        ({"steps_planned": 41, "steps_run": 41}, "differ in steps_planned"),
        ({"delta": 1e-6}, "differ in delta"),
        ({"adjacency": "replace-one"}, "differ in adjacency"),
        ({"sampling": "shuffle"}, "differ in sampling: 'poisson' against 'shuffle'"),
        ({"target": 2.01}, "differ in target"),
        ({"steps_run": 39}, "Row 2 ran 39 of its 40"),
        ({"epsilon": [1.978, 1.99, 2.0001]}, "Row 2 exceeds its budget"),
        ({"epsilon": [1.93, 1.949, 1.96]}, "Row 2 leaves budget unused"),
        ({"epsilon": [math.nan, math.nan, math.nan]}, "Row 2 exceeds its budget"),
        ({"epsilon": None}, "Row 2 has no certified epsilon"),
        ({"epsilon": [1.9]}, "Row 2 has an incomplete"),
    ],
)
def test_unmatched_rows_are_named(changes, words):
    reason = matched([section(), section(**changes)])
    assert words in reason and reason.endswith(".")


def test_rows_without_privacy_are_not_matched():
    assert matched([section(), None]) == "Row 2 is not private."
    incomplete = section()
    del incomplete["delta"]
    assert "Row 1 lacks delta" in matched([incomplete, section()])


@pytest.mark.parametrize(
    ("q", "sigma"),
    [(0.01, 1.0), (0.02, 1.0), (0.05, 0.4), (0.1, 0.4228), (0.1, 0.66), (0.25, 0.8), (0.5, 1.5), (0.9, 2.0)],
)
def test_the_mean_of_the_privacy_loss_is_right_at_every_sampling_probability(q, sigma):
    """Against brute force on a fine grid; from q = .1 on the library alone misses the mass next to log(1 - q)."""
    import numpy
    import prv_accountant.accountant as library
    from prv_accountant import PoissonSubsampledGaussianMechanism

    from dpft.harness.privacy import exact_mean

    exact_mean.install()
    loss = library.PrivacyRandomVariableTruncated(PoissonSubsampledGaussianMechanism(q, sigma), -40.0, 40.0)
    start = math.log1p(-q)
    grid = start + numpy.concatenate([[1e-15], numpy.logspace(-14, numpy.log10(40 - start), 300_000)])
    cdf = loss.cdf(grid)
    brute = 40.0 - numpy.trapezoid(numpy.nan_to_num(cdf), grid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert loss.mean() == pytest.approx(brute, abs=1e-7)


@pytest.mark.parametrize(("target", "q", "steps"), [(8.0, 0.1, 4), (8.0, 0.1, 10), (8.0, 0.25, 10), (4.0, 0.5, 20)])
def test_large_sampling_probabilities_can_be_certified(target, q, steps):
    """Small data wants large batches: q of .1 and more is ordinary there."""
    sigma = calibrate(target, 1e-4, q, steps)
    release = Release(name="gradient", noise_multiplier=sigma)
    ledger = Ledger()
    for step in range(steps):
        ledger.append(step, q, [release])
    found = certify(ledger.events, 1e-4, target)
    assert found["within_budget"], found["error"]
    assert found["cross_checks"]["pld"] == pytest.approx(found["epsilon"][1], abs=2e-3)
