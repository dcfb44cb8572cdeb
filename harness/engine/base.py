"""What an engine is: it adds the clipped (encoded) per-example gradients of a batch to a running sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar

import torch
from torch import nn

from dpft.harness import devices
from dpft.harness.engine.clipping import FLAT, Clipping, ball, divided, overall
from dpft.harness.errors import BadInput
from dpft.harness.query.encoding import IDENTITY, Encoding
from dpft.harness.query.queries import Bound

Batch = dict[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]
Sums = dict[str, torch.Tensor]

# Of a batch whose examples are users: [users, rows], what the loss of each row counts in its user's; every other tensor is then
# [users, rows, ...], and what layers see is [users * rows, ...], a user's rows one after the other.
WEIGHTS = "row_weights"


def rows_each(model: nn.Module, batch: Batch) -> int:
    """How many rows of one example the layers may see, one after the other: a user's examples, or an image's views."""
    return batch[WEIGHTS].shape[1] if WEIGHTS in batch else getattr(model, "views", 1)


class Engine:
    """Per-example gradients of `parameters` under `loss`, clipped as `clipping` says and summed.

    loss(model, batch) -> [batch], each value a function of its own example. clock: context managers by phase name
    (`forward`, `backward`, `clip`), for timing only.
    groups: the names of the clipping groups, in the order of all norms [batch, groups].
    """

    name: ClassVar[str]
    needs_per_example: ClassVar[bool] = True
    batched: ClassVar[bool] = True  # several examples go through the model at once

    def __init__(
        self, model: nn.Module, loss: Loss, parameters: dict[str, nn.Parameter], clock, clipping: Clipping | None = None
    ):
        self.model, self.loss, self.parameters, self.clock = model, loss, parameters, clock
        self.clipping = clipping or FLAT
        self.members = self.clipping.grouped(parameters)  # of each group
        self.groups = tuple(self.members)
        self.agreed = False  # whether examples of this engine have been compared with plain autograd

    def accumulate(
        self, batch: Batch, total: Sums, bound: Bound, encodings: dict[str, Encoding]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the clipped gradient of every example of `batch` to `total`, in place.

        bound: C, of which each of K groups gets C/sqrt(K), or a bound for each group. Returns losses [batch] and norms
        [batch, groups] before clipping, float64, 0 for groups of which nothing is asked (encodings without rows).
        Raises RuntimeError for a bound that is not above 0, and for a mapping that has not exactly the groups.
        """
        raise NotImplementedError

    @contextmanager
    def under(self, loss: Callable[[Loss], Loss] | None) -> Iterator[None]:
        """A context in which the engine's loss is what `loss` makes of it; None: as it is."""
        own = self.loss
        self.loss = own if loss is None else loss(own)
        try:
            yield
        finally:
            self.loss = own

    def ball(self, bound: Bound) -> float:
        """C: no example's whole contribution is longer."""
        return ball(bound, self.groups)

    def overall(self, norms: torch.Tensor, bound: Bound) -> torch.Tensor:
        """[batch], to be compared with `ball(bound)`: the largest over the groups of norm_g / C_g, times C."""
        return overall(norms, bound, self.groups)

    def clipped(self, norms: torch.Tensor, bound: Bound) -> torch.Tensor:
        """[batch]: the length of each example's whole gradient as it was added, from norms [batch, groups] of `accumulate`."""
        return (norms * self.factors(norms, bound)).square().sum(1).sqrt()

    def factors(self, norms: torch.Tensor, bound: Bound) -> torch.Tensor:
        """[batch, groups]: what each example's gradient is multiplied by, group by group."""
        parts = divided(bound, self.groups).values()
        return torch.stack([self.clipping.factors(norms[:, i], *part) for i, part in enumerate(parts)], 1)

    def plain(self) -> AbstractContextManager[None]:
        """A context in which the model runs as if this engine were not there."""
        return nullcontext()

    def close(self) -> None:
        """Take all hooks off the model."""

    def losses(self, batch: Batch) -> torch.Tensor:
        """Per-example losses, shape checked."""
        losses = self.loss(self.model, batch)
        size = len(next(iter(batch.values())))
        if not isinstance(losses, torch.Tensor) or losses.shape != (size,):
            seen = f"shape {tuple(losses.shape)}" if hasattr(losses, "shape") else f"type {type(losses).__name__}"
            raise BadInput(f"The task's loss has {seen} for {size} examples; return one loss per example.")
        return losses

    def clip(self, squares: dict[str, torch.Tensor], bound: Bound) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(factors [batch] of each parameter, norms [batch, groups]) from the parameters' squared norms [batch]."""
        factors, norms = {}, []
        for group, part in divided(bound, self.groups).items():
            names = self.members[group]
            norm, factor = self.clipping.of_group(torch.stack([squares[name].double() for name in names]), *part)
            norms.append(norm)
            factors |= dict.fromkeys(names, factor)
        return factors, torch.stack(norms, 1)


class RunningSums(dict):
    """A running sum by name, in the encoded shapes, fp32 at least; a tensor is made, of zeros, when it is first asked for.

    An engine asks once its norms are known and activations have been freed: made before, the sum would be one more
    buffer of the model's size at the peak of memory.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], encodings: dict[str, Encoding]):
        super().__init__()
        self._parameters, self._encodings = parameters, encodings

    def __missing__(self, name: str) -> torch.Tensor:
        p = self._parameters[name]
        shape = self._encodings.get(name, IDENTITY).shape(p.shape)
        self[name] = torch.zeros(shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        return self[name]

    def complete(self) -> Sums:
        """All of them, in the order of the parameters; what nobody asked for is zero."""
        return {name: self[name] for name in self._parameters}


def zero_sums(parameters: dict[str, nn.Parameter], encodings: dict[str, Encoding]) -> Sums:
    """A running sum of zeros that is there at once."""
    return RunningSums(parameters, encodings).complete()


def example_gradient(engine: Engine, example: Batch, encodings: dict[str, Encoding]) -> tuple[torch.Tensor, Sums]:
    """(loss, encoded gradient by name) of a batch that holds one example, by plain autograd.

    A gradient is encoded and let go as soon as it is there: all of them at once may be more than the method itself ever holds.
    """
    with engine.clock("forward"):
        loss = engine.losses(example)[0]
    encoded: Sums = {}

    def take(name: str, p: nn.Parameter) -> None:
        gradient, p.grad = encodings.get(name, IDENTITY).dense(p.grad[None])[0], None
        encoded[name] = (
            encoded[name] + gradient if name in encoded else gradient
        )  # reentrant checkpoints bring it in parts

    handles = []
    for name, p in engine.parameters.items():
        p.grad = None
        handles.append(p.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p)))
    try:
        with engine.clock("backward"):
            loss.backward()  # not autograd.grad, which reentrant checkpoints refuse
    finally:
        for handle in handles:
            handle.remove()
    for name in engine.parameters:
        if name not in encoded:
            raise unused(name)
    return loss.detach(), {name: encodings.get(name, IDENTITY).finished(encoded[name]) for name in engine.parameters}


class PlainEngine(Engine):
    """Ordinary autograd of the summed loss: no clipping. For non-private runs."""

    name = "plain"
    needs_per_example = False

    def accumulate(self, batch, total, bound, encodings):
        with self.clock("forward"):
            losses = self.losses(batch)
        with self.clock("backward"):
            gradients = torch.autograd.grad(losses.sum(), list(self.parameters.values()), allow_unused=True)
        for (name, _), gradient in zip(self.parameters.items(), gradients, strict=True):
            if gradient is None:
                raise unused(name)
            encoding = encodings.get(name, IDENTITY)
            if encoding.absolute:
                raise BadInput("A run without privacy takes no per-example gradients, so it has no magnitudes of them.")
            total[name].add_(encoding.finished(encoding.dense(gradient[None])[0]))
        return losses.detach(), torch.zeros(len(losses), len(self.groups), device=losses.device)


class ForwardEngine(Engine):
    """Losses and no gradients: for methods that ask for none."""

    name = "forward"
    needs_per_example = False

    def accumulate(self, batch, total, bound, encodings):
        raise BadInput("The method asks for gradients, which its `asks` does not list; add Gradients to it.")


@contextmanager
def undrawn(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """PyTorch's global generators, of the CPU and of the parameters' device, are afterwards where they were."""
    device = next(iter(parameters.values())).device
    card = devices.is_card(device)
    with torch.random.fork_rng([device] if card else [], device_type=device.type if card else "cuda"):
        yield


def unused(name: str) -> BadInput:
    """The error for a trainable parameter that the loss does not reach."""
    return BadInput(
        f"The trainable parameter {name} receives no gradient; freeze it in the method or use it in the model."
    )
