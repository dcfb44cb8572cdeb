"""Clipping: how large one example's gradient may be, over which groups of parameters, and by which function."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dpft.harness import devices
from dpft.harness.errors import unknown
from dpft.harness.query.queries import Bound

GAMMA = 0.01  # the stabiliser of auto-s and psac, as published
TINY = 1e-30


def abadi(norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """min(1, C/norm) (Abadi et al., 1607.00133, Algorithm 1)."""
    return (clip_norm / norms.clamp_min(TINY)).clamp_max(1.0)


def auto_s(norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """C/(norm + gamma): every gradient is normalised (Bu et al., 2206.07136, AUTO-S, with R = C)."""
    return clip_norm / (norms + GAMMA)


def psac(norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """C/(norm + r/(norm + r)): like auto-s, with small gradients weighted less (Xia et al., 2212.00328)."""
    return clip_norm / (norms + GAMMA / (norms + GAMMA))


# Each keeps factor * norm <= clip_norm; the names are those a clipping rule may have as its `function`.
FUNCTIONS = {"abadi": abadi, "auto-s": auto_s, "psac": psac}


@dataclass(frozen=True)
class Clipping:
    """function: a name in FUNCTIONS. groups: `flat`, one bound for all parameters together; `layer`, one for each module that
    owns parameters; `block`, one for each numbered block and one for the rest. Of one bound C each of K groups gets
    C/sqrt(K), so one example's whole contribution is at most C and the noise is that of flat clipping (2212.01539). Raises
    BadInput for another function.
    """

    function: str = "abadi"
    groups: str = "flat"

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise unknown("clipping function", str(self.function), FUNCTIONS)

    def group_of(self, name: str) -> str:
        """The group of the parameter called `name`."""
        if self.groups == "flat":
            return ""
        if self.groups == "layer":
            return name.rpartition(".")[0]
        found = re.match(r"(.*?\.\d+)\.", name)
        return found.group(1) if found else ""

    def grouped(self, names) -> dict[str, list[str]]:
        """Group -> its parameters, in the order of `names`."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.group_of(name), []).append(name)
        return found

    def of_group(self, squares: torch.Tensor, clip_norm: float, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(norms, factors), [batch] float64, of one of `groups` groups from its parameters' squared norms [parameters, batch]."""
        norms = squares.sum(0, dtype=torch.float64).clamp_min(0).sqrt()
        return norms, self.factors(norms, clip_norm, groups)

    def factors(self, norms: torch.Tensor, clip_norm: float, groups: int = 1) -> torch.Tensor:
        """What each example's gradient of one of `groups` groups is multiplied by; norms [batch], of that group.

        With an infinite bound nothing is clipped.
        """
        if clip_norm == math.inf:
            return torch.ones_like(norms)
        return FUNCTIONS[self.function](norms, clip_norm / groups**0.5)


FLAT = Clipping()


def divided(bound: Bound, groups: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Group -> (C, K): its bound is C/sqrt(K). One bound is shared by all groups alike, a mapping gives each its own, K = 1.

    Raises RuntimeError for bounds that are not above 0, and for a mapping that has not exactly these groups.
    """
    if not isinstance(bound, Mapping):
        found = dict.fromkeys(groups, (bound, len(groups)))
    elif set(bound) == set(groups):
        found = {group: (bound[group], 1) for group in groups}
    else:
        wrong = sorted(set(bound) ^ set(groups))[0]
        state = "has no bound" if wrong in groups else "does not exist"
        raise RuntimeError(
            f"The clipping group {wrong!r} {state}; give one bound for each of {', '.join(map(repr, groups))}."
        )
    for group, (clip_norm, _) in found.items():
        if not clip_norm > 0:
            raise RuntimeError(f"The bound of the clipping group {group!r} is {clip_norm}; it must be above 0.")
    return found


def limits(bound: Bound, groups: Sequence[str]) -> list[float]:
    """The bound C_g of each group, in the order of `groups`. Raises RuntimeError as `divided`."""
    return [clip_norm / count**0.5 for clip_norm, count in divided(bound, groups).values()]


def ball(bound: Bound, groups: Sequence[str]) -> float:
    """C: the root of the sum of the groups' squared bounds, which no example's whole contribution exceeds."""
    found = limits(bound, groups)
    return math.sqrt(sum(limit**2 for limit in found)) if isinstance(bound, Mapping) else bound


def overall(norms: torch.Tensor, bound: Bound, groups: Sequence[str]) -> torch.Tensor:
    """[batch], to be compared with `ball`: the largest of norm_g / C_g, times C; of an infinite ball, as if all C_g were equal.

    norms: [batch, groups].
    """
    whole = ball(bound, groups)
    if not isinstance(bound, Mapping) or whole == math.inf:
        return norms.amax(1) * norms.shape[1] ** 0.5
    each = devices.sent(torch.tensor(limits(bound, groups), dtype=norms.dtype), norms.device)
    return (norms / each).amax(1) * whole
