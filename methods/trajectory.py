"""Leading directions of a trajectory of gradients: what a few numbers per example are measured along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dpft.harness.errors import CannotRun
from dpft.harness.query.public import evaluating
from dpft.harness.query.queries import Values
from dpft.methods.zeroth import differences

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.elsewhere import Elsewhere
    from dpft.harness.query.public import Public

    Tensors = dict[str, torch.Tensor]

LEAST = 1e-5  # of the largest singular value: what is below it is rounding


def extended(path: Tensors, gradient: Tensors) -> Tensors:
    """A trajectory with one more gradient, by parameter [steps, *shape]; that of no steps is empty."""
    import torch

    return {
        n: torch.cat([path[n].to(g.device), g[None]]) if n in path else g[None].clone() for n, g in gradient.items()
    }


def leading(path: Tensors, count: int) -> Tensors:
    """The `count` leading right singular vectors of the matrix whose rows are the gradients of `path`: [count, *shape] of each.

    They are orthonormal over all parameters together; fewer where the gradients span less. Raises CannotRun where all are zero.
    """
    import torch

    rows = {name: stacked.flatten(1).double() for name, stacked in path.items()}
    values, vectors = torch.linalg.eigh(sum(own @ own.mT for own in rows.values()))  # ascending
    last = len(values) - 1
    kept = [i for i in range(last, -1, -1) if values[i] > LEAST**2 * values[last] and values[i] > 0][:count]
    if not kept:
        raise CannotRun("Every gradient of the trajectory is zero, so it has no directions; take other data.")
    back = (vectors[:, kept] / values[kept].sqrt()).mT
    return {name: (back @ rows[name]).view(-1, *stacked.shape[1:]).to(stacked.dtype) for name, stacked in path.items()}


@contextmanager
def put_back(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """In evaluation mode; afterwards `parameters` and mode are what they were."""
    import torch

    before = {name: p.detach().clone() for name, p in parameters.items()}
    with evaluating(model):
        yield
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])


def move(parameters: Mapping[str, nn.Parameter], directions: Tensors, rate: float) -> None:
    """One plain step."""
    import torch

    with torch.no_grad():
        for name, p in parameters.items():
            p.sub_(directions[name], alpha=rate)


def on_public(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    public: Public,
    steps: int,
    size: int,
    ahead: Callable[[Tensors, int], Tensors],
    rate: float,
) -> Tensors:
    """The gradients of steps on public batches of `size`; the weights go where `ahead` says, and are put back."""
    path: Tensors = {}
    with put_back(model, weights):
        for step in range(steps):
            gradient = public.gradient(model, dict(weights), public.batch(size, step))
            path = extended(path, gradient)
            move(weights, ahead(gradient, step), rate)
    return path


def numbers(basis: Tensors, weights: Mapping[str, nn.Parameter], distance: float, bound: float) -> Values:
    """The question for each example's slopes along the directions, by differences of its losses at `distance` on either side."""
    count = len(next(iter(basis.values())))
    at = [partial(_elsewhere, basis, weights, k, side) for k in range(count) for side in (distance, -distance)]
    return Values(size=count, of=partial(differences, scale=2 * distance), bound=bound, at=at)


def lifted(basis: Tensors, values: torch.Tensor) -> Tensors:
    """The sum of the directions times `values`, by parameter."""
    return {name: (values @ part.flatten(1)).view(part.shape[1:]) for name, part in basis.items()}


def _elsewhere(basis: Tensors, weights: Mapping[str, nn.Parameter], k: int, distance: float) -> Elsewhere:
    from dpft.harness.query.elsewhere import Elsewhere

    return Elsewhere({id(p): partial(_moved, p, basis[name][k], distance) for name, p in weights.items()})


def _moved(p: nn.Parameter, direction: torch.Tensor, distance: float) -> torch.Tensor:
    return p.detach().add(direction.to(p.dtype), alpha=distance)
