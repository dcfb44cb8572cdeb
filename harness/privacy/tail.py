"""What noise that ends early costs: no draw exceeds the reach of its stream, so what lies beyond it gives an example away.

Let z be standard noise of which no coordinate exceeds M in magnitude. An example that is there moves the sum by a vector
v / sigma of length 1 / sigma at most, and then a coordinate lands where it never does without the example with probability
h(v_i / sigma) = P(M - v_i / sigma < z <= M). No epsilon covers that. Everywhere else the ratio of the two densities is that
of the full law, so a training is (epsilon, delta + `missing`)-DP where the full law is (epsilon, delta)-DP.

The worst direction: h, as a function of the square of the shift, is concave for small shifts and convex for larger ones, so
its sum over d coordinates is at most h of the whole shift in one coordinate plus d times h of the shift spread over all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpft.harness.privacy import noise_kinds
from dpft.harness.privacy.samplings import POISSON, Poisson, of_event
from dpft.harness.privacy.shares import Kinds, of_kind

# The largest standard draw by stream (harness/train/noise.py). 2: at least this on every device. A Gaussian pair lies in a
# radius sqrt(2 * 64 * log 2) = 9.42, which is left more easily than a square of that half-width, by a factor under 7; a
# square of 9.1 is charged more than that (a test integrates the disc). The Laplace is -log u with u down to 2^-53.
# 1: PyTorch's fp32 draws, by device.
REACH = {"gaussian": 9.1, "laplace": 36.0}
LEGACY_REACH = {"cpu": math.sqrt(2 * 24 * math.log(2)), "cuda": math.sqrt(2 * 33 * math.log(2))}
MOST_COORDINATES = 10**11  # of a release: what is charged does not depend on the model


def cache_key(noise_stream: int) -> dict[str, Any]:
    """What a calibration for noise of that stream depends on; nothing for stream 1, of which nothing is charged."""
    return {} if noise_stream == 1 else {"noise_stream": noise_stream, "reach": REACH}


def missing(events: Sequence[Mapping[str, Any]], delta: float, noise_stream: int) -> float:
    """What must be added to the delta of a ledger's events, an upper bound; 0 for stream 1, whose `shortfall` is told instead.

    Per sampled batch and release q times the mass beyond (of several examples of a user: as likely as so many are in it), and the
    normalisation of the law within its reach, both over all steps in which an example may be (a round, whose noise has the
    coordinates of all its steps, counts once).
    Releases are counted before they are summed, so that neither their order nor their names change the last digit.
    """
    if noise_stream == 1:
        return 0.0
    beyond, cut = [], []
    for (q, *_, sampling), (steps, release) in _alike(events).items():
        presences = sampling.presences(q)
        beyond.append(steps * math.fsum(mass * _worst(release, MOST_COORDINATES, many) for many, mass in presences))
        cut.append(steps * MOST_COORDINATES * _above(_kind(release), REACH[_kind(release)]))
    return math.fsum(sorted(beyond)) + delta * math.expm1(min(math.fsum(sorted(cut)), 100.0))


def _alike(events: Iterable[Mapping[str, Any]]) -> dict[tuple, tuple[int, Mapping[str, Any]]]:
    """(number of releases, one of them) by all that they cost depends on."""
    found: dict[tuple, tuple[int, Mapping[str, Any]]] = {}
    for event in events:
        sampling = of_event(event)
        steps = sampling.participations(event["step_to"] - event["step_from"])
        for release in event["releases"]:
            parameters = tuple(sorted(release.get("parameters", {}).items()))
            if noise_kinds.of_one_number(release["mechanism"], dict(parameters)):
                continue  # its draws have no end
            law = (release["mechanism"], release["noise_multiplier"], parameters)
            key = (event["sampling_probability"], *law, sampling)
            before, _ = found.get(key, (0, release))
            found[key] = (before + steps, release)
    return found


def checked(events: Sequence[Mapping[str, Any]], delta: float, noise_stream: int) -> float:
    """The delta at which epsilon is computed: what is promised, less what the noise's tail lacks. Never under 0."""
    return max(0.0, delta - missing(events, delta, noise_stream))


def of_noise(
    entry: Any,
    sampling_probability: float,
    steps: int,
    delta: float,
    noise_stream: int,
    kinds: Kinds = (),
    sampling: Poisson = POISSON,
) -> float:
    """`checked` for `steps` steps of one release (harness/privacy/ledger.py, Release), or of several that share its noise.

    Raises ValueError for several of which one is not Gaussian.
    """
    if kinds and entry.mechanism != "gaussian":
        raise ValueError(f"only Gaussian releases may share a step, not those of mechanism {entry.mechanism}")
    planned = [(n, of_kind(entry.noise_multiplier, kind)) for n, kind in kinds] or [(steps, [entry])]
    events = [
        {
            "step_from": 0,
            "step_to": number,
            "sampling_probability": sampling_probability,
            **({"sampling": sampling.to_dict()} if sampling.together > 1 else {}),
            "releases": [release.to_dict() for release in releases],
        }
        for number, releases in planned
    ]
    return checked(events, delta, noise_stream)


def shortfall(events: Iterable[Mapping[str, Any]], reach: float, dimension: int | None) -> float:
    """The least delta, at any epsilon, of a training whose Gaussian noise ends at `reach`: what one attacker really sees.

    He knows the direction in which the example moves the sum, the worst there is for `dimension` coordinates (None: not known, so
    a single one), and looks whether any coordinate is beyond what noise can reach.
    """
    kept = 0.0  # log of the probability that nothing is seen
    for event in events:
        steps, q = event["step_to"] - event["step_from"], event["sampling_probability"]
        for release in event["releases"]:
            seen = max(_seen(1 / release["noise_multiplier"], reach, k) for k in _spreads(dimension))
            kept += steps * math.log1p(-min(q * seen, 1 - 1e-16))
    return -math.expm1(kept)


def _spreads(dimension: int | None) -> set[int]:
    return {1} if dimension is None else {1, dimension} | {10**k for k in range(1, 13) if 10**k < dimension}


def _seen(shift: float, reach: float, coordinates: int) -> float:
    """Probability that one of so many equally shifted Gaussian coordinates lies beyond the reach."""
    return -math.expm1(coordinates * math.log1p(-_crossing("gaussian", shift / math.sqrt(coordinates), reach)))


def _worst(release: Mapping[str, Any], coordinates: int, times: int = 1) -> float:
    """h summed over the coordinates in the worst direction, at most; for noise of random scale its mean over the scales.

    times: of how many bounds the shift is.
    """
    kind = _kind(release)
    total = 0.0
    for shift, mass in ((times * shift, mass) for shift, mass in _shifts(release)):
        spread = shift / math.sqrt(coordinates)
        at_most = _crossing(kind, shift, REACH[kind]) + coordinates * _crossing(kind, spread, REACH[kind])
        total += mass * min(1.0, at_most)
    return total


def _kind(release: Mapping[str, Any]) -> str:
    return "laplace" if release.get("parameters", {}).get("shape") == "coordinates" else "gaussian"


def _shifts(release: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(largest shift of the standard draws, probability) of a release."""
    sigma, parameters = release["noise_multiplier"], release.get("parameters", {})
    if release["mechanism"] == "gaussian":
        return [(1 / sigma, 1.0)]
    if parameters["shape"] == "coordinates":
        return [(math.sqrt(2) / sigma, 1.0)]  # the variance of Laplace(b) is 2 b^2
    from dpft.harness.privacy.mixtures import scales

    found, masses, lost = scales(noise_kinds.law_of(release["mechanism"], sigma, parameters), parameters["dimension"])
    return [(1 / float(s), float(mass)) for s, mass in zip(found, masses, strict=True)] + [(math.inf, float(lost))]


def _crossing(kind: str, shift: float, reach: float) -> float:
    """h: the probability that a standard draw, moved by `shift`, lands beyond `reach`, of those that were within it."""
    if shift >= reach:
        return 1.0
    if kind == "laplace":
        return 0.5 * math.exp(-reach) * math.expm1(shift)
    if shift * reach < 1e-3:  # the difference below would lose its digits
        return shift * math.exp(-(reach**2) / 2 + shift * reach) / math.sqrt(2 * math.pi)
    return _above(kind, reach - shift) / 2 - _above(kind, reach) / 2


def _above(kind: str, reach: float) -> float:
    """Probability that a standard draw exceeds `reach` in magnitude."""
    return math.exp(-reach) if kind == "laplace" else math.erfc(reach / math.sqrt(2))
