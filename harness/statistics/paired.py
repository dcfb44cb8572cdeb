"""Paired differences over seeds: exact sign-flip tests, Holm's adjustment, the difference that could have been seen."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpft.harness.errors import BadInput
from dpft.harness.statistics.aggregate import Interval, finite, interval

LEVEL = 0.05
POWER = 0.8
EXACT_UP_TO = 12  # seeds: 4,096 sign patterns; above, as many are drawn at random
DRAWS = 2**EXACT_UP_TO - 1
SIMULATED = 10_000  # sets of differences behind a power: its standard error is .004

Alternative = Literal["two-sided", "less", "greater"]


@dataclass(frozen=True)
class SignFlip:
    """p: p-value; smallest: the smallest p that this many seeds can give; exact: whether all sign patterns were counted."""

    p: float
    smallest: float
    exact: bool


@dataclass(frozen=True)
class Comparison:
    """One method against a baseline over the seeds that both have.

    difference: mean of method minus baseline; interval: of it (None with too few seeds); std: of the paired differences
    (ddof 1, None with one seed); adjusted: Holm's p over the methods compared (Bonferroni's over `tests`); holm_level: the level
    divided by their number, which Holm asks of the smallest p; wins: probability that the method is better on a seed, ties half.
    verdict: `better`, `worse`, `no difference shown`, or `cannot tell with ...` where no data could have been significant.
    """

    seeds: tuple[int, ...]
    difference: float
    values: tuple[float, ...]
    interval: Interval | None
    std: float | None
    p: float
    adjusted: float
    exact: bool
    holm_level: float
    wins: float
    verdict: str

    @property
    def detectable(self) -> float:
        """The smallest detectable difference at `holm_level`, infinite where these seeds can show none."""
        return math.inf if self.std is None else detectable_difference(self.std, len(self.seeds), self.holm_level)


def smallest_p(n: int, alternative: Alternative = "two-sided") -> float:
    """The smallest p-value that a sign-flip test of `n` pairs can give: 2/2^n two-sided, 1/2^n one-sided."""
    return min(1.0, (2.0 if alternative == "two-sided" else 1.0) / 2.0**n)


def fewest_seeds(level: float = LEVEL, alternative: Alternative = "two-sided") -> int:
    """The fewest pairs with which a sign-flip test can reject at `level`: 6 at 5% two-sided, 5 one-sided."""
    return next(n for n in range(1, 64) if smallest_p(n, alternative) <= level)


def sign_flip(differences: Sequence[float], alternative: Alternative = "two-sided", seed: int = 0) -> SignFlip:
    """Test that paired differences are symmetric about zero, by flipping their signs; the statistic is the mean.

    alternative: `less` asks whether the differences are below zero, `greater` above. All 2^n patterns are counted up to 12
    pairs, above 4,095 are drawn with `seed`. Source: Fisher's randomisation test for pairs. To the bit
    scipy.stats.permutation_test (permutation_type="samples"), which makes its patterns anew each time and is 20 times slower.
    Raises BadInput without differences or where one is not finite.
    """
    x = finite(differences, "differences")
    if not len(x):
        raise BadInput(
            "A paired test needs at least one pair of runs with the same seed; run both methods on shared seeds."
        )
    if len(x) == 1 or not x.any():  # nothing to compare signs by
        agrees = len(x) == 1 and {"greater": x[0] > 0, "less": x[0] < 0}.get(alternative, False)
        return SignFlip(0.5 if agrees else 1.0, smallest_p(len(x), alternative), True)
    exact = len(x) <= EXACT_UP_TO
    signs = _all_signs(len(x)) if exact else _drawn_signs(len(x), seed)
    x = x / np.abs(x).max()
    observed, flipped = (np.round(np.mean(values, axis=-1), 12) for values in (x, (signs * x[:, None]).T))  # sums tie
    slack, own = abs(100 * np.finfo(float).eps * observed), 0 if exact else 1  # drawn: the pattern observed counts, too
    patterns = len(flipped) + own
    below = (np.count_nonzero(flipped <= observed + slack) + own) / patterns
    above = (np.count_nonzero(flipped >= observed - slack) + own) / patterns
    p = {"less": below, "greater": above, "two-sided": min(1.0, 2 * min(below, above))}[alternative]
    smallest = smallest_p(len(x), alternative) if exact else smallest_p(EXACT_UP_TO, alternative)
    return SignFlip(float(p), smallest, exact)


@functools.lru_cache(maxsize=16)
def _all_signs(n: int) -> np.ndarray:
    """Every pattern of `n` signs, one a column."""
    return 1.0 - 2.0 * ((np.arange(2**n) >> np.arange(n)[:, None]) & 1)


@functools.lru_cache(maxsize=16)
def _drawn_signs(n: int, seed: int) -> np.ndarray:
    """DRAWS patterns of `n` signs, one a column: those that scipy draws."""
    drawn = np.random.default_rng(seed).permuted(np.tile(np.arange(2), (DRAWS, n, 1)), axis=-1)
    return np.ascontiguousarray(1.0 - 2.0 * drawn[:, :, 0].T)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: reject where <= level and the family-wise error is at most level (Holm, 1979)."""
    p = finite(p_values, "p-values")
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors)) if len(p) else []
    return adjusted.tolist()


def detectable_difference(
    std: float, n: int, level: float = LEVEL, power: float = POWER, alternative: Alternative = "two-sided"
) -> float:
    """The smallest true mean difference that a sign-flip test of `n` pairs shows at `level` with probability `power`.

    std: standard deviation of the paired differences, which are taken to be normal; the result has its unit. Simulated with
    the test itself (`critical_shifts`): where only one pattern of signs rejects, as with 6 pairs at 5%, it asks for much more
    than a t test. Infinite where `n` pairs cannot reject at `level` whatever the data.
    """
    side = level / 2 if alternative == "two-sided" else level  # a rejection on the wrong side is no discovery
    patterns = 2 ** min(n, EXACT_UP_TO)
    rejecting = math.floor(side * patterns * (1 + 1e-9))
    if n < 2 or rejecting < 1:
        return math.inf
    return float(std * np.quantile(critical_shifts(n, min(rejecting, patterns)), power))


@functools.lru_cache(maxsize=256)
def critical_shifts(n: int, rejecting: int) -> np.ndarray:
    """For SIMULATED sets of `n` standard normal differences the shift above which the sign-flip test rejects; sorted.

    rejecting: how many of the sign patterns may have a mean as large as the one observed, itself among them. Flipping the signs
    of the set F of z + d raises the mean unless d > -mean(z over F): so all patterns are compared at once, for every shift, and
    the test rejects exactly above the `rejecting`-th largest of -mean(z over F), F not empty. Above 12 pairs F is drawn at
    random, as in `sign_flip`. Seeded: the same figures every time.
    """
    rng = np.random.default_rng(0)
    if n <= EXACT_UP_TO:
        members = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1
    else:
        members = rng.integers(0, 2, (DRAWS, n))
        members[~members.any(axis=1), 0] = 1  # nothing flipped: one in 2^13
    means = -(members / members.sum(axis=1, keepdims=True)).T.astype(np.float32)
    found = []
    for _ in range(0, SIMULATED, SIMULATED // 10):  # in parts: a tenth of the sets by 4,095 patterns is 16 MB
        shifts = rng.standard_normal((SIMULATED // 10, n), dtype=np.float32) @ means
        place = max(shifts.shape[1] - rejecting, 0)
        found.append(np.partition(shifts, place, axis=1)[:, place])
    return np.sort(np.concatenate(found))


def compare(
    methods: Mapping[str, Mapping[int, float]],
    baseline: Mapping[int, float],
    higher_is_better: bool = True,
    level: float = LEVEL,
    tests: int | None = None,
) -> dict[str, Comparison]:
    """Every method against `baseline`, paired by seed; Holm over all of `methods`.

    tests: where the same values chose the baseline, how many pairs could have been compared; Bonferroni over these instead.

    methods: name -> seed -> value; baseline: seed -> value. Methods that share no seed with the baseline are left out.
    Two-sided; the detectable difference is at `level` divided by the number of methods, which Holm asks of the smallest p.
    Values by seed are paired where both have one, and nothing stands in for one that is missing.
    """
    pairs = {
        name: {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}
        for name, values in methods.items()
    }
    pairs = {name: found for name, found in pairs.items() if found}
    flips = {name: sign_flip(list(found.values())) for name, found in pairs.items()}
    many = max(len(pairs), tests or 0)
    counted = f"{many} {'methods' if tests is None else 'pairs'}"

    def adjust(p_values: list[float]) -> dict[str, float]:
        found = holm(p_values) if tests is None else [min(1.0, p * many) for p in p_values]
        return dict(zip(pairs, found, strict=True))

    adjusted = adjust([test.p for test in flips.values()])
    # Holm's p grows with every p it is given: with all at their smallest it is the smallest that can come out
    floors = adjust([test.smallest for test in flips.values()])
    found = {}
    for name, by_seed in pairs.items():
        x = np.array(list(by_seed.values()))
        std = float(np.std(x, ddof=1)) if len(x) > 1 else None
        gain = float(np.mean(x)) * (1 if higher_is_better else -1)
        signed = x if higher_is_better else -x
        found[name] = Comparison(
            seeds=tuple(by_seed),
            difference=float(np.mean(x)),
            values=tuple(x.tolist()),
            interval=interval(x),
            std=std,
            p=flips[name].p,
            adjusted=adjusted[name],
            exact=flips[name].exact,
            holm_level=level / many,
            wins=float(np.mean((signed > 0) + 0.5 * (signed == 0))),
            verdict=_verdict(gain, adjusted[name], flips[name].smallest, floors[name], len(x), counted, level),
        )
    return found


def _verdict(gain: float, adjusted: float, smallest: float, floor: float, n: int, counted: str, level: float) -> str:
    if adjusted <= level:
        return "better" if gain > 0 else "worse"
    seeds = f"{n} seed{'s' if n > 1 else ''}"
    if smallest > level:
        return f"cannot tell with {seeds}: smallest p is {smallest:.3g}"
    if floor > level:
        return f"cannot tell with {seeds} and {counted}: smallest adjusted p is {floor:.3g}"
    return "no difference shown"
