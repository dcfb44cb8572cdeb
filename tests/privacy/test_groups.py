"""A user of whom several examples may be in a batch: divergences, epsilon and noise against dp-accounting and Poisson's."""

import itertools

import numpy
import pytest
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, MixtureGaussianPrivacyLoss
from scipy.stats import binom, norm

from dpft.harness.privacy.groups import group_delta

EPS = numpy.linspace(-3, 8, 300)
CELLS = [
    (0.5, 1, 0.1),
    (0.88, 4, 0.014),
    (1.84, 4, 0.014),
    (3.35, 8, 0.014),
    (2.0, 16, 0.3),
    (1.0, 4, 1.0),
    (0.4, 2, 1e-4),
]


@pytest.mark.parametrize("sigma, group_size, q", CELLS)
@pytest.mark.parametrize("remove", [True, False])
def test_divergences_are_those_of_dp_accounting(sigma, group_size, q, remove):
    counts = range(group_size + 1)
    direction = AdjacencyType.REMOVE if remove else AdjacencyType.ADD
    weights = [float(binom.pmf(j, group_size, q)) for j in counts]
    theirs = MixtureGaussianPrivacyLoss(sigma, list(counts), weights, adjacency_type=direction).get_delta_for_epsilon(
        EPS
    )
    ours = group_delta(sigma, group_size, q, remove)(EPS)
    numpy.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert (numpy.diff(ours) <= 1e-15).all() and ours[-1] >= 0


@pytest.mark.parametrize("remove", [True, False])
def test_no_way_of_pointing_is_seen_better(remove):
    """Contributions of three examples in the plane, by integration: never above the collinear ones, which are charged."""
    sigma, q, grid = 0.7, 0.3, numpy.linspace(-6, 8, 281)
    x, y = numpy.meshgrid(grid, grid)
    cell = (grid[1] - grid[0]) ** 2
    eps = numpy.array([-0.5, 0.1, 0.5, 1.0, 2.0])
    charged = group_delta(sigma, 3, q, remove)(eps)
    for angles in ([0, 0, 0], [0, 1, 2], [0, numpy.pi / 2, numpy.pi], [0, 0.3, numpy.pi]):
        steps = [numpy.array([numpy.cos(a), numpy.sin(a)]) for a in angles]
        base = norm.pdf(x, 0, sigma) * norm.pdf(y, 0, sigma)
        mixed = 0
        for chosen in itertools.product([0, 1], repeat=3):
            at = sum((c * s for c, s in zip(chosen, steps, strict=True)), numpy.zeros(2))
            mass = numpy.prod([q if c else 1 - q for c in chosen])
            mixed = mixed + mass * norm.pdf(x, at[0], sigma) * norm.pdf(y, at[1], sigma)
        one, other = (mixed, base) if remove else (base, mixed)
        seen = numpy.array([(numpy.clip(one - numpy.exp(e) * other, 0, None) * cell).sum() for e in eps])
        assert (seen <= charged + 1e-4).all()
        if angles == [0, 0, 0]:
            numpy.testing.assert_allclose(seen, charged, atol=1e-4)
