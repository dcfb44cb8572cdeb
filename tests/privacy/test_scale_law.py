"""Laws of random noise scales: moments, sampling, Renyi formula, information."""

import math

import numpy
import pytest
from scipy import integrate, stats

from dpft.harness.privacy.calibration import PUBLISHED_LAW
from dpft.harness.privacy.scale_law import parse, scalar_rdp
from dpft.harness.train.noise import source

pytestmark = pytest.mark.usefixtures("noise_cache")


LAWS = [
    "constant(2)",
    "gamma(3,0.5)",
    "0.5*exponential(4)+gamma(5,0.1)",
    "uniform(0.5,1)",
    "uniform(0,2)+gamma(4,1)",
    PUBLISHED_LAW,
]


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
    from dpft.harness.train.mechanism import draw_term

    law, generator = parse(text), source("cpu", "law", text)
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
