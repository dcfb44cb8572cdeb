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
    return _cosine(*_products(a, {name: b[name] for name in a}).values())


def norm(a: dict[str, torch.Tensor]) -> float:
    """L2 norm over all names."""
    return sum(_looked([torch.sum(t.square(), dtype=torch.float64) for t in a.values()])) ** 0.5


def _products(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, tuple[float, float, float]]:
    """Of each name: <a, b>, <a, a>, <b, b>. One look at the device for all of them."""
    found = _looked(
        torch.sum(x, dtype=torch.float64) for name in a for x in (a[name] * b[name], a[name].square(), b[name].square())
    )
    return {name: tuple(found[3 * i : 3 * i + 3]) for i, name in enumerate(a)}


def _looked(values: Iterable[torch.Tensor]) -> list[float]:
    found = list(values)
    return torch.stack(found).tolist() if found else []


def _cosine(*products: tuple[float, float, float]) -> float | None:
    dot, first, second = (sum(own) for own in zip(*products, strict=True)) if products else (0, 0, 0)
    norms = first**0.5 * second**0.5
    return dot / norms if norms > 0 else None


def alignment(clean: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict:
    """Cosines of the clipped sum to `other` (the noisy sum or the decoded update), overall and per parameter.

    `overall` needs the same shapes for every parameter; a parameter of another shape has None.
    """
    comparable = {name: t for name, t in clean.items() if name in other and other[name].shape == t.shape}
    products = _products(comparable, other)
    return {
        "overall": _cosine(*products.values()) if len(comparable) == len(clean) else None,
        "by_parameter": {name: _cosine(products[name]) if name in comparable else None for name in clean},
    }


def signal_to_noise(clean: dict[str, torch.Tensor], noisy: dict[str, torch.Tensor]) -> float | None:
    """Norm of the clipped sum over the norm of the noise that was added; None without noise."""
    found = _looked(
        torch.sum(x.square(), dtype=torch.float64) for name in clean for x in (clean[name], noisy[name] - clean[name])
    )
    noise = sum(found[1::2]) ** 0.5
    return sum(found[::2]) ** 0.5 / noise if noise > 0 else None


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
        asked = {name: tensor.flatten(1) for name, tensor in clean.items() if tensor.dim() > 1 and tensor.numel()}
        if not asked:
            return
        found = torch.cat([matrix.abs().sum(1, dtype=torch.float64) for matrix in asked.values()]).cpu()
        for (name, matrix), rows in zip(asked.items(), found.split([len(m) for m in asked.values()]), strict=True):
            scores[name] = [a + b for a, b in zip(scores.get(name, [0.0] * len(matrix)), rows.tolist(), strict=True)]


def overlap(scores: dict[str, list[float]], chosen: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How many of the chosen rows clean scores would have chosen, too: by matrix, over all rows, and what chance would give."""
    found, shared, kept, by_chance = {}, 0, 0, 0.0
    for name, rows in chosen.items():
        best = sorted(range(len(scores[name])), key=lambda i, name=name: -scores[name][i])[: len(rows)]
        common = len(set(best) & set(rows.tolist()))
        found[name] = common / len(rows)
        shared, kept, by_chance = shared + common, kept + len(rows), by_chance + len(rows) ** 2 / len(scores[name])
    return {"overlap": shared / kept, "by_chance": by_chance / kept, "by_parameter": found}
