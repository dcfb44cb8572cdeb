"""Noise mechanisms: what holds between them, composition, search, drawing."""

import dataclasses
import json
import math

import pytest
import torch
from noise_cases import DELTA, events_of, parts, spherical
from scipy import stats

from dpft.harness.errors import CannotRun
from dpft.harness.privacy import Ledger, Release, calibrate, certify, epsilon, epsilon_curve, noise_kinds
from dpft.harness.privacy import calibration as calibrating
from dpft.harness.privacy.calibration import PUBLISHED_LAW, Noise, Wanted, curve_of, fit
from dpft.harness.privacy.published import formal_epsilon, renyi_epsilon, study, swapped
from dpft.harness.privacy.scale_law import parse
from dpft.harness.train.mechanism import Mechanism
from dpft.harness.train.noise import secret_source, source

pytestmark = pytest.mark.usefixtures("noise_cache")


NOISES = {
    "laplace": ("laplace", "spherical", None),
    "coordinates": ("laplace", "coordinates", None),
    "plrv": ("plrv", "spherical", "gamma(9,1)"),
    "lmo": ("lmo", "spherical", PUBLISHED_LAW),
}
WANTED = Wanted(1.0, DELTA, 0.02, 10)


# Every law at both ends; 12 is also what the tests below draw, so that each law is fitted once for it.
@pytest.mark.parametrize(
    "dimension, name",
    [*((12, name) for name in NOISES), (770, "laplace"), *((10**7, n) for n in ("laplace", "plrv", "lmo"))],
)
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
    noise = fit(WANTED, *NOISES[name], 12)
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


@pytest.mark.parametrize("name", ["gaussian", *NOISES])
def test_noise_has_the_declared_variance_and_shape(name):
    dimension = 12
    noise = Noise("gaussian", 1.5) if name == "gaussian" else fit(WANTED, *NOISES[name], dimension)
    mechanism = Mechanism(noise, 0.5, 10, source("cpu", "shape", name))
    draws = torch.stack([torch.cat([*mechanism.release(parts(9, 3)).tensors.values()]) for _ in range(4000)]).double()
    scale = noise.noise_multiplier * 0.5 / 10
    squares = (draws / scale).pow(2).mean(1)
    assert float(squares.mean()) == pytest.approx(1.0, abs=5 * float(squares.std()) / math.sqrt(4000))
    assert mechanism.release(parts(9, 3)).mean_noise_std == pytest.approx(scale)
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
        law = noise_kinds.law_of(noise.mechanism, noise.noise_multiplier, noise.parameters)
        assert (1 / radius).mean() == pytest.approx(law.mean / (dimension - 1), rel=0.03)
    mechanism.close()


def test_spherical_noise_is_refused_for_another_dimension_before_it_is_drawn():
    mechanism = Mechanism(spherical(1.0, 41), 1.0, 1, source("cpu", 0))
    state = mechanism.state()
    with pytest.raises(RuntimeError, match="40 coordinates, but its noise was certified for 41"):
        mechanism.release(parts())
    assert torch.equal(state, mechanism.state())


def test_secret_streams_differ():
    one, other = (secret_source().uniform(4) for _ in range(2))
    assert not set(one) & set(other)


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
        noise = fit(WANTED, *NOISES[name], 12)
        events = events_of(noise, 0.02, 10)
        assert Ledger.from_events(json.loads(json.dumps(events))).events == events
        assert dataclasses.replace(noise) == noise
