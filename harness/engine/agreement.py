"""A look at a few examples alone: are their losses and gradients what the engine took them for in their batch?"""

from __future__ import annotations

import torch

from dpft.harness.engine.base import Batch, Engine, example_gradient, zero_sums
from dpft.harness.engine.encoding import Encoding
from dpft.harness.errors import CannotRun

# Relative difference that rounding can explain, generously: what is looked for is wrong by whole factors. A parameter's squared
# norm may also differ by FLOOR times that of the whole gradient, a loss by the tolerance times LEAST_LOSS.
TOLERANCE, HALF_TOLERANCE = 5e-2, 0.2
FLOOR, LEAST_LOSS = 1e-2, 0.1


def check(engine: Engine, batch: Batch, encodings: dict[str, Encoding]) -> None:
    """Compare the engine with plain autograd on `batch` before a run; nothing is trained, and nothing is left changed.

    encodings: those of the run, so that what is compared is what will be clipped, and takes no more room.

    Parameters that are all zero (a fresh head, LoRA's B) hold random values meanwhile: nothing would flow past them.
    Raises CannotRun as `agree` does.
    """
    zeros = [p for p in engine.parameters.values() if not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in zeros:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    try:
        engine.accumulate(batch, zero_sums(engine.parameters, encodings), 1.0, encodings)
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()


def agree(
    engine: Engine,
    batch: Batch,
    encodings: dict[str, Encoding],
    losses: torch.Tensor,
    squares: dict[str, torch.Tensor],
    half: bool,
) -> bool:
    """Compare up to four examples of `batch` with plain autograd on each alone: the loss, and every parameter's squared norm.

    A layer that mixes examples where no tap sees it, or a rule that misreads a layer, would make the clipping bound
    false. losses, squares (by parameter): [batch], as the engine found them; half: whether layers compute in half
    precision. Raises CannotRun when they differ; False when nothing can be said: values that are not finite (which the
    loop deals with) or gradients that are zero.
    """
    size = len(losses)
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    told = False
    for i in sorted({0, 1, size // 2, size - 1}):
        loss, gradient = example_gradient(engine, {key: value[i : i + 1] for key, value in batch.items()}, encodings)
        expected = {name: float(g.double().square().sum()) for name, g in gradient.items()}
        whole = sum(expected.values())
        found = {name: float(squares[name][i]) for name in expected}
        if not torch.isfinite(torch.tensor([float(loss), float(losses[i]), whole, sum(found.values())])).all():
            return False
        told = told or whole > 0
        if abs(float(loss) - float(losses[i])) > tolerance * (abs(float(loss)) + LEAST_LOSS):
            raise _disagreement(f"has loss {float(losses[i]):.6g} in its batch and {float(loss):.6g} alone")
        for name, square in expected.items():
            if abs(found[name] - square) > 2 * tolerance * (square + FLOOR * whole):
                raise _disagreement(
                    f"has a gradient of {name} of norm {found[name] ** 0.5:.6g} in its batch and {square**0.5:.6g} alone"
                )
    return told


def _disagreement(what: str) -> CannotRun:
    return CannotRun(
        f"An example {what}: the model mixes examples, is random in training mode, or has a layer whose gradients are taken "
        "wrongly; mend the model or use --engine reference."
    )
