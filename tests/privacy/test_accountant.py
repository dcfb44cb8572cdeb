"""Accounting: agreement of accountants, composition, refusals, exact mean of the privacy loss."""

import itertools
import math
import warnings

import pytest
from privacy_cases import DELTA, events_of, gaussian, ledger_of

from dpft.harness.errors import CannotRun
from dpft.harness.privacy import Ledger, Release, calibrate, certify, epsilon, tolerance

pytestmark = pytest.mark.usefixtures("own_cache")


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
