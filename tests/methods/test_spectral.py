"""The maths of spectral denoising: identities, and every asymptotic statement against Monte Carlo at fixed seeds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpft.methods.decoders import spectral, stein
from dpft.methods.decoders.denoise import Plan, denoise
from dpft.methods.decoders.moments import Moment, mean_noise_factor
from dpft.methods.decoders.rmt import RMT

pytestmark = pytest.mark.usefixtures("one_thread")
SPECTRAL = ("frobenius", "operator", "nuclear", "soft", "partial")
GIVEN = {"power": 2.0, "rho": 0.3, "top": 3}
SIDES = st.integers(2, 40)
EXCESS = st.lists(st.floats(1e-3, 20), min_size=1, max_size=6)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def eta(kind, y, m, n, s, **more):
    return spectral.shrink(kind, y, m, n, s, GIVEN | more)[0]


def cosine(a, b):
    product = float(a.norm() * b.norm())
    return float((a * b).sum()) / product if product > 0 else 0.0


def noise(m, n, generator):
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def signal(m, n, x, generator):
    """A random m x n matrix with the singular values x."""
    left, right = (torch.linalg.qr(noise(side, len(x), generator))[0] for side in (m, n))
    return left * double(x) @ right.mT


def denoised(matrix, s, kappa, observe=False, **more):
    """(the denoised matrix, what was seen) of one matrix."""
    work = matrix.clone()
    seen = denoise({"w": work}, *matrix.shape, s, Plan(kappa, {**RMT.options, **more}, observe))
    return work, seen.get("w")


def test_the_value_that_a_misplaced_root_fails():
    """beta = 1, s sqrt(n) = 1, y = 3: sqrt 5. Shrinker of 1405.7511 for squared error."""
    assert float(eta("frobenius", double([3.0]), 4, 4, 0.5)[0]) == pytest.approx(5**0.5)
    assert float(eta("operator", double([3.0]), 4, 4, 0.5)[0]) == pytest.approx((3 + 5**0.5) / 2)


@given(SIDES, SIDES, st.floats(0.01, 10), EXCESS)
def test_identities_of_the_shrinkers(m, n, s, excess):
    x = (double(excess) + 1) * spectral.detection_threshold(m, n, s)
    y = spectral.spike_location(x, m, n, s)
    left, right = spectral.cosines(x, m, n, s)
    assert torch.allclose(eta("operator", y, m, n, s), x, rtol=1e-6)
    assert torch.allclose(eta("frobenius", y, m, n, s), x * left * right, rtol=1e-5, atol=1e-7 * s)
    chain = [eta(kind, y, m, n, s) for kind in ("nuclear", "frobenius", "operator", "hard")]
    assert all((a <= b * (1 + 1e-9)).all() for a, b in zip(chain, chain[1:], strict=False))
    mix = 0.7 * y + 0.3 * eta("frobenius", y, m, n, s)
    assert torch.allclose(eta("partial", y, m, n, s), mix)


@given(SIDES, SIDES, st.floats(0.01, 10), st.floats(0.1, 10), EXCESS, st.sampled_from(spectral.SHRINKERS))
def test_shrinkers_are_symmetric_and_homogeneous(m, n, s, a, excess, kind):
    y = (double(excess) + 0.5) * spectral.bulk_edge(m, n, s)  # above and below the edge
    assert torch.allclose(eta(kind, y, m, n, s), eta(kind, y, n, m, s))
    power = GIVEN["power"] if kind == "power" else 1
    y = y[(y / spectral.bulk_edge(m, n, s) - 1).abs() > 1e-6]  # rounding decides at the edge itself
    if len(y):
        assert torch.allclose(eta(kind, a * y, m, n, a * s), a**power * eta(kind, y, m, n, s), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", SPECTRAL)
def test_shrinkers_vanish_below_the_edge_and_are_the_identity_without_noise(kind):
    below = torch.linspace(0, 0.999, 50, dtype=torch.float64) * spectral.bulk_edge(30, 50, 0.1)
    assert not eta(kind, below, 30, 50, 0.1).any()
    y = double([0.0, 1e-3, 1.0, 30.0])
    limit = eta(kind, y, 30, 50, 1e-9)
    assert torch.allclose(limit, y, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", [*SPECTRAL, "power", "hard"])
def test_slopes_are_derivatives(kind):
    y = torch.linspace(1.01, 5, 60, dtype=torch.float64) * spectral.bulk_edge(12, 20, 0.7)
    slope = spectral.shrink(kind, y, 12, 20, 0.7, GIVEN)[1]
    step = 1e-6
    measured = (eta(kind, y + step, 12, 20, 0.7) - eta(kind, y - step, 12, 20, 0.7)) / (2 * step)
    assert torch.allclose(slope, measured, rtol=1e-5, atol=1e-5)


def test_thresholds_of_the_literature():
    for level, quantile in ((0.05, 0.979), (0.01, 2.023), (0.001, 3.272)):
        assert spectral.tracy_widom_quantile(level) == pytest.approx(quantile, abs=1e-3)
    for shape, kappa in (((768, 768), 1.0072), ((768, 3072), 1.0045), ((16, 768), 1.0202)):
        assert spectral.tracy_widom_kappa(*shape, 0.01) == pytest.approx(kappa, abs=1e-4)
        assert spectral.tracy_widom_kappa(*shape, 0.01) == spectral.tracy_widom_kappa(*shape[::-1], 0.01)
    assert spectral.gavish_donoho_kappa(9, 9) * 2 == pytest.approx(4 / 3**0.5)


@pytest.mark.parametrize("shape", [(120, 120), (60, 180)])
def test_spikes_appear_where_they_should_and_cosines_are_right(shape):
    m, n, s = *shape, 0.3
    generator = torch.Generator().manual_seed(0)
    x = double([2.5, 1.6]) * spectral.detection_threshold(m, n, s)
    found, lefts, rights = [], [], []
    for _ in range(30):
        left, right = (torch.linalg.qr(noise(side, 2, generator))[0] for side in shape)
        u, y, v = torch.linalg.svd(left * x @ right.mT + s * noise(m, n, generator), full_matrices=False)
        found.append(y[:2])
        lefts.append((u[:, :2] * left).sum(0).abs())
        rights.append((v[:2].mT * right).sum(0).abs())
    expected = spectral.cosines(x, m, n, s)
    assert torch.allclose(torch.stack(found).mean(0), spectral.spike_location(x, m, n, s), rtol=0.02)
    assert torch.allclose(torch.stack(lefts).mean(0), expected[0], atol=0.04)
    assert torch.allclose(torch.stack(rights).mean(0), expected[1], atol=0.04)


@pytest.mark.parametrize("shape", [(64, 256), (16, 768)])
def test_noise_alone_leaves_spikes_at_the_edge_and_hardly_any_at_tracy_widom(shape):
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(600, *shape, generator=generator)
    top = torch.linalg.eigvalsh(draws @ draws.mT)[:, -1].sqrt() / spectral.bulk_edge(*shape, 1.0)
    assert 0.09 < float((top > 1).double().mean()) < 0.19
    assert float((top > spectral.tracy_widom_kappa(*shape, 0.01)).double().mean()) <= 0.02
    assert 0.03 <= float((top > spectral.tracy_widom_kappa(*shape, 0.05)).double().mean()) <= 0.07


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50), (2, 64), (64, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_equals_svd(shape, dtype):
    generator = torch.Generator().manual_seed(2)
    m, n, s = *shape, 0.1
    matrix = (signal(m, n, [9.0, 4.0], generator) + s * noise(m, n, generator)).to(dtype)
    u, y, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    keep = y >= 1.01 * spectral.bulk_edge(m, n, s)
    for correction in ("none", "noisy", "unbiased"):
        expected = u * (eta("frobenius", y, m, n, s) * keep) @ v
        target = {"noisy": matrix.double().norm() ** 2, "unbiased": matrix.double().norm() ** 2 - m * n * s**2}
        if correction != "none":
            expected = expected * target[correction] ** 0.5 / expected.norm()
        got, seen = denoised(matrix, s, 1.01, norm_correction=correction, observe=True)
        assert got.dtype == dtype and seen["spikes"] == 2
        assert (got.double() - expected).norm() <= 3e-6 * expected.norm()


def test_a_gram_in_fp32_is_exact_enough_at_the_edge_beside_a_strong_spike():
    """kappa is 1.005 to 1.02: singular values near the edge must be right to far less than that."""
    m, n = 128, 384
    generator = torch.Generator().manual_seed(9)
    matrix = signal(m, n, [50 * spectral.bulk_edge(m, n, 1.0)], generator) + noise(m, n, generator)
    exact, single = torch.linalg.svdvals(matrix)[1], matrix.float()
    assert float(torch.linalg.eigvalsh(single @ single.mT)[-2].double() ** 0.5 / exact) == pytest.approx(1, abs=2e-4)


def test_matrices_of_one_shape_go_together_as_they_would_alone(monkeypatch):
    from dpft.methods.decoders import denoise as work

    generator = torch.Generator().manual_seed(3)
    matrices = {str(i): signal(20, 30, [i * 2.0], generator) + 0.3 * noise(20, 30, generator) for i in range(5)}
    plan = Plan(1.0, RMT.options, True)
    alone = {name: denoised(matrix, 0.3, 1.0)[0] for name, matrix in matrices.items()}
    monkeypatch.setattr(work, "_STACK", 2 * 20**2)  # by twos
    seen = denoise(matrices, 20, 30, 0.3, plan)
    assert list(seen) == list(matrices) and {row["spikes"] for row in seen.values()} == {0, 1}
    for name, matrix in matrices.items():
        assert torch.allclose(matrix, alone[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", spectral.TENDS_TO_IDENTITY)
def test_without_noise_a_matrix_is_left_bit_for_bit(kind):
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoised(matrix, 0.0, 1.0, shrinker=kind, norm_correction="noisy")[0], matrix)


@pytest.mark.parametrize("kind", spectral.SHRINKERS)
def test_zero_and_tiny_matrices_are_no_trouble(kind):
    for matrix in (torch.zeros(4, 6), torch.full((2, 2), 1e-25), torch.ones(3, 50)):
        for s in (0.0, 1e-3):
            for power in (0.0, 1.0, 2.0):
                got, _ = denoised(matrix, s, 0.5, shrinker=kind, power=power, norm_correction="unbiased", observe=True)
                assert torch.isfinite(got).all()


def test_what_power_zero_and_rank_k_do():
    generator = torch.Generator().manual_seed(4)
    matrix = signal(30, 20, [5.0, 3.0, 2.0], generator)
    u, y, v = torch.linalg.svd(matrix, full_matrices=False)
    polar, _ = denoised(matrix, 1e-6, 1.0, shrinker="power", power=0.0)
    assert torch.allclose(polar, u[:, :3] @ v[:3], atol=1e-6)
    cut, _ = denoised(matrix, 1e-6, 0.0, shrinker="rank-k", top=2)
    assert torch.allclose(cut, u[:, :2] * y[:2] @ v[:2], atol=1e-6)


def test_where_nothing_survives():
    matrix = 0.1 * noise(30, 40, torch.Generator().manual_seed(5))
    assert not denoised(matrix, 0.1, 1.2)[0].any()
    assert torch.equal(denoised(matrix, 0.1, 1.2, empty="raw", norm_correction="noisy")[0], matrix)


def test_divergence_of_the_identity_of_a_scaling_and_of_equal_values():
    y = double([1.0, 2.0, 2.0, 5.0])
    assert stein.divergence(y, y, torch.ones(4), 4, 7) == pytest.approx(28)
    assert stein.divergence(y, 0.3 * y, torch.full((4,), 0.3), 7, 4) == pytest.approx(0.3 * 28)


@pytest.mark.parametrize("kind", [*spectral.CONTINUOUS, "power"])
@pytest.mark.parametrize("spectrum", ["low-rank", "decaying", "flat"])
def test_stein_is_unbiased(kind, spectrum):
    """<Ghat, G> and |G|^2 from Y alone, within three standard errors of the mean difference to the truth."""
    m, n, s = 24, 40, 0.2
    generator = torch.Generator().manual_seed(6)
    x = {"low-rank": [9.0, 5.0], "decaying": [6 * 0.8**i for i in range(24)], "flat": [1.2] * 24}[spectrum]
    clean = signal(m, n, x, generator)
    inner, power = [], []
    for _ in range(150):
        u, y, v = torch.linalg.svd(clean + s * noise(m, n, generator), full_matrices=False)
        shrunk, slope = spectral.shrink(kind, y, m, n, s, {"power": 0.5, "rho": 0.5})
        james = kind == "james-stein"
        div = stein.james_stein_divergence(y, m, n, s) if james else stein.divergence(y.double(), shrunk, slope, m, n)
        found = stein.estimate(y, shrunk, div, m, n, s)
        inner.append(found.inner - float((u * shrunk @ v * clean).sum()))
        power.append(found.signal - float((clean**2).sum()))
        assert found.trusted == (found.signal > 3 * s**2 * math.sqrt(2 * m * n))
    for errors in (double(inner), double(power)):
        assert errors.mean().abs() <= 3 * errors.std() / len(errors) ** 0.5 + 1e-9


def test_the_gate_sees_from_the_release_that_denoising_hurts():
    """Signal spread over 64 directions below the threshold: about .41 raw against .19 denoised, and the estimate says so."""
    generator = torch.Generator().manual_seed(7)
    clean = signal(256, 256, [14.2] * 64, generator)
    release = clean + noise(256, 256, generator)
    kappa = spectral.tracy_widom_kappa(256, 256, 0.05)
    decoded, seen = denoised(release, 1.0, kappa, observe=True)
    raw, after = cosine(release, clean), cosine(decoded, clean)
    assert raw == pytest.approx(0.41, abs=0.02) and after == pytest.approx(0.19, abs=0.03)
    assert seen["stein_cosine_raw"] == pytest.approx(raw, abs=0.03)
    assert seen["stein_cosine_decoded"] == pytest.approx(after, abs=0.05)
    assert seen["trusted"] and torch.equal(denoised(release, 1.0, kappa, gate=True)[0], release)
    spiked = signal(256, 256, [40.0], generator) + noise(256, 256, generator)
    assert not torch.equal(denoised(spiked, 1.0, kappa, gate=True)[0], spiked), "one strong direction is denoised"


def test_filter_first_then_denoise():
    """Static signal at .8 of the threshold, beta .9, 60 steps: only the filtered release shows it. Order matters."""
    m = n = 256
    generator = torch.Generator().manual_seed(8)
    clean = signal(m, n, [0.8 * spectral.detection_threshold(m, n, 1.0)], generator)
    kappa, momentum, after = spectral.tracy_widom_kappa(m, n, 0.05), Moment("m", 0.9), Moment("d", 0.9)
    for _ in range(60):
        release = clean + noise(m, n, generator)
        momentum.update({"w": release})
        raw_denoised, _ = denoised(release, 1.0, 1.0)
        after.update({"w": raw_denoised})
    mean = momentum.tensors["w"] / momentum.correction(60)
    decoded, _ = denoised(mean, mean_noise_factor(0.9, 60), kappa)
    assert cosine(release, clean) == pytest.approx(0.05, abs=0.02)
    assert cosine(raw_denoised, clean) == pytest.approx(0.0, abs=0.05)
    assert cosine(mean, clean) == pytest.approx(0.21, abs=0.02)
    assert cosine(decoded, clean) == pytest.approx(0.92, abs=0.02)
    assert cosine(after.tensors["w"], clean) < 0.25


@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 0.99), st.integers(1, 40))
def test_noise_of_the_running_mean(beta, steps):
    """The factor is the root of the sum of the squared weights that the releases have in the corrected mean."""
    weights = double([(1 - beta) * beta**k for k in range(steps)]) / (1 - beta**steps)
    assert mean_noise_factor(beta, steps) == pytest.approx(float(weights.norm()), rel=1e-6)
    assert mean_noise_factor(0.9, 1) == pytest.approx(1) and mean_noise_factor(0.9, 500) == pytest.approx(
        0.2294, abs=1e-4
    )
