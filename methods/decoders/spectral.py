"""Singular values of signal plus white noise `Y = G + s Z`, Y of shape m x n: thresholds, shrinkers and their slopes.

Sources: Gavish & Donoho, 1305.5870 and 1405.7511; Benaych-Georges & Nadakuditi, 1103.2221; Johnstone 2001 (Tracy-Widom). The
noise level s is *known* here (sigma C/B), so nothing is estimated from medians. All formulas are symmetric in m and n.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHRINKERS = ("frobenius", "operator", "nuclear", "hard", "soft", "rank-k", "james-stein", "power", "partial")
THRESHOLDS = ("kappa", "tracy-widom", "gavish-donoho")
CORRECTIONS = ("none", "unbiased", "noisy")
TENDS_TO_IDENTITY = ("frobenius", "operator", "nuclear", "hard", "soft", "james-stein", "partial")  # as s -> 0
# Stein's formula holds: no jump at the edge. power has none where there is no threshold; that of the others at a Tracy-Widom
# threshold, per cents above the edge, is small beside what makes an estimate trusted.
CONTINUOUS = ("frobenius", "nuclear", "soft", "james-stein")
_TINY = 1e-150


def bulk_edge(m: int, n: int, s: float) -> float:
    """Largest singular value of the noise alone, in the limit: s (sqrt m + sqrt n)."""
    return s * (m**0.5 + n**0.5)


def detection_threshold(m: int, n: int, s: float) -> float:
    """Signal singular values below s (mn)^(1/4) leave no trace in Y (the BBP transition)."""
    return s * (m * n) ** 0.25


def spike_location(x: torch.Tensor, m: int, n: int, s: float) -> torch.Tensor:
    """Where a signal singular value x > s (mn)^(1/4) appears in Y."""
    return ((x**2 + s**2 * m) * (x**2 + s**2 * n)) ** 0.5 / x


def cosines(x: torch.Tensor, m: int, n: int, s: float) -> tuple[torch.Tensor, torch.Tensor]:
    """|cosine| of the noisy left and right singular vectors to the signal's, zero below the detection threshold."""
    top = (x**4 - s**4 * m * n).clamp(min=0)
    return (top / (x**4 + s**2 * m * x**2)) ** 0.5, (top / (x**4 + s**2 * n * x**2)) ** 0.5


@cache
def tracy_widom_quantile(level: float) -> float:
    """q with P(TW1 > q) = level, by bisection on F1(q) = det(1 - Ai(x + y + q)) over the half-line (Ferrari & Spohn 2005)."""
    import numpy
    from scipy.special import airy

    nodes, weights = numpy.polynomial.legendre.leggauss(60)
    x, root = 8 * (nodes + 1), (8 * weights) ** 0.5  # Ai vanishes well before 16

    def exceeds(q: float) -> bool:
        kernel = root[:, None] * airy(x[:, None] + x[None, :] + q)[0] * root[None, :]
        return 1 - numpy.linalg.det(numpy.eye(len(x)) - kernel) > level

    low, high = -6.0, 20.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    return (low + high) / 2


def tracy_widom_kappa(m: int, n: int, level: float) -> float:
    """kappa such that pure noise has a singular value above kappa times the bulk edge with probability `level`."""
    small, large = (m, n) if m <= n else (n, m)
    a, b = (large - 1) ** 0.5, small**0.5
    scale = (a + b) * (1 / a + 1 / b) ** (1 / 3)
    return max(0.0, (a + b) ** 2 + scale * tracy_widom_quantile(level)) ** 0.5 / (m**0.5 + n**0.5)


def gavish_donoho_kappa(m: int, n: int) -> float:
    """The best hard threshold lambda(min/max) s sqrt(max) of 1305.5870, over the bulk edge."""
    b = min(m, n) / max(m, n)
    best = (2 * (b + 1) + 8 * b / (b + 1 + (b * b + 14 * b + 1) ** 0.5)) ** 0.5
    return best * max(m, n) ** 0.5 / (m**0.5 + n**0.5)


def _unbiased(
    y: torch.Tensor, m: int, n: int, s: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(inside, t, r, xhat): whether y is at or above the bulk edge, and the terms of the shrinkers."""
    t = y**2 - s**2 * (m + n)
    r = (t**2 - 4 * s**4 * m * n).clamp(min=_TINY) ** 0.5
    return y >= bulk_edge(m, n, s), t, r, ((t + r) / 2).clamp(min=_TINY) ** 0.5


def shrink(
    kind: str, y: torch.Tensor, m: int, n: int, s: float, settings: dict[str, Any] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(eta(y), eta'(y)) of shrinker `kind` for singular values y [..., min(m, n)], in float64.

    settings: `power` p, `rho` and `top` (of rank-k). frobenius is the optimum in squared error and in cosine, operator the
    de-biased value xhat, nuclear the optimum in that norm (all 1405.7511); partial is (1 - rho) y + rho frobenius.
    Values below the bulk edge give 0 where the formula is one of y >= y+; hard and power take what the caller's threshold
    leaves. The slope leaves out jumps (hard, rank-k, operator, partial); that of james-stein, a function of all y, is its
    factor.
    """
    y, given = y.double(), settings or {}
    if kind == "hard":
        return y, y.new_ones(()).expand_as(y)
    if kind == "power":
        p = given["power"]
        return y**p, p * y.clamp(min=_TINY) ** (p - 1)
    if kind == "rank-k":
        kept = (y >= y.topk(min(given["top"], y.shape[-1]), dim=-1).values[..., -1:]).to(y.dtype)
        return y * kept, kept
    if kind == "james-stein":
        factor = (1 - max(m * n - 2, 0) * s**2 / (y**2).sum(-1, keepdim=True).clamp(min=_TINY)).clamp(min=0)
        return y * factor, factor.expand_as(y)
    inside, t, r, x = _unbiased(y, m, n, s)
    safe = y.clamp(min=_TINY)
    if kind == "operator":
        eta, slope = x, y * x / r
    elif kind == "soft":
        eta, slope = y - bulk_edge(m, n, s), y.new_ones(()).expand_as(y)
    else:
        eta, slope = r / safe, 2 * t / r - r / safe**2
        if kind == "nuclear":
            loss = s**2 * (m * n) ** 0.5 / x
            slope = (slope + loss * y / r) * (eta > loss)
            eta = (eta - loss).clamp(min=0)
        elif kind == "partial":
            rho = given["rho"]
            eta, slope = (1 - rho) * y + rho * eta, (1 - rho) + rho * slope
        elif kind != "frobenius":
            raise ValueError(f"no shrinker {kind!r}")
    return eta * inside, slope * inside
