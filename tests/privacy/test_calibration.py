"""Calibration, the curve of epsilon by step, the cache, matched budgets."""

import itertools
import json
import math
import os
from pathlib import Path

import pytest
from privacy_cases import DELTA, events_of

from dpft.harness import cache
from dpft.harness.cache import cache_dir
from dpft.harness.errors import CannotRun
from dpft.harness.privacy import calibrate, certify, epsilon, epsilon_curve, matched

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    "target, q, steps", [(0.1, 0.02, 20), (1.0, 0.01, 200), (4.0, 0.064, 60), (8.0, 0.02, 100), (2.0, 1.0, 1)]
)
def test_calibrated_noise_is_matched(target, q, steps):
    sigma = calibrate(target, DELTA, q, steps)
    lower, estimate, upper = epsilon(events_of(q, sigma, steps), DELTA, target)
    assert target * (1 - 0.025) <= estimate and upper <= target
    assert upper >= target * (1 - 0.002)
    assert certify(events_of(q, sigma, steps), DELTA, target)["within_budget"] is True


def test_calibration_is_monotone():
    by_target = [calibrate(target, DELTA, 0.05, 20) for target in (0.5, 1.0, 4.0)]
    assert by_target == sorted(by_target, reverse=True) and len(set(by_target)) == 3
    by_q = [calibrate(1.0, DELTA, q, 20) for q in (0.02, 0.05, 0.1)]
    by_steps = [calibrate(1.0, DELTA, 0.05, steps) for steps in (5, 20, 40)]
    for sigmas in (by_q, by_steps):
        assert sigmas == sorted(sigmas) and len(set(sigmas)) == 3


@pytest.mark.parametrize(
    "target, q, steps, words",
    [
        (20.0, 0.001, 5, "decrease epsilon, or increase the batch size or the number of steps"),
        (0.0005, 0.01, 100_000, "increase epsilon or decrease T"),
        (1.0, 0.0, 100, "batch size"),
        (1.0, 1.5, 100, "batch size"),
        (1.0, 0.01, 0, "T=0 steps"),
        (25.0, 0.01, 100, "epsilon 25.0"),
    ],
)
def test_unreachable_targets_say_what_to_change(target, q, steps, words):
    with pytest.raises(CannotRun, match=words):
        calibrate(target, DELTA, q, steps)


@pytest.mark.parametrize(
    "q, sigma, steps, delta", [(0.05, 1.0, 60, DELTA), (0.01, 0.8, 300, DELTA), (1.0, 6.0, 3, 1e-11)]
)
def test_curve_is_monotone_tight_and_never_understates(q, sigma, steps, delta):
    curve = epsilon_curve(sigma, q, steps, delta, 4.0)
    assert len(curve) == steps + 1 and curve[0] == 0.0
    assert all(earlier <= later for earlier, later in itertools.pairwise(curve))
    assert curve[-1] == epsilon(events_of(q, sigma, steps), delta, 4.0)[2]
    for step in {1, 2, steps // 3, steps // 2, steps - 1} - {0}:
        lower, estimate, upper = epsilon(events_of(q, sigma, step), delta, 4.0)
        assert curve[step] > estimate + 0.5 * (upper - estimate)
        assert curve[step] < upper + 0.1 + 0.02 * upper


def test_curve_of_no_steps():
    assert epsilon_curve(1.0, 0.1, 0, DELTA, 1.0) == [0.0]
    with pytest.raises(CannotRun):
        epsilon_curve(0.2, 0.1, 10, DELTA, 1.0)


def stored_files():
    return sorted(cache_dir().rglob("*.json"))


def test_cache_is_hit_and_damage_is_recomputed():
    sigma = calibrate(3.0, DELTA, 0.1, 5)
    (path,) = stored_files()
    text = path.read_text()
    damages = [
        "",
        "{",
        "[]",
        "null",
        text[:-20],
        text.replace(str(sigma), str(sigma * 0.9)),
        json.dumps({"value": 0.9}),
    ]
    for damage in damages:
        path.write_text(damage)
        assert calibrate(3.0, DELTA, 0.1, 5) == sigma
        assert path.read_text() == text
    assert stored_files() == [path] and not list(path.parent.glob(".tmp-*"))


def test_cached_computes_once_per_input():
    calls = []

    def compute():
        calls.append(1)
        return [len(calls)]

    def always(value):
        return True

    assert [cache.cached("k", {"a": 1}, always, compute) for _ in range(3)] == [[1]] * 3
    assert cache.cached("k", {"a": 2}, always, compute) == [2]
    assert cache.cached("other", {"a": 1}, always, compute) == [3]
    assert cache.cached("k", {"a": 1}, lambda value: False, compute) == [4]
    assert cache.cached("k", {"a": 1}, always, compute) == [4]


def test_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("DPFT_CACHE", str(file / "below"))
    assert calibrate(3.0, DELTA, 0.1, 5) > 0.3
    assert file.read_text() == "in the way"


def test_cache_dir_follows_the_environment(monkeypatch):
    assert str(cache_dir()) == os.environ["DPFT_CACHE"]
    monkeypatch.delenv("DPFT_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "dpft"


def section(**changes):
    return {
        "target": 2.0,
        "delta": DELTA,
        "adjacency": "zero-out, public N",
        "sampling": "poisson",
        "num_examples": 1000,
        "sampling_probability": 0.05,
        "steps_planned": 40,
        "steps_run": 40,
        "epsilon": [1.978, 1.988, 1.999],
    } | changes


def test_equal_budgets_are_matched():
    other_sigma = section(epsilon=[1.95, 1.96, 1.97], sampling_probability=0.05 * (1 + 1e-14))
    assert matched([section(), other_sigma, section()]) is None
    assert matched([section()]) is None and matched([]) is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_examples": 1001}, "differ in num_examples: 1000 against 1001"),
        ({"sampling_probability": 0.0501}, "differ in sampling_probability"),
        ({"steps_planned": 41, "steps_run": 41}, "differ in steps_planned"),
        ({"delta": 1e-6}, "differ in delta"),
        ({"adjacency": "replace-one"}, "differ in adjacency"),
        ({"sampling": "shuffle"}, "differ in sampling: 'poisson' against 'shuffle'"),
        ({"target": 2.01}, "differ in target"),
        ({"steps_run": 39}, "Row 2 ran 39 of its 40"),
        ({"epsilon": [1.978, 1.99, 2.0001]}, "Row 2 exceeds its budget"),
        ({"epsilon": [1.93, 1.949, 1.96]}, "Row 2 leaves budget unused"),
        ({"epsilon": [math.nan, math.nan, math.nan]}, "Row 2 exceeds its budget"),
        ({"epsilon": None}, "Row 2 has no certified epsilon"),
        ({"epsilon": [1.9]}, "Row 2 has an incomplete"),
    ],
)
def test_unmatched_rows_are_named(changes, words):
    reason = matched([section(), section(**changes)])
    assert words in reason and reason.endswith(".")


def test_rows_without_privacy_are_not_matched():
    assert matched([section(), None]) == "Row 2 is not private."
    incomplete = section()
    del incomplete["delta"]
    assert "Row 1 lacks delta" in matched([incomplete, section()])
