"""Accounting of noise of random scale: divergences, bounds, the second accountant, Laplace coordinates."""

import itertools
import math

import numpy
import pytest
from noise_cases import DELTA, events_of, spherical
from scipy import integrate, special, stats

from dpft.harness.privacy import epsilon, mixtures, noise_kinds
from dpft.harness.privacy.calibration import PUBLISHED_LAW, Noise
from dpft.harness.privacy.mixture_check import epsilon_by_fft
from dpft.harness.privacy.scale_law import parse

pytestmark = pytest.mark.usefixtures("noise_cache")


def laplace_divergence(gamma, inverse=1.0):
    """Hockey-stick divergence of scalar Laplace noise of scale 1/inverse and shift 1."""
    gamma = numpy.asarray(gamma, dtype=float)
    eps = numpy.abs(numpy.log(numpy.maximum(gamma, 1e-300)))
    high = numpy.where(eps < inverse, -numpy.expm1((numpy.minimum(eps, inverse) - inverse) / 2), 0.0)
    return numpy.where(gamma >= 1, high, 1 - gamma + gamma * high)


def test_subsampling_of_laplace_noise_in_both_directions():
    """b = 1, q = .01, T = 1000, delta 1e-5: removing 1.1237, adding 1.0711; the same as dp-accounting's own."""
    from dp_accounting.pld import privacy_loss_distribution

    theirs = privacy_loss_distribution.from_laplace_mechanism(
        1.0, value_discretization_interval=1e-4, sampling_prob=0.01
    )
    for remove, known, other in ((True, 1.1237, theirs._pmf_remove), (False, 1.0711, theirs._pmf_add)):
        step = mixtures.distribution(mixtures.sampled_delta(laplace_divergence, 0.01, remove), 1e-4, 1e-12)
        found = step.self_compose(1000).get_epsilon_for_delta(1e-5)
        assert found == pytest.approx(known, abs=2e-4)
        assert found == pytest.approx(other.self_compose(1000).get_epsilon_for_delta(1e-5), abs=2e-4)


def kind(q, steps, law="", number=1.0):
    return ((q, (law, number), steps),)


@pytest.mark.parametrize("q, sigma, steps, target", [(0.01, 0.8, 300, 4.0), (0.2, 4.0, 50, 2.0), (1.0, 5.0, 4, 2.0)])
def test_a_single_scale_is_the_gaussian_accountant(q, sigma, steps, target):
    kinds = kind(q, steps, "", sigma)
    parts = mixtures.distributions(kinds, DELTA, 0.01)
    found = mixtures.composed_epsilon(parts, [steps], DELTA)
    lower, estimate, upper = epsilon(events_of(Noise("gaussian", sigma), q, steps), DELTA, target)
    assert lower <= found <= upper and found == pytest.approx(estimate, abs=2e-3)


def test_laplace_in_many_dimensions_is_the_gaussian_and_in_few_it_costs_more():
    q, steps = 0.02, 50
    gaussian = epsilon(events_of(Noise("gaussian", 1.0), q, steps), DELTA, 2.0)
    found = [epsilon(events_of(spherical(1.0, d), q, steps), DELTA, 2.0)[1] for d in (30, 300, 10**4, 10**8)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(gaussian[1], abs=2e-3)
    assert all(value >= gaussian[0] for value in found)


def exact_divergence(eps, inverse, dimension):
    """delta(eps) of density exp(-u||z||) and a shift of norm 1, from the law of the loss u(||z - v|| - ||z||)."""

    def above(level, sign):  # P(sign * loss > level)
        def at(r):
            a = sign * level / inverse  # the loss is over u a where cos < (1 - a^2)/(2r) - a
            threshold = (1 - a * a) / (2 * r) - a
            share = special.betainc((dimension - 1) / 2, (dimension - 1) / 2, numpy.clip((1 + threshold) / 2, 0, 1))
            return (share if sign > 0 else 1 - share) * stats.gamma(dimension, scale=1 / inverse).pdf(r)

        if level >= inverse:
            return 0.0
        middle, width = dimension / inverse, math.sqrt(dimension) / inverse
        ends = [1e-9, *(max(1e-9, middle + k * width) for k in (-6, -3, -1, 0, 1, 3, 6, 20))]
        return sum(integrate.quad(at, low, high, limit=200)[0] for low, high in itertools.pairwise(ends) if high > low)

    return above(eps, 1) - math.exp(eps) * above(eps, -1)


@pytest.mark.parametrize("dimension, inverse", [(2, 1.0), (3, 2.0), (10, 3.0), (200, 14.0)])
def test_revealing_the_scale_is_never_below_the_exact_divergence(dimension, inverse):
    bound = mixtures.base_delta(*mixtures.scales(parse(f"constant({inverse})"), dimension))
    for eps in (0.0, 0.2, 0.6, 1.5):
        exact, found = exact_divergence(eps, inverse, dimension), float(bound(numpy.array([math.exp(eps)]))[0])
        assert found >= exact - 1e-7
        if dimension == 200:
            assert found == pytest.approx(exact, rel=0.05, abs=1e-4)


def test_exact_divergence_is_that_of_simulated_noise():
    dimension, inverse, eps, count = 3, 2.0, 0.4, 400_000
    rng = numpy.random.default_rng(0)
    z = rng.normal(size=(count, dimension))
    z *= (rng.gamma(dimension, 1 / inverse, count) / numpy.linalg.norm(z, axis=1))[:, None]
    shifted = z - numpy.array([1.0, 0, 0])
    loss = inverse * (numpy.linalg.norm(shifted, axis=1) - numpy.linalg.norm(z, axis=1))
    simulated = numpy.maximum(1 - numpy.exp(eps - loss), 0)
    assert exact_divergence(eps, inverse, dimension) == pytest.approx(simulated.mean(), abs=5e-3)


def test_scales_are_rounded_down_and_lose_no_mass():
    law, dimension = parse(PUBLISHED_LAW), 50
    values, masses, lost = mixtures.scales(law, dimension)
    assert masses.sum() + lost >= 1 - 1e-12 and 0 < lost < 1e-12
    rng = numpy.random.default_rng(0)
    u = 0.4 * rng.gamma(2, 1, 200_000) + 0.1 * rng.exponential(1 / 5, 200_000) + 0.3 * rng.uniform(0, 1, 200_000)
    s = numpy.sqrt(2 * rng.gamma((dimension + 1) / 2, 1, 200_000)) / u
    for level in numpy.quantile(s, [0.001, 0.01, 0.1, 0.5, 0.9, 0.99]):
        below, sampled = masses[values <= level].sum(), (s <= level).mean()
        assert below >= sampled - 0.004 and below <= sampled + 0.07


@pytest.mark.parametrize("text, dimension", [("constant(27)", 770), ("9*gamma(9,0.5)", 770), (f"{PUBLISHED_LAW}", 40)])
def test_the_second_accountant_agrees(text, dimension):
    law = parse(text)
    law = law.scaled(noise_kinds.spread(law, dimension) / (3.0 if len(law.terms) > 1 else 1.2))
    kinds = kind(0.02, 20, str(law), dimension)
    parts = mixtures.distributions(kinds, DELTA, 0.01)
    found = mixtures.composed_epsilon(parts, [20], DELTA)
    assert epsilon_by_fft(kinds, DELTA, 4.0, 0.01) == pytest.approx(found, rel=1e-3, abs=2e-3)


def test_laplace_coordinates_are_covered_by_their_gaussian():
    """phi(Phi^-1(F)) against f: the slope of Phi^-1(F) is at most sqrt(pi/2) over the scale, with equality in the middle."""
    y = numpy.linspace(-30, 30, 6001)
    cdf = stats.laplace.cdf(numpy.minimum(y, -y))  # the lower tail, where it is exact
    slope = 0.5 * numpy.exp(-numpy.abs(y)) / stats.norm.pdf(stats.norm.ppf(cdf))
    assert slope.max() == pytest.approx(math.sqrt(math.pi / 2)) and slope.argmax() == 3000
    for shift in (0.01, 0.5, 3.0):
        alpha = numpy.linspace(1e-6, 1 - 1e-6, 2001)
        laplace = stats.laplace.cdf(stats.laplace.ppf(1 - alpha) - shift)
        gaussian = stats.norm.cdf(stats.norm.ppf(1 - alpha) - shift * math.sqrt(math.pi / 2))
        assert (laplace >= gaussian - 1e-12).all()


def test_one_dimensional_laplace_accounting_cannot_be_had_of_a_vector():
    """eps 1 by the scalar rule for b = 1; with many coordinates the truth is near Gaussian of sigma 1."""
    noise = Noise("laplace", math.sqrt(2), {"shape": "coordinates"})
    lower, _, upper = epsilon(events_of(noise, 1.0, 1), DELTA, 8.0)
    assert lower > 4.2 and upper > 5
    for parameters in ({}, {"shape": "scalar"}, {"shape": "coordinates", "dimension": 2}, {"shape": "spherical"}):
        with pytest.raises(ValueError):
            Noise("laplace", 1.0, parameters).entry("gradient")
    for mechanism in ("lmo", "plrv"):
        with pytest.raises(ValueError, match="shape|parameters"):
            Noise(mechanism, 1.0, {"shape": "coordinates"}).entry("gradient")
