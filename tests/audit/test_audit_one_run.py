"""The black-box audit: its bounds are what theory says, and it finds what it can find."""

import math

import pytest
from scipy import stats

from dpft.harness.audit import bugs, guessing
from dpft.harness.audit.one_run import one_run
from dpft.harness.audit.subject import Question

pytestmark = pytest.mark.usefixtures("one_thread")


def test_guesses_known_answers():
    """2305.08846: with all right and delta 0, epsilon solves p^m = .05; randomised response is covered exactly."""
    for m in (10, 100, 1000):
        p = 0.05 ** (1 / m)
        assert guessing.by_guesses(0.0, m, m, m) == pytest.approx(math.log(p / (1 - p)), abs=1e-3)
        assert guessing.ceiling(1e-5, m) <= guessing.by_guesses(0.0, m, m, m)
    assert guessing.by_guesses(1e-5, 100, 100, 50) == 0
    for right in (60, 80, 95):
        assert guessing.p_value(1.0, 0.0, 200, 100, right) == pytest.approx(
            stats.binom.sf(right - 1, 100, 1 / (1 + math.exp(-1)))
        )
        assert guessing.p_value(1.0, 1e-3, 200, 100, right) >= guessing.p_value(1.0, 0.0, 200, 100, right)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.0])
def test_the_tradeoff_audit_is_exact_for_randomised_response(epsilon):
    """2410.22235: for a pure epsilon the least refuted count is the binomial's 95% quantile, or one more."""

    def inverse(y):
        return max(0.0, y * math.exp(-epsilon), 1 - math.exp(epsilon) * (1 - y))

    m, p = 200, 1 / (1 + math.exp(-epsilon))
    least = next(v for v in range(1, m) if guessing.refuted(inverse, m, m, v))
    exact = next(v for v in range(1, m) if stats.binom.sf(v - 1, m, p) < 0.05)
    assert exact <= least <= exact + 1


def test_the_tradeoff_function_of_one_gaussian_step():
    for y in (0.01, 0.3, 0.9):
        exact = stats.norm.cdf(stats.norm.ppf(y) - 1 / 0.8)
        assert 0.97 * exact - 1e-5 <= guessing.inverse_tradeoff(1.0, 0.8, 1, y) <= exact * 1.001


def test_one_run_finds_missing_noise_and_nothing_else():
    question = Question("dp-sgd", steps=20, canaries=100, sampling_rate=0.25, epsilon=4.0)
    honest = one_run(question)
    assert honest.verdict == "consistent" and honest.ceiling < 5
    weak = Question("dp-sgd", steps=20, canaries=100, sampling_rate=0.25, epsilon=1.0)
    with next(bug for bug in bugs.BUGS if bug.name == "noise-over-batch").plant():
        assert one_run(weak).verdict == "VIOLATION: bound exceeds certificate"
