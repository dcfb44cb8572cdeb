"""Taps: where the inputs and the output gradients of layers are caught on their way through forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dpft.harness.engine.layouts import Layout, real_tensors, to_front
from dpft.harness.errors import CannotRun


@dataclass
class Use:
    """One call of a layer: its arguments, and after the backward pass the gradients of its results.

    Attributes:
        owned: the layer's own name of a trainable parameter -> its name in the model.
        layout: where the examples are in the tensors; from the backward pass on they are in front, unless all share a tensor.
        arguments: (args, kwargs), each tensor replaced by its place in `tensors`.
        tensors: the tensors among the arguments of the call, held by autograd (which may drop and recompute them) until
            the gradients are there.
        gradients: of the floating-point tensors among the results, in order.
    """

    path: str
    module: nn.Module
    owned: dict[str, str]
    batch_size: int
    layout: Layout | None = None
    arguments: Any = None
    tensors: tuple[torch.Tensor, ...] = ()
    gradients: tuple[torch.Tensor, ...] = ()
    parted: bool = False  # the first tensor has several rows of each example, or does not begin with them

    @property
    def input(self) -> torch.Tensor:
        """The first tensor of the call."""
        return self.tensors[0]

    @property
    def gradient(self) -> torch.Tensor:
        """That of the first result."""
        return self.gradients[0]

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """The input or the gradient of a layer that has its batch in front, as the layer saw it: examples one after the other."""
        return tensor.flatten(0, 1) if self.parted else tensor

    def receive(self, tensors: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor, ...]) -> None:
        """What autograd brings back; one row per example from here on."""
        size, layout = self.batch_size, self.layout
        self.parted = bool(tensors) and (layout.inputs[0] != 0 or len(tensors[0]) != size)
        self.tensors = tuple(to_front(t, dim, size) for t, dim in zip(tensors, layout.inputs, strict=True))
        self.gradients = tuple(to_front(g, dim, size) for g, dim in zip(gradients, layout.outputs, strict=True))
        self._alone = tuple(dim == 0 and len(t) == size for t, dim in zip(tensors, layout.inputs, strict=True))
        self._bare = tuple(dim == 0 and len(g) == size for g, dim in zip(gradients, layout.outputs, strict=True))

    def alone(self, tensors) -> list[torch.Tensor]:
        """The arguments of a call with one example: from what `tensors` has of it, rows of `self.tensors`."""
        return [t[None] if bare else t for t, bare in zip(tensors, self._alone, strict=True)]

    def results(self, found: Any) -> tuple[torch.Tensor, ...]:
        """What a call with one example returned, in the forms of rows of `gradients`."""
        return tuple(t[0] if bare else t for t, bare in zip(real_tensors(found), self._bare, strict=True))

    def call(self, module: nn.Module, tensors) -> Any:
        """`module` on this call's arguments with other tensors in their places."""
        args, kwargs = pytree.tree_map_only(_Place, lambda place: tensors[place.index], self.arguments)
        return module.forward(
            *args, **kwargs
        )  # not its hooks: the arguments are those after them, the output that before


class Recorder:
    """Hooks on every layer that owns a trainable parameter; calls `done(use)` when a use has its gradients.

    `start` begins a pass, `stop` ends it; hooks do nothing outside of one.
    """

    def __init__(self, done: Callable[[Use], None]):
        self.idle: frozenset[str] = frozenset()  # parameters whose gradients nobody wants in this pass
        self.uses: list[Use] = []
        self.batch_size: int | None = None
        self.looked_at: int | None = None  # examples in a run that finds layouts out
        self._rows = 1
        self._done = done
        self._calls: Counter[str] = Counter()
        self._handles: list = []
        # Requires grad but belongs to no layer: it makes autograd reach every tap and stop at the lowest one.
        self._anchor = torch.zeros(0, requires_grad=True)

    def watch(self, path: str, module: nn.Module, owned: dict[str, str], layouts: list[Layout]) -> None:
        """Tap `module`; `owned` as in Use. layouts: of its calls in a pass, in order."""
        if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding and "weight" in owned:

            def tapped(tokens: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
                first = 0 if self.batch_size == 1 or len(tokens) in (self.batch_size, self._rows) else None
                layout = Layout((first,), (first,), once=len(tokens) == 1)
                return self._tapped(Use(path, module, owned, self.batch_size, layout), (tokens,), {}, output)

            lookup = _Lookup(tapped, module)
            self._handles.append(
                module.register_forward_pre_hook(lambda *_: lookup.enter() if self.recording else None)
            )
            self._handles.append(module.register_forward_hook(lambda *_: lookup.leave(), always_call=True))
            return

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if not self.recording or self.idle.issuperset(owned.values()):
                return None
            layout = layouts[self._calls[path] % len(layouts)]
            self._calls[path] += 1
            return self._tapped(Use(path, module, owned, self.batch_size, layout), args, kwargs, output)

        # first: what other hooks make of the output is then a part of the model behind the tap
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))

    @contextmanager
    def paused(self):
        """Layers may be called without being tapped."""
        size, self.batch_size = self.batch_size, None
        try:
            yield
        finally:
            self.batch_size = size

    @property
    def recording(self) -> bool:
        """Whether a pass is on, and not the first, gradient-free forward of a reentrant checkpoint."""
        return self.batch_size is not None and torch.is_grad_enabled()

    @property
    def apart(self) -> int | None:
        """How many examples are to be told apart: those of a pass, or of a run that finds layouts out."""
        return self.batch_size if self.recording else self.looked_at

    def start(self, batch_size: int, device: torch.device, each: int = 1) -> None:
        """each: how many rows of one example layers may see, one after the other: [batch * each, ...]."""
        self.uses, self.batch_size, self._calls, self._rows = [], batch_size, Counter(), batch_size * each
        self._anchor = self._anchor.detach().to(device).requires_grad_()

    def stop(self) -> None:
        self.uses, self.batch_size = [], None

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _tapped(self, use: Use, args, kwargs, output) -> Any:
        results, form = pytree.tree_flatten(output)
        real = [i for i, r in enumerate(results) if isinstance(r, torch.Tensor) and r.is_floating_point()]
        tensors: list[torch.Tensor] = []
        use.arguments = pytree.tree_map_only(torch.Tensor, lambda t: _place(tensors, t), (args, kwargs))
        outputs = self._rows_per_example(use, tensors, [results[i] for i in real])
        self.uses.append(use)
        tapped = _Tap.apply(self._anchor, (use, self._done), len(outputs), *outputs, *tensors)
        for i, result in zip(real, tapped, strict=True):
            results[i] = result
        return pytree.tree_unflatten(results, form)

    def _rows_per_example(
        self, use: Use, tensors: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Raises CannotRun unless it is known what of the input and of the results belongs to which example.

        A table looked up once for the whole batch (positions of shape [1, T]) is looked up for every example instead:
        its output would be broadcast later, and its gradient summed over the batch.
        """
        size, layout = self.batch_size, use.layout
        if layout.once and isinstance(use.module, nn.Embedding) and self._rows > 1:
            tensors[0], *outputs = (t.expand(self._rows, *t.shape[1:]) for t in (tensors[0], *outputs))
            use.layout = layout = Layout((0,), (0,))
        same = (len(tensors), len(outputs)) == (len(layout.inputs), len(layout.outputs))
        found = zip([*tensors, *outputs], [*layout.inputs, *layout.outputs], strict=True) if same else ()
        even = all(dim is None or (t.dim() > dim and t.shape[dim] % size == 0) for t, dim in found)
        if not same or not even or not (layout.told or size == 1):
            rows = len(tensors[0]) if tensors and tensors[0].dim() else 0
            raise CannotRun(
                f"Layer {use.path} sees {rows} rows for {size} examples, so their gradients cannot be told apart; "
                "give it one row per example, freeze it, or use --engine reference."
            )
        return outputs


@dataclass(frozen=True)
class _Place:
    """Stands for the tensor number `index` of a call."""

    index: int


def _place(tensors: list[torch.Tensor], tensor: torch.Tensor) -> _Place:
    tensors.append(tensor.detach())
    return _Place(len(tensors) - 1)


class _Tap(torch.autograd.Function):
    """Identity of a layer's results that hands their gradients, and the saved inputs of the layer, to the use."""

    @staticmethod
    def forward(ctx, anchor, target, count, *tensors):
        ctx.target, ctx.count = target, count
        ctx.save_for_backward(*tensors[count:])
        return tuple(
            t.data for t in tensors[:count]
        )  # no view: what follows may work in place, as relu(inplace=True) does

    @staticmethod
    def backward(ctx, *gradients):
        use, done = ctx.target
        use.receive(ctx.saved_tensors, gradients)
        done(use)
        needed = ctx.needs_input_grad[3 : 3 + ctx.count]
        back = (g if need else None for g, need in zip(gradients, needed, strict=True))
        return None, None, None, *back, *([None] * (len(ctx.needs_input_grad) - 3 - ctx.count))


class _Lookup(TorchFunctionMode):
    """Taps `F.embedding` on the table of one module, for subclasses that compute their tokens or scale their rows."""

    def __init__(self, tapped, module: nn.Embedding):
        super().__init__()
        self._tapped, self._module, self._depth = tapped, module, 0

    def enter(self) -> None:
        self.__enter__()
        self._depth += 1

    def leave(self) -> None:
        while self._depth:
            self._depth -= 1
            self.__exit__(None, None, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is F.embedding and len(args) > 1 and args[1] is self._module.weight:
            return self._tapped(args[0], output)
        return output
