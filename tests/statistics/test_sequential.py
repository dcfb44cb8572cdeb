"""Verdicts at any stopping time: the e-process against its definition, its errors under optional stopping, its foresight."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from dpft.harness.statistics.sequential import G, half_width, verdict


def by_integration(x, mean):
    """The Bayes factor of a normal prior on the effect size against none, scale by the right Haar prior: from its definition."""
    n, t = len(x), (np.mean(x) - mean) / (np.std(x, ddof=1) / math.sqrt(len(x)))
    alternative, _ = integrate.quad(
        lambda d: stats.nct.pdf(t, n - 1, d * math.sqrt(n)) * stats.norm.pdf(d, 0, math.sqrt(G)), -12, 12, points=[0]
    )
    return alternative / stats.t.pdf(t, n - 1)


@pytest.mark.parametrize("n", [4, 7, 20])
def test_the_sequence_ends_where_the_bayes_factor_is_one_over_the_level(n):
    x = np.random.default_rng(n).normal(0.3, 1.0, n)
    for level in (0.2, 0.05):
        half = half_width(n, float(np.std(x, ddof=1)), level)
        if math.isfinite(half):
            for end in (np.mean(x) - half, np.mean(x) + half):
                assert by_integration(x, end) == pytest.approx(1 / level, rel=1e-4)
    assert half_width(20, 1.0, 0.05) < math.inf == half_width(3, 1.0, 0.05)


@pytest.mark.parametrize("shape", ["normal", "binomial"])
def test_looking_after_every_seed_errs_no_more_often_than_it_says(shape):
    rng, wrong, runs = np.random.default_rng(5), 0, 600
    for _ in range(runs):
        # binomial: two methods of equal accuracy on 500 examples
        two = rng.binomial(500, 0.75, (2, 40)) / 500
        x = rng.normal(0.0, 0.02, 40) if shape == "normal" else two[0] - two[1]
        wrong += any(verdict(x[:n], 1e-9).verdict in ("better", "worse") for n in range(2, 41))
    assert wrong / runs < 0.05
    # a fixed-sample test that looks as often does not hold: what is tested here can fail
    peeked = sum(
        any(stats.ttest_1samp(x[:n], 0).pvalue < 0.05 for n in range(2, 41))
        for x in (rng.normal(0.0, 0.02, 40) for _ in range(100))
    )
    assert peeked > 20


def test_the_same_is_said_no_more_often_than_it_says_of_methods_a_margin_apart():
    rng, wrong = np.random.default_rng(6), 0
    for _ in range(300):
        x = rng.normal(0.01, 0.01, 40)
        wrong += any(verdict(x[:n], 0.01).verdict == "the same" for n in range(2, 41))
    assert wrong / 300 < 0.05


def test_verdicts():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.004, 16)
    noise -= noise.mean()
    assert verdict(noise + 0.05, 0.01).verdict == "better" and verdict(noise - 0.05, 0.01).verdict == "worse"
    assert verdict(noise + 0.001, 0.01).verdict == "the same"
    small = verdict(noise + 0.0065, 0.02)
    assert small.low > 0 and small.verdict == "the same", "certain, and too small to matter"
    few = verdict((noise + 0.05)[:3], 0.01)
    assert few.verdict == "undecided" and few.low == -math.inf and few.more > 0
    assert verdict([], 0.01).verdict == verdict([0.1], 0.01).verdict == "undecided"
    assert verdict([0.01] * 8, 0.01).verdict == "the same" and verdict([0.02] * 8, 0.01).verdict == "better"


def test_what_another_few_seeds_would_settle_they_settle_if_nothing_changes():
    x = np.array([0.01, 0.03, 0.02, 0.0, 0.035])
    found = verdict(x, 0.005)
    assert found.verdict == "undecided" and found.more > 0
    std, n = float(np.std(x, ddof=1)), len(x) + found.more
    assert x.mean() > half_width(n, std) and x.mean() <= half_width(n - 1, std)
