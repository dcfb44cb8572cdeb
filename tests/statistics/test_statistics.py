"""Every statistic against a known answer, and intervals and power against what they promise, by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dpft.harness import statistics as st
from dpft.harness.errors import BadInput

INF = math.inf


def brute_force(x, alternative):
    """The sign-flip p-value from its definition."""
    means = [np.dot(signs, x) / len(x) for signs in itertools.product((1, -1), repeat=len(x))]
    observed, slack = np.mean(x), 1e-12
    above = np.mean([m >= observed - slack for m in means])
    below = np.mean([m <= observed + slack for m in means])
    return {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]


@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
@pytest.mark.parametrize(
    "x", [[0.1, 0.2, 0.3], [0.01, -0.02, 0.005, 0.03], [0.1, 0.1, -0.1, 0.1, 0.2, 0.1, 0.3], [0.3, -0.1, -0.2], [0.3]]
)
def test_the_sign_flip_test_counts_all_sign_patterns(x, alternative):
    found = st.sign_flip(x, alternative)
    assert found.exact and found.p == pytest.approx(brute_force(x, alternative))
    assert found.p >= found.smallest


def test_few_seeds_cannot_be_significant():
    assert st.sign_flip([1.0, 2.0, 3.0]).p == 0.25 == st.smallest_p(3)
    assert st.sign_flip([-1.0, -2.0, -3.0], "less").p == 0.125 == st.smallest_p(3, "less")
    assert st.fewest_seeds() == 6 and st.fewest_seeds(alternative="less") == 5 and st.fewest_seeds(0.01) == 8
    assert st.sign_flip([0.0, 0.0, 0.0]).p == 1.0
    assert st.sign_flip([0.1 + 0.2 - 0.3, 0.0]).p == 1.0, "two seeds are no evidence"


def test_above_twelve_seeds_patterns_are_drawn():
    x = np.random.default_rng(1).normal(0.2, 1, 13)
    found = st.sign_flip(x)
    assert not found.exact and found.p == pytest.approx(brute_force(x, "two-sided"), abs=0.03)
    assert found == st.sign_flip(x), "the same every time"
    assert st.sign_flip(np.ones(40), "greater").p == pytest.approx(1 / 4096)


@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
@pytest.mark.parametrize("n", [2, 7, 12, 13, 21])
def test_it_is_scipy_s_permutation_test_to_the_bit(n, alternative):
    rng = np.random.default_rng(n)
    for x in (rng.normal(0.3, 1, n), np.round(rng.normal(0.3, 1, n), 1) + 0.1):  # the second has ties
        scale = np.abs(x).max()
        theirs = stats.permutation_test(
            (x,),
            lambda sample, axis, scale=scale: np.round(np.mean(sample / scale, axis=axis), 12),
            permutation_type="samples",
            vectorized=True,
            n_resamples=4096 if n <= 12 else 4095,
            alternative=alternative,
            rng=np.random.default_rng(0),
        )
        assert st.sign_flip(x, alternative).p == theirs.pvalue


def test_false_alarms_come_at_the_stated_rate():
    """Nothing differs: at 8 seeds and level .05 the exact test rejects 12 of 256 sign patterns, .047."""
    rng = np.random.default_rng(0)
    rejected = np.mean([st.sign_flip(rng.normal(size=8)).p <= st.LEVEL for _ in range(1000)])
    assert rejected == pytest.approx(12 / 256, abs=3 * math.sqrt(0.047 * 0.953 / 1000))


def test_holm_on_a_worked_example():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.9, 0.8]) == [1.0, 1.0] and st.holm([]) == [] and st.holm([0.2]) == [0.2]


def power_of(shift, n, level, sets=4000):
    """How often the sign-flip test, from its definition, finds normal differences about `shift`, on the right side."""
    x = np.random.default_rng(5).normal(shift, 1, (sets, n))
    flips = np.array(list(itertools.product((1, -1), repeat=n)))
    as_large = (x @ flips.T >= x.sum(axis=1, keepdims=True) - 1e-9).mean(axis=1)
    return np.mean(2 * as_large <= level)


@pytest.mark.parametrize("n, methods", [(6, 1), (7, 1), (7, 2), (8, 1), (8, 4), (9, 2), (10, 1), (12, 7)])
def test_the_detectable_difference_is_seen_with_the_stated_power(n, methods):
    """Holm's level is 5% over the number of methods; with 6 seeds, or 8 and 4 methods, only one pattern of signs rejects."""
    level = st.LEVEL / methods
    found = st.detectable_difference(1.0, n, level)
    assert power_of(found, n, level) == pytest.approx(0.8, abs=0.025)
    assert st.detectable_difference(0.02, n, level) == pytest.approx(0.02 * found)


def test_where_only_one_pattern_rejects_all_differences_must_agree():
    """Then the power is P(z < shift)^n in closed form, and the t test's figure (1.43 at 6 seeds) is seen with .62."""
    for n, level in ((6, 0.05), (8, 0.05 / 4), (9, 0.05 / 8)):
        shift = st.detectable_difference(1.0, n, level)
        assert stats.norm.cdf(shift) ** n == pytest.approx(0.8, abs=0.015)
    assert st.detectable_difference(1.0, 5, alternative="less") == pytest.approx(stats.norm.ppf(0.8**0.2), abs=0.03)


def test_the_detectable_difference_of_many_seeds_is_the_textbook_s():
    assert st.detectable_difference(1.0, 10) == pytest.approx(0.996, abs=0.03), "paired t test, n = 10, power .8"
    assert st.detectable_difference(1.0, 20) == pytest.approx(0.660, abs=0.03)
    rng, effect = np.random.default_rng(0), st.detectable_difference(1.0, 14)
    seen = np.mean([st.sign_flip(rng.normal(effect, 1, 14)).p <= st.LEVEL for _ in range(250)])
    assert seen == pytest.approx(0.8, abs=0.08), "patterns are drawn"


def test_what_cannot_be_seen_has_no_detectable_difference():
    assert st.detectable_difference(0.02, 3) == INF and st.detectable_difference(0.02, 5) == INF
    assert st.detectable_difference(0.02, 6, level=0.05 / 4) == INF, "four methods ask a smaller p of the smallest"
    assert st.detectable_difference(0.02, 30, level=1e-4) == INF, "4,096 patterns are drawn: none is so rare"


def by_seed(values):
    return dict(enumerate(values))


def test_comparisons_say_what_can_be_concluded():
    base = by_seed([0.70, 0.72, 0.69])
    methods = {"a": by_seed([0.75, 0.78, 0.76]), "b": {7: 0.9}}
    (found,) = st.compare(methods, base).values()
    assert found.verdict == "cannot tell with 3 seeds: smallest p is 0.25"
    assert found.difference == pytest.approx(0.06) and found.p == 0.25 and found.interval is None
    assert found.detectable == INF and found.wins == 1.0 and found.seeds == (0, 1, 2)
    rng = np.random.default_rng(0)
    base = by_seed(rng.normal(0.7, 0.02, 10))
    good = {s: v + 0.05 + 0.002 * rng.normal() for s, v in base.items()}
    bad = {s: v - 0.05 + 0.002 * rng.normal() for s, v in base.items()}
    same = {s: v + 0.002 * rng.normal() for s, v in base.items()}
    found = st.compare({"good": good, "bad": bad, "same": same}, base)
    assert [c.verdict for c in found.values()] == ["better", "worse", "no difference shown"]
    assert found["good"].adjusted == pytest.approx(3 * 2 / 1024)
    assert found["good"].interval.low < found["good"].difference < found["good"].interval.high
    assert [c.verdict for c in st.compare({"good": good, "bad": bad}, base, higher_is_better=False).values()] == [
        "worse",
        "better",
    ]
    six = {s: v for s, v in base.items() if s < 6}
    found = st.compare({"good": good, "bad": bad}, six)
    assert found["good"].verdict == "cannot tell with 6 seeds and 2 methods: smallest adjusted p is 0.0625"
    assert st.compare({"good": good}, six)["good"].verdict == "better"
    assert st.compare({"good": {0: 1.0}}, {0: 0.5})["good"].std is None


def test_a_baseline_that_the_same_seeds_chose_costs_all_pairs():
    """Twelve settings of one method that are all alike: beside the best of them the others look worse than they are."""
    rng, alarms = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(150):
        rows = {str(i): by_seed(rng.normal(0.7, 0.02, 12)) for i in range(12)}
        best = max(rows, key=lambda name: sum(rows[name].values()))
        others = {name: row for name, row in rows.items() if name != best}
        for counted in alarms:
            found = st.compare(others, rows[best], tests=66 if counted else None)
            alarms[counted] += any(one.verdict == "worse" for one in found.values())
    assert alarms[False] > 0.1 * 150 and alarms[True] <= 0.08 * 150, alarms
    base = by_seed(rng.normal(0.7, 0.02, 6))
    (found,) = st.compare({"a": {s: v - 0.05 for s, v in base.items()}}, base, tests=15).values()
    assert found.adjusted == pytest.approx(15 * 2 / 64) and found.holm_level == pytest.approx(0.05 / 15)
    assert found.verdict == "cannot tell with 6 seeds and 15 pairs: smallest adjusted p is 0.469"


def test_iqm_and_intervals_have_known_answers():
    assert st.iqm([1, 2, 3, 4, 5, 6, 7, 100]) == 4.5
    assert st.interval([0.7] * 5) is None and st.interval([]) is None
    assert st.interval([0.5] * 6) == st.Interval(0.5, 0.5, 0.5)
    x = np.random.default_rng(3).normal(size=40)
    found, half = st.interval(x), stats.t.isf(0.025, 39) * x.std(ddof=1) / math.sqrt(40)
    assert found.estimate == pytest.approx(x.mean())
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.15 * half)
    spread = st.interval([x, x + 100], "mean")
    assert spread.high - spread.low < 2 * half, "tasks are strata: their difference is not uncertainty"
    assert spread.estimate == pytest.approx(x.mean() + 50)
    with pytest.raises(BadInput, match="finite"):
        st.interval([0.1] * 6 + [math.nan])


@pytest.mark.parametrize(("n", "statistic"), [(6, "mean"), (10, "mean"), (10, "iqm")])
def test_intervals_cover_what_they_say(n, statistic):
    """95% intervals hold the truth in 95% of 400 worlds, up to the error of the simulation and of small samples."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        found = st.interval(rng.normal(size=n), statistic)
        hits += found.low <= 0 <= found.high
    assert 0.91 <= hits / 400 <= 0.99


def test_performance_profiles_weigh_tasks_alike():
    found = st.profile([[0.2, 0.4], [0.9] * 10], [0.0, 0.3, 0.5, 1.0])
    assert found.tolist() == [1.0, 0.75, 0.5, 0.0]


def test_censored_runs_count_as_infinitely_late():
    steps, curve, spent = [2, 4, 6, 8], [0.5, 0.8, 0.9, 0.9], [1.0, 1.5, 2.0, 2.5]
    assert st.to_threshold(steps, curve, spent, 0.7) == st.Reached(6, 2.0)
    assert st.to_threshold(steps, curve, spent, 0.95) == st.Reached(INF, None)
    assert st.to_threshold(steps, curve, [None] * 4, 0.7) == st.Reached(6, None)
    assert st.to_threshold(steps, [-v for v in curve], spent, -0.7, higher_is_better=False) == st.Reached(6, 2.0)
    late, four, six = st.Reached(INF, None), st.Reached(4, 1.5), st.Reached(6, 2.0)
    assert st.median_reached([late, four, six]) == six
    assert st.median_reached([four, late]) == late, "half censored: no median is claimed"
    assert st.restricted_mean([4, INF], 10) == 7
    with pytest.raises(BadInput):
        st.median_reached([])


def test_win_probability_counts_ties_half():
    assert st.win_probability([2, 4], [3, 5]) == 0.75
    assert st.win_probability([INF, 2], [INF, 2]) == 0.5
    assert st.win_probability([2, 2], [INF]) == 1.0
    u = stats.mannwhitneyu([5, 9, 2, 2], [4, 2, 7]).statistic / 12
    assert st.win_probability([5, 9, 2, 2], [4, 2, 7]) == pytest.approx(1 - u)


def test_lr_width_in_octaves():
    scores = {1e-4: 0.60, 2e-4: 0.79, 4e-4: 0.80, 8e-4: 0.785, 16e-4: 0.55, 32e-4: 0.8}
    found = st.lr_width(scores, 0.02)
    assert (found.octaves, found.low, found.high, found.best, found.open) == (2.0, 2e-4, 8e-4, 4e-4, False)
    assert st.lr_width({1e-4: 0.7, 2e-4: 0.69}, 0.02).open and st.lr_width({1e-4: 0.7}, 0.1).octaves == 0
    assert st.lr_width({1e-4: 0.5, 2e-4: 0.1, 4e-4: 0.9}, 0.05, higher_is_better=False).best == 2e-4
    assert st.lr_width({1.0: 0.79, 2.0: 0.81}, 0.02).octaves == 1.0, "exactly on the margin counts"
    with pytest.raises(BadInput):
        st.lr_width({}, 0.1)
    assert st.uneven_grids({"a": [1, 2, 3], "b": [4, 5, 6]}) is None
    assert "a 3, b 1" in st.uneven_grids({"a": [1, 2, 3], "b": [4]})


def test_the_pareto_front():
    costs, scores = [1, 2, 3, 2, 5], [0.5, 0.7, 0.6, 0.7, 0.9]
    assert st.front(costs, scores) == [True, True, False, True, True]
    assert st.front(costs, scores, higher_is_better=False) == [True, False, False, False, False]
    assert st.front([], []) == []
    assert st.front([100, 101, 50], [0.5, 0.7, 0.6]) == [False, True, True]
    assert st.front([100.0, 100.5], [0.5, 0.7]) == [True, True]
    assert st.front([100.0, 100.5], [0.5, 0.7], tolerance=0.01) == [False, True], "half a percent is no saving"
