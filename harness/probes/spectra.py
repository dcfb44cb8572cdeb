"""Singular values of a few matrices at a few steps: clean, noisy, decoded, and what random matrix theory says of them.

Theory: the clean singular values and the noise level alone predict where they appear in the release, and how well the
optimal shrinkage aligns (Benaych-Georges & Nadakuditi, 1103.2221; Gavish & Donoho, 1405.7511). Non-private diagnostics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpft.harness.query.noisy_sum import NoisySum
from dpft.methods.decoders import spectral
from dpft.methods.decoders.matrices import matrices_of

MATRICES, STEPS, VALUES = 3, 3, 64
SMALLEST = 8  # a matrix with fewer rows or columns has no spectrum to speak of


def pick(model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[str]:
    """Up to three matrices that train: the first, the middle and the last."""
    names = [n for n in matrices_of(model, parameters) if min(parameters[n].flatten(1).shape) >= SMALLEST]
    return _spread(names, MATRICES)


def steps(total: int, every: int) -> list[int]:
    """The evaluated steps (counted from 1) at which spectra are taken: the first, the middle and the last."""
    return _spread(sorted({*range(every, total + 1, every), total}), STEPS)


def of_release(clean: dict[str, torch.Tensor], noisy: NoisySum, names: list[str]) -> dict[str, dict[str, Any]]:
    """By name: shape, noise, the largest singular values of clean gradient and release, cosines found and predicted.

    clean: the clipped sum over the expected batch size. Parameters whose gradient is encoded are left out.
    """
    found = {}
    for name in names:
        if clean[name].dim() < 2 or clean[name].numel() == 0:
            continue
        pair = [t[name].flatten(1).double() for t in (clean, noisy.tensors)]
        values = [torch.linalg.svdvals(t).cpu() for t in pair]
        m, n = pair[0].shape
        found[name] = {
            "shape": [m, n],
            "noise_std": noisy.mean_noise_std,
            "clean": _short(values[0]),
            "noisy": _short(values[1]),
            "predicted": predict(values[0], m, n, noisy.mean_noise_std),
        }
    return found


def add_update(found: dict[str, dict[str, Any]], update: dict[str, torch.Tensor]) -> None:
    """The decoded singular values, of parameters that have a decoded matrix of the same shape."""
    for name, row in found.items():
        decoded = update[name].flatten(1) if name in update else None
        same = decoded is not None and list(decoded.shape) == row["shape"]
        row["decoded"] = _short(torch.linalg.svdvals(decoded.double())) if same else None


def predict(x: torch.Tensor, m: int, n: int, s: float) -> dict[str, float | int | None]:
    """What theory says of a clean spectrum x [min(m, n)] under noise of standard deviation s per entry.

    spikes: values above the detection threshold; first: where the largest appears; cosine_noisy, cosine_decoded: of the release
    and of its optimal (frobenius) shrinkage to the clean matrix. None where nothing is defined.
    """
    size = float(x.square().sum() ** 0.5)
    if s == 0 or size == 0:
        return {"spikes": None, "first": None, "cosine_noisy": None, "cosine_decoded": None}
    seen = x[x > spectral.detection_threshold(m, n, s)]
    left, right = spectral.cosines(seen, m, n, s)
    first = float(spectral.spike_location(seen[:1], m, n, s)) if len(seen) else spectral.bulk_edge(m, n, s)
    return {
        "spikes": len(seen),
        "first": first,
        "cosine_noisy": size / (size**2 + m * n * s**2) ** 0.5,
        "cosine_decoded": float((seen * left * right).square().sum() ** 0.5) / size,
    }


def _short(values: torch.Tensor) -> list[float]:
    return shortened(values[:VALUES].tolist())


def shortened(value: Any) -> Any:
    """The same nested lists and dictionaries, floats to four digits: there are thousands of them in a record."""
    if isinstance(value, dict):
        return {key: shortened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shortened(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _spread(items: list, count: int) -> list:
    """At most `count` of the items: first, last and evenly between."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
