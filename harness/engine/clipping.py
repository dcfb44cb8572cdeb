"""Clipping: how large one example's gradient may be, over which groups of parameters, and by which function."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

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
    owns parameters; `block`, one for each numbered block and one for the rest. With K groups each has the bound
    C/sqrt(K), so one example's whole contribution is at most C and the noise is that of flat clipping (2212.01539).
    """

    function: str = "abadi"
    groups: str = "flat"

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
        """What each example's gradient of one of `groups` groups is multiplied by; norms [batch], of that group."""
        return FUNCTIONS[self.function](norms, clip_norm / groups**0.5)


FLAT = Clipping()


def overall(norms: list[torch.Tensor]) -> torch.Tensor:
    """[batch]: the norms as they compare with the clip norm C: with K groups sqrt(K) times the largest of a group."""
    return torch.stack(norms).amax(0) * len(norms) ** 0.5
