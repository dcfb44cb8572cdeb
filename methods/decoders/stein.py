"""Alignment from the release alone: Stein's unbiased estimates for spectral estimators (Candes et al., 1210.4139)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Estimate:
    """What a release `Y = G + s Z` says of its clean part: <Ghat, G>, |G|^2 and the two cosines (None: no estimate).

    trusted: |G|^2 stands out of its own noise, |G|^2 > 3 s^2 sqrt(2mn); otherwise average over steps, or believe nothing.
    """

    inner: float
    signal: float
    cosine_raw: float | None
    cosine_decoded: float | None
    trusted: bool


def divergence(y: torch.Tensor, eta: torch.Tensor, slope: torch.Tensor, m: int, n: int) -> float:
    """Divergence of `U diag(eta(y)) V^T` with respect to Y, of one matrix (1210.4139). Not valid where eta jumps.

    y, eta, slope: [min(m, n)] in float64. The sum over pairs is taken in the form (y_i eta_i - y_j eta_j)/(y_i^2 - y_j^2),
    whose limit for equal values exists.
    """
    safe = y.clamp(min=1e-150)
    square, product = y**2, y * eta
    difference = square[:, None] - square[None, :]
    equal = difference.abs() <= 1e-12 * (square[:, None] + square[None, :])
    limit = ((eta / safe + slope) / 2)[:, None].expand_as(difference)
    pairs = limit.where(equal, (product[:, None] - product[None, :]) / difference.masked_fill(equal, 1.0))
    pairs.fill_diagonal_(0.0)
    return float(slope.sum() + abs(m - n) * (eta / safe).sum() + pairs.sum())


def james_stein_divergence(y: torch.Tensor, m: int, n: int, s: float) -> float:
    """Divergence of the positive-part James-Stein estimate, which is no function of the singular values one by one."""
    c, total = max(m * n - 2, 0) * s**2, float((y**2).sum())
    return m * n - c * (m * n - 2) / total if total > c else 0.0


def estimate(y: torch.Tensor, eta: torch.Tensor, div: float, m: int, n: int, s: float) -> Estimate:
    """The estimates for one matrix from its singular values y, the shrunk ones eta and the divergence of the shrinkage.

    <Ghat, G> = <Ghat, Y> - s^2 div and |G|^2 = |Y|^2 - mn s^2; a common factor of eta changes no cosine.
    """
    total, shrunk = float((y**2).sum()), float((eta**2).sum())
    inner = float((eta * y).sum()) - s**2 * div
    signal = total - m * n * s**2
    known = signal > 0
    return Estimate(
        inner=inner,
        signal=signal,
        cosine_raw=(signal / total) ** 0.5 if known else None,
        cosine_decoded=inner / (shrunk * signal) ** 0.5 if known and shrunk > 0 else None,
        trusted=signal > 3 * s**2 * (2 * m * n) ** 0.5,
    )
