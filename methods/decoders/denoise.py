"""The work of the spectral decoder on matrices of one shape: Gram, spectrum, shrinkage, in place.

Runs compute fp32 products as fp32 (`exact_fp32`): TF32's ten bits would move singular values across the edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpft.methods.decoders import spectral, stein

if TYPE_CHECKING:
    import torch

_STACK = 1 << 25  # entries of the Gram matrices that are held at once


@dataclass(frozen=True)
class Plan:
    """How to denoise: threshold over the bulk edge, the decoder's settings, whether numbers are wanted."""

    kappa: float
    settings: dict[str, Any]
    observe: bool = False


def denoise(matrices: dict[str, torch.Tensor], m: int, n: int, std: float, plan: Plan) -> dict[str, dict[str, Any]]:
    """Denoise [m, n] views whose noise has standard deviation `std` per entry, in place; returns what was seen, by name."""
    if std == 0 and plan.settings["shrinker"] in spectral.TENDS_TO_IDENTITY:
        return {}
    names, seen = list(matrices), {}
    together = max(1, _STACK // min(m, n) ** 2)
    for start in range(0, len(names), together):
        some = names[start : start + together]
        seen |= _stack({name: matrices[name] for name in some}, m, n, std, plan)
    return seen


def _stack(matrices: dict[str, torch.Tensor], m: int, n: int, std: float, plan: Plan) -> dict[str, dict[str, Any]]:
    import torch

    from dpft.harness import devices

    work = [view.float() if view.dtype.itemsize < 4 else view for view in matrices.values()]
    gram = torch.stack([view @ view.mT if m <= n else view.mT @ view for view in work])
    judged = plan.observe or plan.settings["gate"]
    quiet = _below(gram, plan.kappa * spectral.bulk_edge(m, n, std)).tolist()
    loud = [i for i in range(len(work)) if judged or not quiet[i]]
    seen, found = {}, {}
    if loud:
        y = torch.linalg.eigvalsh(torch.stack([gram[i] for i in loud])).double().clamp_(min=0).sqrt().cpu()  # one look
        eta, slope, factor = shrunk(y, m, n, std, plan)
        gain = (eta / y.clamp(min=1e-150)).where(y > 0, slope) * factor  # eta(y)/y tends to the slope at 0
        found = dict(zip(loud, gain, strict=True))
        names = list(matrices)
        seen = {names[i]: _judge(y[k], eta[k], slope[k], m, n, std, plan) for k, i in enumerate(loud) if judged}
    for i, (name, view) in enumerate(matrices.items()):
        if plan.settings["gate"] and seen[name]["raw_is_better"]:
            continue
        kept = 0 if quiet[i] else int((found[i] > 0).sum())  # a suffix: values ascend
        if not kept:
            view.mul_(float(plan.settings["empty"] == "raw"))
        elif float(found[i].amin()) == float(found[i].amax()):
            view.mul_(float(found[i][0]))
        else:
            vectors = torch.linalg.eigh(gram[i]).eigenvectors[:, -kept:]
            scaled = vectors * devices.sent(found[i][-kept:].to(vectors.dtype), vectors.device)
            view.copy_(scaled @ (vectors.mT @ work[i]) if m <= n else (work[i] @ vectors) @ scaled.mT)
    return seen if plan.observe else {}


def _below(gram: torch.Tensor, threshold: float) -> torch.Tensor:
    """Whether all singular values are below `threshold`, [matrices].

    Then, and only then, threshold^2 - Gram has a Cholesky factor. Mostly nothing stands out of the noise, and to know that
    takes a small part of what the spectrum takes.
    """
    import torch

    shifted = -gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(threshold**2)
    return torch.linalg.cholesky_ex(shifted).info == 0


def shrunk(y: torch.Tensor, m: int, n: int, std: float, plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(eta, eta', factor) of singular values y [matrices, min(m, n)], ascending: thresholded, and the norm's correction.

    A zero, or one that rounding made, gets no gain that would blow it up (power below 1).
    """
    kind = plan.settings["shrinker"]
    eta, slope = spectral.shrink(kind, y, m, n, std, plan.settings)
    keep = y >= plan.kappa * spectral.bulk_edge(m, n, std)
    if kind == "power" and plan.settings["power"] < 1:
        keep = keep & (y**2 > y[..., -1:] ** 2 * y.shape[-1] * 1.2e-7)
    eta, slope = eta * keep, slope * keep
    total, norm = (y**2).sum(-1, keepdim=True), (eta**2).sum(-1, keepdim=True).sqrt()
    correction = plan.settings["norm_correction"]
    if correction == "none":
        return eta, slope, norm.new_ones(norm.shape)
    wanted = total if correction == "noisy" else (total - m * n * std**2).clamp(min=0)
    return eta, slope, wanted.sqrt() / norm.where(norm > 0, norm.new_ones(()))


def _judge(
    y: torch.Tensor, eta: torch.Tensor, slope: torch.Tensor, m: int, n: int, std: float, plan: Plan
) -> dict[str, Any]:
    """What the release says of one matrix: survivors, and cosines to the clean gradient by Stein where they are valid."""
    kind = plan.settings["shrinker"]
    valid = kind in spectral.CONTINUOUS or (kind == "power" and plan.kappa == 0)
    survivors = int((eta > 0).sum())
    james = kind == "james-stein"
    div = stein.james_stein_divergence(y, m, n, std) if james else stein.divergence(y, eta, slope, m, n)
    found = stein.estimate(y, eta, div, m, n, std)
    raw, decoded = found.cosine_raw, found.cosine_decoded if valid else None
    if not survivors:
        decoded = raw if plan.settings["empty"] == "raw" else None
    total = float((y**2).sum())
    share = (y**2 / total).clamp(min=1e-300) if total > 0 else y.new_ones(1)
    return {
        "spikes": survivors,
        "of": len(y),
        "effective_rank_noisy": float((-(share * share.log()).sum()).exp()),
        "kept": float((eta**2).sum()) / total if total > 0 else 0.0,
        "stein_cosine_raw": raw,
        "stein_cosine_decoded": decoded,
        "trusted": found.trusted,
        "raw_is_better": found.trusted and valid and raw > (decoded or 0.0),
    }
