"""The charge for releasing the best of a random number of runs, beside the theorems of 2110.03620 written out."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import norm

from dpft.harness.cli import cli
from dpft.harness.errors import BadInput
from dpft.harness.privacy import selection
from dpft.harness.privacy.accountant import calibrate, prv_epsilon

DELTA = 1e-5
GAUSSIAN = ((1.0, 3.0, 4),)  # four releases of sigma 3, nothing sampled: RDP is 4 order / (2 sigma^2)


def to_epsilon(orders, rdp):
    """Canonne, Kamath & Steinke (2004.00010), proposition 12."""
    return np.min(rdp + np.log1p(-1 / orders) - np.log(DELTA * orders) / (orders - 1))


def negative_binomial(orders, tries, shape):
    """Theorem 2 by hand: gamma from E[K], and the best second order for each order."""
    rdp = 4 * orders / (2 * 3.0**2)
    low, high = 1e-9, 1 - 1e-12
    for _ in range(200):
        gamma = (low + high) / 2
        mean = 1 / gamma if shape == 1 else (1 / gamma - 1) / math.log(1 / gamma)
        low, high = (gamma, high) if mean > tries else (low, gamma)
    second = (1 - 1 / orders) * rdp + math.log(1 / gamma) / orders
    return rdp + (1 + shape) * second.min() + math.log(tries) / (orders - 1)


@pytest.mark.parametrize("law, shape", [("logarithmic", 0), ("geometric", 1)])
@pytest.mark.parametrize("tries", [2.0, 7.5])
def test_the_charge_is_that_of_theorem_2(law, shape, tries):
    orders = np.array(selection.ORDERS)
    expected = to_epsilon(orders, negative_binomial(orders, tries, shape))
    assert selection.selected_epsilon(GAUSSIAN, DELTA, tries, law) == pytest.approx(expected, rel=1e-6)


def test_one_try_costs_what_a_run_costs_and_never_less_than_its_certificate():
    orders = np.array(selection.ORDERS)
    alone = to_epsilon(orders, 4 * orders / 18)
    for law in ("logarithmic", "geometric"):
        assert alone <= selection.selected_epsilon(GAUSSIAN, DELTA, 1.0, law) < 1.1 * alone
    for q, steps, epsilon in ((0.01, 100, 3.0), (0.02, 20, 8.0)):
        sigma = calibrate(epsilon, DELTA, q, steps)
        certified = prv_epsilon(((q, sigma, steps),), DELTA, epsilon)[2]
        for law in selection.LAWS:
            costs = [selection.selected_epsilon(((q, sigma, steps),), DELTA, tries, law) for tries in (1.0, 2.0, 8.0)]
            assert certified < costs[0] < costs[1] < costs[2]


def test_no_attack_on_the_best_of_a_geometric_number_beats_the_charge():
    """One Gaussian release, score = release: the best is large where the example is in. Counted over 400,000 selections."""
    rng, sigma, tries, delta = np.random.default_rng(0), 1.0, 4.0, 0.02
    best = {}
    for shift in (0.0, 1.0):
        counts = rng.geometric(1 / tries, 400_000)
        # the largest of n draws has the distribution function F^n
        uniform = rng.random(len(counts)) ** (1 / counts)
        best[shift] = norm.ppf(uniform, shift, sigma)
    charge = selection.selected_epsilon(((1.0, sigma, 1),), delta, tries, "geometric")
    alone = selection.selected_epsilon(((1.0, sigma, 1),), delta, 1.0, "geometric")
    found = 0.0
    for threshold in np.linspace(-3, 5, 81):
        for inside, outside in ((1.0, 0.0), (0.0, 1.0)):
            side = (lambda x, t=threshold: x > t) if inside else (lambda x, t=threshold: x <= t)
            hits, misses = (side(best[shift]).mean() for shift in (inside, outside))
            if misses > 1e-4 and hits > delta:
                found = max(found, math.log((hits - delta) / misses))
    assert 0.8 < found < charge and alone < charge


def test_each_run_may_cost_so_much_that_the_choice_stays_within_the_target():
    q, steps, target = 0.02, 20, 8.0
    each = selection.epsilon_each(target, DELTA, q, steps, 3.0)
    assert 0.4 * target < each < 0.8 * target
    for factor, holds in ((0.999, True), (1.02, False)):
        sigma = calibrate(each * factor, DELTA, q, steps)
        assert (selection.cheapest(((q, sigma, steps),), DELTA, 3.0)[1] <= target) == holds


@pytest.mark.parametrize("tries", [0.5, math.nan, math.inf])
def test_a_mean_below_one_is_refused(tries):
    with pytest.raises(BadInput, match="mean of 1 try or more"):
        selection.selected_epsilon(GAUSSIAN, DELTA, tries, "geometric")
    with pytest.raises(BadInput, match="no law 'fixed'; take one of"):
        selection.selected_epsilon(GAUSSIAN, DELTA, 2.0, "fixed")


def test_the_plan_shows_the_charge(tmp_path):
    size = ["plan", "--task", "sentences", "--results", str(tmp_path), "--tries", "3", "--json", "--set"]
    found = CliRunner().invoke(cli, [*size, "max_length=32", "--method", "dp-adam,non-private", "--steps", "16"])
    rows = {row["method"]: row for row in json.loads(found.stdout)}
    one = rows["dp-adam"]
    assert (
        one["law of tries"] in selection.LAWS and one["epsilon for each"] < one["epsilon"] < one["epsilon of the best"]
    )
    assert "epsilon of the best" not in rows["non-private"]
    mixed = CliRunner().invoke(cli, [*size, "mechanism=laplace", "--method", "last-layer", "--steps", "4"])
    assert "No charge for a choice is known" in json.loads(mixed.stdout)[0]["problem"]
