"""Lower bounds on epsilon at a confidence: from the parts of a training that were measured, and what is within reach of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy
from scipy import stats

from dpft.harness.audit.observe import Observation
from dpft.harness.errors import CannotRun
from dpft.harness.privacy.accountant import COARSER, MIN_SIGMA, build_accountant, evaluate, guarded
from dpft.harness.privacy.samplings import POISSON

CONFIDENCE = 0.95
CAP_STEP = 1.15  # how sigma is raised until the accountant takes it
ON_RATE = 0.01  # of the 5% that may be wrong, spent on the sampling rate; the rest on noise and contribution


@dataclass(frozen=True)
class Bound:
    """epsilon: lower bound; capped: the accountant goes no further than it, so the truth may be far above.

    sampling_rate, noise_multiplier: the confidence limits it is composed from; place: of the canaries, -1 all layers.
    """

    epsilon: float
    capped: bool
    sampling_rate: float
    noise_multiplier: float
    place: int


def measured(seen: Observation) -> Bound:
    """The largest epsilon at delta that the run shows with CONFIDENCE, by parts.

    Clopper-Pearson for the sampling rate, Student's t for the mean contribution of a canary (those in the batch less those who
    are not), chi-square for the noise along its direction; for canaries far above the clip norm, at all layers and at each layer,
    Bonferroni. Where a batch may hold several examples of a user, the user is in it with one of them at least.
    Composed as T independent Poisson-sampled Gaussians, which the checks on noise and batches stand for.
    """
    drawn = seen.member[seen.sampled][seen.eligible[seen.sampled]]
    q = _of_users(_rate(int(drawn.sum()), drawn.size), seen.together)
    kinds = numpy.unique(seen.places)
    wrong = (1 - CONFIDENCE - ON_RATE) / len(kinds) / 2
    found = []
    for place in kinds:
        chosen = seen.far & seen.sampled[:, None] & (seen.places == place)
        inside, outside = seen.seen[chosen & seen.member], seen.seen[chosen & ~seen.member]
        found.append((_effective(inside, outside, wrong), int(place)))
    sigma, place = min(found)
    return _composed(q, sigma, _turns(seen), seen.spec.delta, seen.spec.epsilon, place)


def within_reach(seen: Observation) -> Bound:
    """What `measured` says of a correct method with the canaries of this run whose every average is exactly what is expected."""
    chosen = (seen.far & seen.sampled[:, None])[:, seen.places < 0]
    return reachable(
        _turns(seen),
        seen.spec.delta,
        seen.spec.epsilon,
        seen.sampling_probability,
        float(seen.noise_multiplier.mean()) / seen.lead,
        int(chosen.sum()),
        len(numpy.unique(seen.places)),
        int(seen.eligible[seen.sampled].sum()),
        seen.together,
    )


def reachable(
    steps: int,
    delta: float,
    target: float,
    q: float,
    sigma: float,
    values: int,
    kinds: int,
    flips: int | None = None,
    together: int = 1,
) -> Bound:
    """values: what is seen of those canaries that aim at all layers, over all steps; kinds: groups of canaries that are tried;
    flips: coins that show the sampling rate, as many as values where it is not said; together: examples of a user."""
    flips = values if flips is None else flips
    rate = _of_users(_rate(round(q * flips), flips), together)
    inside, outside = max(2, round(q * values)), max(2, round((1 - q) * values))
    wrong = (1 - CONFIDENCE - ON_RATE) / kinds / 2
    gap = 1.0 - stats.t.isf(wrong, inside + outside - 2) * sigma * (1 / inside + 1 / outside) ** 0.5
    high = sigma * (outside / stats.chi2.ppf(wrong, outside)) ** 0.5
    return _composed(rate, high / gap if gap > 0 else numpy.inf, steps, delta, target, -1)


def _turns(seen: Observation) -> int:
    """How often an example may be drawn: so many steps (or rounds of steps) are composed."""
    return (POISSON if seen.privacy is None else seen.privacy.sampling).participations(seen.spec.steps)


def _rate(included: int, drawn: int) -> float:
    """Clopper-Pearson's lower limit."""
    return float(stats.beta.ppf(ON_RATE, included, drawn - included + 1)) if included else 0.0


def _of_users(rate: float, together: int) -> float:
    """How often at least one of so many examples is in a batch."""
    return rate if together == 1 else 1 - (1 - rate) ** together


def _effective(inside: numpy.ndarray, outside: numpy.ndarray, wrong: float) -> float:
    """Upper limit of noise over contribution, each wrong with probability `wrong`; infinite without a contribution."""
    if len(outside) == 0 and len(inside):  # q = 1: nobody is ever absent, and noise has mean zero
        outside = inside - inside.mean()
    if len(inside) < 2 or len(outside) < 2:
        return numpy.inf
    freedom = len(outside) - 1
    high = outside.std(ddof=1) * (freedom / stats.chi2.ppf(wrong, freedom)) ** 0.5
    error = (inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside)) ** 0.5
    gap = inside.mean() - outside.mean() - stats.t.isf(wrong, min(len(inside), len(outside)) - 1) * error
    return float(high / gap) if gap > 0 else numpy.inf


@lru_cache(maxsize=256)  # what is within reach of one setting is asked for each of the defects that are planted in it
def _composed(q: float, sigma: float, steps: int, delta: float, target: float, place: int) -> Bound:
    """The accountant's lower epsilon, on the coarse grid of the calibration: lower by five tolerances, and five times faster.

    Where sigma is too small for it, that of the smallest sigma it takes, which is less.
    """
    if q <= 0 or not sigma < 1e6:
        return Bound(0.0, False, q, float(sigma), place)

    def lower(tried: float) -> float | None:
        kinds = ((q, tried, steps),)
        try:
            with guarded(kinds, delta):
                return evaluate(build_accountant(kinds, delta, target, COARSER), kinds, delta)[0]
        except CannotRun:
            return None

    value = lower(sigma) if sigma >= MIN_SIGMA else None
    if value is not None:
        return Bound(value, False, q, float(sigma), place)
    tried = max(sigma, MIN_SIGMA)
    while (value := lower(tried)) is None and tried < 1e4:
        tried *= CAP_STEP
    return Bound(value or 0.0, True, q, float(sigma), place)
