"""Shares of a step's budget: several releases on one batch, each with a noise multiplier of its own, that merge to one Gaussian.

A release with share w of a step has the noise multiplier sigma / sqrt(w), in units of its own bound. Shares that sum to 1 merge
to sigma (Dong et al. 1905.02383, Corollary 3.3; harness/privacy/ledger.py), adaptive questions included, and what sampling makes
of them is dominated by what it makes of that one Gaussian (Zhu, Dong and Wang 2106.08567, Theorem 11).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy.ledger import Release, merged_noise_multiplier

TOLERANCE = 1e-9
NUDGE = 1e-12  # far above the rounding of what merges, far below what an accountant can tell

# (number of steps, the shares of each) of every kind of step of a run; empty: one release in every step
Kinds = tuple[tuple[int, tuple[float, ...]], ...]


def checked(shares: Any, whose: str = "A step") -> dict[str, float]:
    """`shares` by name as floats that sum to 1, to far less than `NUDGE`; what has been checked stays as it is.

    Raises BadInput, which begins with `whose`, for anything but names with finite positive shares whose sum is 1 within 1e-9.
    """
    if not isinstance(shares, Mapping) or not shares:
        raise BadInput(f"{whose} must declare its releases as shares by name, not {shares!r}.")
    for name, share in shares.items():
        if not isinstance(name, str) or not name:
            raise BadInput(f"{whose} declares a release called {name!r}; a name is a text that is not empty.")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not (math.isfinite(share) and share > 0):
            raise BadInput(
                f"{whose} gives release {name!r} the share {share!r}; a share is a number above 0, and all of a step sum to 1."
            )
    total = math.fsum(shares.values())
    if abs(total - 1) > TOLERANCE:
        named = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise BadInput(f"{whose} has releases whose shares sum to {total:.10g}, not to 1 ({named}); mend them.")
    total = 1.0 if abs(total - 1) < NUDGE / 10 else total
    return {name: float(share) / total for name, share in shares.items()}


def noise_multiplier(sigma: float, share: float) -> float:
    """Of a release with that share of a step with noise multiplier sigma; a hair above sigma / sqrt(share) unless share is 1."""
    return sigma if share == 1 else sigma / math.sqrt(share) * (1 + NUDGE)


def noise_multipliers(sigma: float, shares: Mapping[str, float]) -> dict[str, float]:
    """The noise multiplier of each release of a step, each in units of its own bound.

    What they merge to is never below sigma; one release alone has exactly sigma. Raises BadInput as `checked`.
    """
    return {name: noise_multiplier(sigma, share) for name, share in checked(shares).items()}


def counted(steps: Iterable[tuple[int, Mapping[str, float]]]) -> Kinds:
    """The kinds of steps of a run out of (number of steps, shares by name), in a fixed order: names and order cost nothing."""
    counts: dict[tuple[float, ...], int] = {}
    for number, shares in steps:
        kind = tuple(sorted(shares.values()))
        counts[kind] = counts.get(kind, 0) + number
    if all(len(kind) == 1 for kind in counts):
        return ()
    return tuple((number, kind) for kind, number in sorted(counts.items()))


def of_kind(sigma: float, kind: tuple[float, ...]) -> list[Release]:
    """The releases of one step with these shares, under names of no meaning."""
    return [
        Release(name=f"release {i}", noise_multiplier=noise_multiplier(sigma, share)) for i, share in enumerate(kind)
    ]


def least(sigma: float, kinds: Kinds) -> float:
    """The noise multiplier that accounts for all steps of a run: what the releases of a step merge to, at the least."""
    return min((merged_noise_multiplier(of_kind(sigma, kind)) for _, kind in kinds), default=sigma)


def cache_key(kinds: Kinds) -> dict[str, Any]:
    """What a calibration on disk depends on; nothing where every step makes one release."""
    return {"shares": kinds} if kinds else {}


def of_releases(releases: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The shares that the releases of a ledger's event have had, by name."""
    weights = {release["name"]: release["noise_multiplier"] ** -2 for release in releases}
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def described(steps: Iterable[tuple[int, Mapping[str, float]]]) -> str:
    """Shares of (number of steps, shares by name) for a reader: `gradient 99%, count 1%`; of several kinds with their steps."""
    counts: dict[str, int] = {}
    for number, shares in steps:
        kind = (
            ", ".join(f"{name} {100 * share:.3g}%" for name, share in shares.items())
            if len(shares) > 1
            else [*shares][0]
        )
        counts[kind] = counts.get(kind, 0) + number
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{number:,} step{'s' if number > 1 else ''}: {kind}" for kind, number in counts.items())
