"""Epsilon of a ledger and the noise that meets a target, by numerical composition (PRV, Gopi et al. 2106.02848).

prv-accountant does the composition; this module chooses its tolerances, keeps it away from the inputs on which it is
wrong or takes all memory, and turns whatever it raises into one sentence. Always report and match on `upper`.
"""

import functools
import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from dpft.harness.cache import cached
from dpft.harness.errors import CannotRun
from dpft.harness.privacy import shares
from dpft.harness.privacy.shares import Kinds

SLACK = 0.025  # "matched": target * (1 - SLACK) <= estimate and upper <= target
MIN_SIGMA, MAX_EPSILON, MAX_CELLS = 0.3, 20.0, 2e7
MAX_STEPS, MAX_KINDS = 10**8, 32  # composing many distinct kinds is slow: 20 take 1.4 s, 100 take 64 s
CLOSE = 1e-3  # calibration stops when upper is this close below the target
MAX_REFUSALS = 8
COARSER = 5.0  # the grid of the search has this many times fewer cells; its estimate moves by some 1e-4
WIDE = 3 * MAX_EPSILON  # losses beyond this come from too little noise, not from too fine a tolerance

# (sampling probability, merged noise multiplier, number of steps) of every distinct kind of event
Composition = tuple[tuple[float, float, int], ...]


def tolerance(target_epsilon: float, delta: float) -> tuple[float, float]:
    """The one rule for the accountant's tolerances: (eps_error, delta_error) = (min(.01, target/50), delta/1000)."""
    return min(0.01, target_epsilon / 50), delta / 1000


@functools.lru_cache(maxsize=512)
def prv_epsilon(kinds: Composition, delta: float, target: float) -> tuple[float, float, float]:
    """`epsilon` of a composition; computed once per process for each argument."""
    check_numbers(kinds, delta, target)
    if not kinds:
        return 0.0, 0.0, 0.0
    with guarded(kinds, delta):
        return evaluate(build_accountant(kinds, delta, target), kinds, delta)


def evaluate(accountant: Any, kinds: Composition, delta: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) of the composition that `accountant` was built for; CannotRun as `epsilon` says."""
    lower, estimate, upper = accountant.compute_epsilon(delta, [int(steps) for _, _, steps in kinds])
    if not all(map(math.isfinite, (lower, estimate, upper))):
        raise _refusal(kinds, delta, "its epsilon is not finite")
    if upper > MAX_EPSILON:
        raise _refusal(
            kinds, delta, f"epsilon {upper:.4g} is above {MAX_EPSILON:g}, where the accountant is unreliable"
        )
    return max(0.0, lower), max(0.0, estimate), max(0.0, upper)


def calibrate(
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    noise_stream: int = 1,
    kinds: Kinds = (),
) -> float:
    """The noise multiplier of `steps` Poisson-subsampled Gaussian steps that matches a target; cached on disk.

    kinds: of steps whose releases share it (harness/privacy/shares.py); empty: one release a step.

    The returned sigma is on the private side: `upper <= target` and `target * (1 - .025) <= estimate`, as `epsilon`
    computes them at the delta that the noise's tail leaves (harness/privacy/tail.py). Raises CannotRun, saying which of
    epsilon, batch size and steps to change and how, else.
    """
    target, delta, q = float(target_epsilon), float(delta), float(sampling_probability)
    check_numbers(((q, 1.0, steps),), delta, target)

    def valid(sigma: Any) -> bool:
        return isinstance(sigma, float) and MIN_SIGMA <= sigma < math.inf

    inputs = {"target": target, "delta": delta, "q": q, "steps": int(steps), "prv_accountant": library_version()}
    if noise_stream != 1:
        from dpft.harness.privacy import tail

        inputs |= tail.cache_key(noise_stream)
    inputs |= shares.cache_key(kinds)
    return cached("sigma", inputs, valid, lambda: _search(target, delta, q, int(steps), noise_stream, kinds))


def matches(values: Sequence[float], target: float) -> bool:
    """Whether (lower, estimate, upper) meets a target: `target * (1 - .025) <= estimate` and `upper <= target`."""
    return target * (1 - SLACK) <= values[1] and values[2] <= target


def _search(target: float, delta: float, q: float, steps: int, noise_stream: int, kinds: Kinds) -> float:
    """The calibrated sigma: found on a coarse grid, then confirmed, and if need be improved, on the certified one."""
    from dpft.harness.privacy import tail
    from dpft.harness.privacy.ledger import Release

    def fine(sigma: float) -> tuple[float, float, float]:
        entry = Release(name="gradient", noise_multiplier=sigma)
        left = tail.of_noise(entry, q, steps, delta, noise_stream, kinds)
        return prv_epsilon(((q, shares.least(sigma, kinds), steps),), left, target)

    def coarse(sigma: float) -> tuple[float, float, float]:
        kinds = ((q, sigma, steps),)
        with guarded(kinds, delta):
            estimate = evaluate(build_accountant(kinds, delta, target, COARSER), kinds, delta)[1]
        return estimate, estimate, estimate + tolerance(target, delta)[0]

    start = max(MIN_SIGMA, _sigma_by_rdp(target, delta, q, steps))
    with suppress(CannotRun):  # the certified grid then says what is wrong
        start = bracket(coarse, start, target)
    try:
        return bracket(fine, start, target)
    except Unmet as unmet:
        raise CannotRun(f"{unmet} (q={q:g}, T={steps}, delta={delta:g}).") from None


class Unmet(CannotRun):
    """No sigma meets the target; the message lacks the values and the full stop."""


def bracket(at: Callable[[float], tuple[float, float, float]], high: float, target: float) -> float:
    """Bracketed interpolation of log(upper) in log(sigma), from the large side: small sigmas exhaust the memory."""
    low, low_upper, refusals, growth = 0.0, math.inf, 0, 1.005
    values = at(high)
    while values[2] > target:  # the tolerances count against us, and RDP cannot reach every small target
        low, low_upper = high, values[2]
        high, growth = high * growth, growth**2
        values = at(high)
    while not (matches(values, target) and values[2] >= target * (1 - CLOSE)):
        if high <= MIN_SIGMA:
            raise Unmet(
                f"Epsilon {target:g} would need a noise multiplier under {MIN_SIGMA:g}, which cannot be certified: "
                "decrease epsilon, or increase the batch size or the number of steps"
            )
        if high - low < 1e-9 * high:
            raise Unmet(f"No noise multiplier meets epsilon {target:g} within {SLACK:.1%}: increase epsilon")
        sigma = _guess(low, low_upper, high, values[2], target)
        try:
            tried = at(sigma)
        except CannotRun:  # epsilon over 20 or too large a grid: both mean that sigma is too small
            refusals += 1
            if refusals > MAX_REFUSALS:
                raise
            tried = (math.inf, math.inf, math.inf)
        if tried[2] > target:
            low, low_upper = sigma, tried[2]
        else:
            high, values = sigma, tried
    return high


def _guess(low: float, low_upper: float, high: float, high_upper: float, target: float) -> float:
    """The next sigma to try, strictly inside the bracket, never under half of its private end."""
    aim, at_high = math.log(target * (1 - CLOSE / 2)), math.log(max(high_upper, 1e-6 * target))
    if low == 0.0:  # epsilon falls like sigma^-1 to sigma^-2, or faster: the middle overshoots a little, and brackets
        return max(MIN_SIGMA, high / 2, high * math.exp((at_high - aim) / 1.5) * 0.98)
    if not math.isfinite(low_upper):
        return math.sqrt(low * high)
    share = (aim - math.log(low_upper)) / (at_high - math.log(low_upper))
    return low * (high / low) ** min(0.95, max(0.05, share))


def _sigma_by_rdp(target: float, delta: float, q: float, steps: int) -> float:
    """A noise multiplier that Renyi accounting (1908.10530; its epsilon is the larger) puts at or under `target`."""
    from prv_accountant import PoissonSubsampledGaussianMechanism
    from prv_accountant.other_accountants import RDP

    orders = [float(order) for order in (*range(2, 33), 40, 48, 64, 96, 128, 256, 512)]
    floor = math.log(1 / delta) / (orders[-1] - 1)  # what conversion alone costs: no sigma gets RDP under it

    def upper(sigma: float) -> float:
        mechanism = PoissonSubsampledGaussianMechanism(sampling_probability=q, noise_multiplier=sigma)
        return float(RDP(prvs=[mechanism], orders=orders).compute_epsilon(delta, [steps])[2])

    with guarded(((q, 1.0, steps),), delta):
        low, high = MIN_SIGMA, 1.0
        while upper(high) > max(target, 2 * floor):
            low, high = high, 2 * high
        while high > 1.02 * low:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if upper(middle) > max(target, 2 * floor) else (low, middle)
    return high


def check_numbers(kinds: Composition, delta: float, target: float) -> None:
    """Raises CannotRun for numbers that prv-accountant gets wrong or that mean nothing."""
    if not 0 < target <= MAX_EPSILON:
        raise CannotRun(f"Cannot certify epsilon {target!r}: choose epsilon above 0 and at most {MAX_EPSILON:g}.")
    floor = _smallest_delta()
    if not floor <= delta < 1:
        raise CannotRun(f"Cannot certify delta {delta!r}: choose delta of at least {floor:g} and under 1/N.")
    if len(kinds) > MAX_KINDS:
        raise CannotRun(f"Cannot certify {len(kinds)} distinct noise levels: quantise the schedule to at most 20.")
    for q, sigma, steps in kinds:
        if not 0 < q <= 1:
            raise CannotRun(f"Cannot certify sampling probability {q!r}: choose a batch size between 1 and N.")
        if not MIN_SIGMA <= sigma < 1e6:
            hint = "decrease epsilon" if sigma < 1 else "increase epsilon"
            raise CannotRun(
                f"Cannot certify noise multiplier {sigma!r}, outside [{MIN_SIGMA:g}, 1e6): {hint}, or change q or T."
            )
        if not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
            raise CannotRun(f"Cannot certify T={steps!r} steps: choose a whole number from 1 to {MAX_STEPS:g}.")


@contextmanager
def guarded(kinds: Composition, delta: float) -> Iterator[None]:
    """Turns every exception of an accounting library into CannotRun naming the values, and silences its warnings."""
    import numpy

    try:
        with warnings.catch_warnings(), numpy.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except CannotRun:
        raise
    except Exception as problem:
        raise _refusal(kinds, delta, f"{type(problem).__name__}: {problem}".rstrip(". \n")) from None


def _refusal(kinds: Composition, delta: float, reason: str) -> CannotRun:
    named = ", ".join(f"q={q:g} sigma={sigma:g} T={steps}" for q, sigma, steps in kinds[:3])
    more = ", ..." if len(kinds) > 3 else ""
    return CannotRun(f"Cannot certify: change epsilon, q or T ({named}{more}, delta={delta:g}; {reason}).")


def build_accountant(kinds: Composition, delta: float, target: float, coarser: float = 1.0) -> Any:
    """prv-accountant for a composition, its grid (Theorem 5.5 of 2106.02848) estimated before anything is allocated."""
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    from dpft.harness.privacy.exact_mean import install

    install()
    eps_error, delta_error = tolerance(target, delta)
    eps_error *= coarser
    mechanisms = [PoissonSubsampledGaussianMechanism(sampling_probability=q, noise_multiplier=s) for q, s, _ in kinds]
    for mechanism in mechanisms:  # asked four times for each order, and slow: most of the time of a small composition
        mechanism.rdp = functools.cache(mechanism.rdp)
    counts = [int(steps) for _, _, steps in kinds]
    half_width, cells = _grid(mechanisms, counts, eps_error, delta_error)
    if cells * max(1, len(kinds) // 4) > MAX_CELLS:  # every kind holds a grid of its own
        change = "increase the noise or decrease q or T" if half_width > WIDE else "increase epsilon or decrease T"
        raise _refusal(kinds, delta, f"its grid has {cells:.2g} cells, so {change}")
    return PRVAccountant(prvs=mechanisms, max_self_compositions=counts, eps_error=eps_error, delta_error=delta_error)


def _grid(
    mechanisms: Sequence[Any], counts: Sequence[int], eps_error: float, delta_error: float
) -> tuple[float, float]:
    """The largest privacy loss and the number of cells of the grid that PRVAccountant would allocate."""
    from prv_accountant.accountant import compute_safe_domain_size

    half_width = float(compute_safe_domain_size(mechanisms, counts, eps_error=eps_error, delta_error=delta_error))
    mesh = eps_error / math.sqrt(sum(counts) / 2 * math.log(12 / delta_error))
    return half_width, 2 * half_width / mesh


def _smallest_delta() -> float:
    import numpy

    # prv-accountant sums in long double; where that is only 64 bits wide, its floating-point noise is 1000 times larger
    return 1e-13 if numpy.finfo(numpy.longdouble).eps < 1e-18 else 1e-10


@functools.cache
def library_version() -> str:
    """The version of prv-accountant, part of every cache key."""
    from importlib.metadata import version

    return version("prv-accountant")
