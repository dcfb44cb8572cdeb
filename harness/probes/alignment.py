"""What clipped sums, releases and updates have to do with each other, and with the rows that were chosen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from dpft.harness.probes import spectra
from dpft.harness.probes.live import uncounted
from dpft.harness.query.noisy_sum import NoisySum

if TYPE_CHECKING:
    from dpft.harness.engine.base import Engine

SELECTION = "selection"  # the kind of step whose release chooses rows


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float | None:
    """Cosine of two gradients concatenated over the names of `a`; None when one is zero."""
    dot = sum(float(torch.sum(a[name] * b[name], dtype=torch.float64)) for name in a)
    norms = norm(a) * norm({name: b[name] for name in a})
    return dot / norms if norms > 0 else None


def norm(a: dict[str, torch.Tensor]) -> float:
    """L2 norm over all names."""
    return sum(float(torch.sum(t.square(), dtype=torch.float64)) for t in a.values()) ** 0.5


def alignment(clean: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict:
    """Cosines of the clipped sum to `other` (the noisy sum or the decoded update), overall and per parameter.

    `overall` needs the same shapes for every parameter; a parameter of another shape has None.
    """
    comparable = {name: t for name, t in clean.items() if name in other and other[name].shape == t.shape}
    return {
        "overall": cosine(clean, other) if len(comparable) == len(clean) else None,
        "by_parameter": {name: cosine({name: t}, other) if name in comparable else None for name, t in clean.items()},
    }


def signal_to_noise(clean: dict[str, torch.Tensor], noisy: dict[str, torch.Tensor]) -> float | None:
    """Norm of the clipped sum over the norm of the noise that was added; None without noise."""
    noise = norm({name: noisy[name] - clean[name] for name in clean})
    return norm(clean) / noise if noise > 0 else None


class Look:
    """What one step's clipped sum, release and update have to do with each other: call it in the order of its methods.

    clean: the clipped sum over the expected batch size is copied, for the mechanism works in place. matrices: names of those
    whose singular values are wanted. Non-private.
    """

    def __init__(self, clipped_sum: dict[str, torch.Tensor], expected_batch_size: int, matrices: list[str]):
        with uncounted():
            self._clean = {name: t / expected_batch_size for name, t in clipped_sum.items()}
        self._matrices = matrices
        self.row: dict[str, float | None] = {}  # columns of the curve
        self.by_parameter: dict[str, dict[str, float | None]] = {}
        self.spectra: dict[str, dict[str, Any]] = {}

    def at_release(self, noisy: NoisySum) -> None:
        """Before it is decoded, which may happen in place."""
        with uncounted():
            found = alignment(self._clean, noisy.tensors)
            self.row |= {"alignment_noisy": found["overall"], "snr": signal_to_noise(self._clean, noisy.tensors)}
            self.by_parameter = {name: {"noisy": cosine} for name, cosine in found["by_parameter"].items()}
            self.spectra = spectra.of_release(self._clean, noisy, self._matrices)

    def at_update(self, update: dict[str, torch.Tensor]) -> None:
        """After decoding, before the optimizer."""
        with uncounted():
            found = alignment(self._clean, update)
            self.row["alignment_decoded"] = found["overall"]
            for name, row in self.by_parameter.items():
                row["decoded"] = found["by_parameter"][name]
            spectra.add_update(self.spectra, update)


def gradient(engine: Engine, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The sum of the examples' gradients, nothing clipped, by plain autograd. Non-private."""
    total = {name: torch.zeros_like(p) for name, p in engine.parameters.items()}
    for batch in batches:
        with engine.plain(), torch.enable_grad():
            found = torch.autograd.grad(engine.losses(batch).sum(), list(engine.parameters.values()), allow_unused=True)
        for held, own in zip(total.values(), found, strict=True):
            if own is not None:
                held.add_(own)
    return total


def add_row_scores(scores: dict[str, list[float]], clean: dict[str, torch.Tensor]) -> None:
    """Add to `scores` the sums of magnitudes over the rows of what was asked for of a clean sum, by matrix. Non-private."""
    with uncounted():
        for name, tensor in clean.items():
            if tensor.dim() > 1 and tensor.numel():
                rows = tensor.flatten(1).abs().sum(1, dtype=torch.float64).tolist()
                scores[name] = [a + b for a, b in zip(scores.get(name, [0.0] * len(rows)), rows, strict=True)]


def overlap(scores: dict[str, list[float]], chosen: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How many of the chosen rows clean scores would have chosen, too: by matrix, over all rows, and what chance would give."""
    found, shared, kept, by_chance = {}, 0, 0, 0.0
    for name, rows in chosen.items():
        best = sorted(range(len(scores[name])), key=lambda i, name=name: -scores[name][i])[: len(rows)]
        common = len(set(best) & set(rows.tolist()))
        found[name] = common / len(rows)
        shared, kept, by_chance = shared + common, kept + len(rows), by_chance + len(rows) ** 2 / len(scores[name])
    return {"overlap": shared / kept, "by_chance": by_chance / kept, "by_parameter": found}
