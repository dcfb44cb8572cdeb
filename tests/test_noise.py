"""Noise mechanisms: laws, sampling, accounting by mixtures, and what holds between mechanisms."""

import dataclasses
import itertools
import json
import math

import numpy
import pytest
import torch
from scipy import integrate, special, stats

from dpft.harness.errors import CannotRun
from dpft.harness.mechanism import Mechanism, secret_stream, stream
from dpft.harness.privacy import Ledger, Release, calibrate, certify, epsilon, epsilon_curve, mechanisms, mixtures
from dpft.harness.privacy import calibration as calibrating
from dpft.harness.privacy.calibration import PUBLISHED_LAW, Noise, Wanted, curve_of, fit
from dpft.harness.privacy.mixture_check import epsilon_by_fft
from dpft.harness.privacy.published import formal_epsilon, renyi_epsilon, study, swapped
from dpft.harness.privacy.scale_law import parse, scalar_rdp

DELTA = 1e-5
LAWS = [
    "constant(2)",
    "gamma(3,0.5)",
    "0.5*exponential(4)+gamma(5,0.1)",
    "uniform(0.5,1)",
    "uniform(0,2)+gamma(4,1)",
    PUBLISHED_LAW,
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DPFT_CACHE", str(tmp_path_factory.getbasetemp() / "noise-cache"))


def by_scipy(law):
    """The law's terms as scipy's distributions, whose parameters are documented elsewhere than in this project."""
    for term in law.terms:
        first, last = term.values[0], term.values[-1]
        if term.kind == "gamma":
            yield term.weight, stats.gamma(a=first, scale=last)
        elif term.kind == "exponential":
            yield term.weight, stats.expon(scale=1 / first)
        elif term.kind == "uniform":
            yield term.weight, stats.uniform(loc=first, scale=last - first)
        else:
            yield term.weight, stats.uniform(loc=first, scale=1e-5)


# -- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", LAWS)
def test_moments_and_mgf_are_those_of_the_distributions(text):
    law = parse(text)
    mean = sum(weight * one.mean() for weight, one in by_scipy(law))
    variance = sum(weight**2 * one.var() for weight, one in by_scipy(law))
    assert law.mean == pytest.approx(mean, rel=1e-5)
    assert law.mean_square == pytest.approx(mean**2 + variance, rel=1e-5)
    for t in (-3.0, -0.01, 0.3):
        product = math.prod(
            one.expect(lambda x, a=t * weight: numpy.exp(a * x), ub=one.isf(1e-14)) for weight, one in by_scipy(law)
        )
        assert law.mgf(t) == pytest.approx(product, rel=1e-4)
    assert parse(str(law)) == law
    assert law.scaled(3.0).inverse_mean_square == pytest.approx(law.inverse_mean_square / 9)


def test_inverse_mean_square_has_its_closed_forms():
    assert parse("gamma(5,0.5)").inverse_mean_square == pytest.approx(4 / (4 * 3), rel=1e-9)
    assert parse("uniform(0.5,2)").inverse_mean_square == pytest.approx(1.0, rel=1e-9)
    assert parse("constant(4)").inverse_mean_square == pytest.approx(1 / 16, rel=1e-9)
    for text in ("gamma(2,1)", "exponential(1)", "uniform(0,1)", "exponential(1)+uniform(0,1)"):
        assert parse(text).inverse_mean_square == math.inf


@pytest.mark.parametrize("text", LAWS)
def test_sampler_and_accountant_have_the_same_law(text):
    """The trap of the published code: a rate in the accountant, the same number as a scale in the sampler."""
    from dpft.harness.mechanism import draw_term

    law, generator = parse(text), stream("cpu", "law", text)
    draws = numpy.array([[draw_term(term, generator) for term in law.terms] for _ in range(4000)])
    for column, term, (weight, one) in zip(draws.T, law.terms, by_scipy(law), strict=True):
        if term.kind == "constant":
            assert set(column) == {term.weight * term.values[0]}
        else:
            assert stats.kstest(column / weight, one.cdf).pvalue > 1e-4
    u = draws.sum(1)
    assert u.mean() == pytest.approx(law.mean, abs=5 * u.std() / math.sqrt(len(u)) + 1e-9)


@pytest.mark.parametrize(
    "text, words",
    [
        ("gamma(1)", "takes 2 numbers"),
        ("gama(1,2)", "is not a sum of"),
        ("gamma(1,x)", "not a number"),
        ("gamma(nan,1)", "must be between"),
        ("-1*gamma(2,1)", "must be between"),
        ("exponential(0)", "must be between"),
        ("uniform(2,1)", "low < high"),
        ("uniform(-1,1)", "low < high"),
        ("", "is not a sum of"),
        (3, "must be a sum of"),
        ("gamma(2,1)+", "is not a sum of"),
        ("gamma(2,inf)", "must be between"),
    ],
)
def test_laws_that_are_none_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_outside_the_domain_of_the_mgf_epsilon_is_infinite():
    law = parse("gamma(3,1)+exponential(2)")
    assert law.mgf(0.99) < math.inf and law.mgf(1.0) == law.mgf(7.0) == math.inf
    assert scalar_rdp(law, 1.5) < math.inf and scalar_rdp(law, 2.0) == scalar_rdp(law, 9.0) == math.inf
    assert parse("exponential(5)").mgf(5.0) == parse("exponential(5)").mgf(50.0) == math.inf


def test_scalar_renyi_formula_is_the_integral():
    law, order = parse("uniform(0.5,1.5)"), 3.0

    def inner(u):
        def density(x, at):
            return u / 2 * math.exp(-u * abs(x - at))

        def integrand(x):
            return density(x, 0) ** order * density(x, 1) ** (1 - order)

        return sum(integrate.quad(integrand, *ends)[0] for ends in ((-40, 0), (0, 1), (1, 60)))

    mean = integrate.quad(inner, 0.5, 1.5)[0]
    assert scalar_rdp(law, order) == pytest.approx(math.log(mean) / (order - 1), rel=1e-4)


# -- fisher information ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", LAWS)
def test_no_noise_beats_the_gaussian(text):
    law = parse(text)
    assert law.coordinate_information * law.coordinate_variance >= 2 - 1e-9, "Laplace needs sqrt 2, its mixtures more"
    assert law.mean_square * law.inverse_mean_square >= 1 - 1e-12


def test_laplace_has_the_information_of_its_scale():
    assert parse("constant(3)").coordinate_information == pytest.approx(9.0)
    x = numpy.linspace(1e-9, 400, 400_001)
    score = 4 / (1 + x)  # gamma(3, 1): f ~ (1 + x)^-4
    assert parse("gamma(3,1)").coordinate_information == pytest.approx(
        numpy.trapezoid(3 * (1 + x) ** -4 * score**2, x), rel=1e-5
    )


# -- the mixture accountant ------------------------------------------------------------------------------------------


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
        step = mixtures._distribution(mixtures.sampled_delta(laplace_divergence, 0.01, remove), 1e-4, 1e-12)
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


def spherical(multiplier, dimension, law=None, mechanism=None):
    parameters = {"shape": "spherical", "dimension": dimension}
    if law is not None:
        found = parse(law)
        parameters["law"] = str(found.scaled(mechanisms.spread(found, dimension) / multiplier))
    return Noise(mechanism or ("laplace" if law is None else "lmo"), multiplier, parameters)


def events_of(noise, q, steps):
    ledger = Ledger()
    ledger.append(0, q, [noise.entry("gradient")])
    return [{**ledger.events[0], "step_to": steps}]


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
    law = law.scaled(mechanisms.spread(law, dimension) / (3.0 if len(law.terms) > 1 else 1.2))
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


def test_one_dimensional_laplace_accounting_cannot_be_had():
    """eps 1 by the scalar rule for b = 1; with many coordinates the truth is near Gaussian of sigma 1."""
    noise = Noise("laplace", math.sqrt(2), {"shape": "coordinates"})
    lower, _, upper = epsilon(events_of(noise, 1.0, 1), DELTA, 8.0)
    assert lower > 4.2 and upper > 5
    for parameters in ({}, {"shape": "scalar"}, {"shape": "coordinates", "dimension": 1}, {"shape": "spherical"}):
        with pytest.raises(ValueError):
            Noise("laplace", 1.0, parameters).entry("gradient")
    for mechanism in ("lmo", "plrv"):
        with pytest.raises(ValueError, match="shape|parameters"):
            Noise(mechanism, 1.0, {"shape": "coordinates"}).entry("gradient")


NOISES = {
    "laplace": ("laplace", "spherical", None),
    "coordinates": ("laplace", "coordinates", None),
    "plrv": ("plrv", "spherical", "gamma(9,1)"),
    "lmo": ("lmo", "spherical", PUBLISHED_LAW),
}
WANTED = Wanted(1.0, DELTA, 0.02, 10)


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("dimension", [12, 770, 10**7])
def test_epsilon_is_never_below_the_lower_bound_by_information(name, dimension):
    mechanism, shape, law = NOISES[name]
    noise = fit(WANTED, mechanism, shape, law, dimension)
    certificate = certify(events_of(noise, 0.02, 10), DELTA, 1.0)
    assert certificate["within_budget"], certificate["error"]
    lower, estimate, upper = certificate["epsilon"]
    assert lower <= certificate["cross_checks"]["fisher"] <= upper
    assert 0.975 <= estimate <= upper <= 1.0
    assert noise.noise_multiplier >= calibrate(1.0, DELTA, 0.02, 10) * (1 - 2e-3), "nothing beats the Gaussian"


@pytest.mark.parametrize("name", NOISES)
def test_curve_is_monotone_and_ends_at_epsilon(name):
    noise = fit(WANTED, *NOISES[name], 770)
    curve = curve_of(noise, WANTED)
    assert len(curve) == 11 and curve[0] == 0.0 and curve == sorted(curve)
    assert curve[-1] == epsilon(events_of(noise, 0.02, 10), DELTA, 1.0)[2]
    assert curve[5] >= epsilon(events_of(noise, 0.02, 5), DELTA, 1.0)[1]
    gaussian = Noise("gaussian", 2.0)
    assert curve_of(gaussian, WANTED) == epsilon_curve(2.0, 0.02, 10, DELTA, 1.0)


def test_phases_with_different_mechanisms_compose():
    ledger, laplace = Ledger(), spherical(1.5, 770)
    for step in range(20):
        noise = laplace if step < 10 else Noise("gaussian", 1.5)
        ledger.append(step, 0.02, [noise.entry("gradient")])
    both = certify(ledger.events, DELTA, 1.0)
    assert both["error"] is None
    alone = epsilon(events_of(laplace, 0.02, 10), DELTA, 1.0)[1], epsilon(events_of(laplace, 0.02, 20), DELTA, 1.0)[2]
    assert alone[0] < both["epsilon"][1] <= alone[1]


def test_two_mechanisms_on_one_batch_are_refused():
    with pytest.raises(ValueError, match="only if all are gaussian, not with laplace"):
        Ledger().append(0, 0.1, [spherical(1.0, 9).entry("a"), Release(name="b", noise_multiplier=1.0)])


def test_search_ends_at_the_law_nearest_to_a_constant(monkeypatch):
    monkeypatch.setattr(calibrating, "CERTIFIED", 2)
    found = calibrating.search(WANTED, "plrv", 770)
    assert [law for law, _ in found] == ["gamma(50.0,0.02)", "gamma(20.0,0.05)"]
    sigmas = [noise.noise_multiplier for _, noise in found]
    assert calibrate(1.0, DELTA, 0.02, 10) < sigmas[0] < sigmas[1]
    assert fit(WANTED, "plrv", "spherical", None, 770) == found[0][1]


def test_what_cannot_be_certified_is_refused():
    with pytest.raises(CannotRun, match="above 20"):
        epsilon(events_of(spherical(0.1, 770), 0.5, 50), DELTA, 8.0)
    with pytest.raises(CannotRun, match="delta"):
        epsilon(events_of(spherical(1.0, 770), 0.5, 50), 0.0, 8.0)
    with pytest.raises(ValueError, match="infinite variance"):
        fit(WANTED, "lmo", "spherical", "exponential(1)", 770)
    certificate = certify(events_of(spherical(0.1, 770), 0.5, 50), DELTA, 8.0)
    assert certificate["epsilon"] is None and not certificate["within_budget"]


# -- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", *NOISES])
def test_noise_has_the_declared_variance_and_shape(name):
    dimension = 40
    noise = Noise("gaussian", 1.5) if name == "gaussian" else fit(WANTED, *NOISES[name], dimension)
    mechanism = Mechanism(noise, 0.5, 10, stream("cpu", "shape", name))
    draws = torch.stack([torch.cat([*mechanism.release(parts()).tensors.values()]) for _ in range(4000)]).double()
    scale = noise.noise_multiplier * 0.5 / 10
    squares = (draws / scale).pow(2).mean(1)
    assert float(squares.mean()) == pytest.approx(1.0, abs=5 * float(squares.std()) / math.sqrt(4000))
    assert mechanism.release(parts()).mean_noise_std == pytest.approx(scale)
    radius = draws.norm(dim=1).numpy() * 10 / 0.5
    if name == "laplace":  # ||z|| is Gamma(d, 1/u), and directions are uniform
        inverse = math.sqrt(dimension + 1) / noise.noise_multiplier
        assert stats.kstest(radius, stats.gamma(dimension, scale=1 / inverse).cdf).pvalue > 1e-4
        cosine = (draws[:, 0] / draws.norm(dim=1)).numpy()
        assert stats.kstest((1 + cosine) / 2, stats.beta((dimension - 1) / 2, (dimension - 1) / 2).cdf).pvalue > 1e-4
    if name == "coordinates":
        b = noise.noise_multiplier / math.sqrt(2)
        assert stats.kstest(draws.flatten().numpy()[:20_000] * 10 / 0.5, stats.laplace(scale=b).cdf).pvalue > 1e-4
    if name == "plrv":  # sqrt(tau): mean of 1/||z|| is E[u] / (d - 1)
        law = mechanisms.law_of(noise.mechanism, noise.noise_multiplier, noise.parameters)
        assert (1 / radius).mean() == pytest.approx(law.mean / (dimension - 1), rel=0.03)
    mechanism.close()


def parts():
    return {"a": torch.zeros(30), "b": torch.zeros(10)}


def test_spherical_noise_is_refused_for_another_dimension_before_it_is_drawn():
    mechanism = Mechanism(spherical(1.0, 41), 1.0, 1, stream("cpu", 0))
    state = mechanism.state()
    with pytest.raises(RuntimeError, match="40 coordinates, but its noise was certified for 41"):
        mechanism.release(parts())
    assert torch.equal(state, mechanism.state())


def test_secret_streams_differ():
    assert secret_stream("cpu").initial_seed() != secret_stream("cpu").initial_seed()


# -- the published mechanism -----------------------------------------------------------------------------------------


def test_published_accounting_is_a_number_only_outside_the_domain():
    law = parse(PUBLISHED_LAW)
    assert formal_epsilon(law, 1e-5, 1) == pytest.approx(0.296, abs=1e-3)
    assert renyi_epsilon(law, 1e-5, 1) > 6
    drawn = swapped(law)
    assert drawn.mean == pytest.approx(0.8 + 0.5 + 0.15) and swapped(drawn) == law
    assert drawn.coordinate_information > 2 * law.coordinate_information
    rows = study(law, drawn, 0.03, 192, 1e-10)
    claimed, bounds = rows[0]["epsilon"], [row["epsilon"] for row in rows[3:]]
    assert claimed < 0.6 and min(bounds) > 4 and max(bounds) > 12


def test_noise_values_are_plain_json():
    for name in NOISES:
        noise = fit(WANTED, *NOISES[name], 770)
        events = events_of(noise, 0.02, 10)
        assert Ledger.from_events(json.loads(json.dumps(events))).events == events
        assert dataclasses.replace(noise) == noise
