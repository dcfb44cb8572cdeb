"""Taps: where the inputs and the output gradients of layers are caught on their way through forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dpft.harness.errors import CannotRun


@dataclass
class Use:
    """One call of a layer: its arguments, and after the backward pass the gradient of its output.

    owned: the layer's own name of a trainable parameter -> its name in the model. tensors: the tensors among the
    arguments of the call, held by autograd (which may drop and recompute them) until the gradient is there.
    """

    path: str
    module: nn.Module
    owned: dict[str, str]
    batch_size: int
    flattened: bool = False  # the layer sees [b * T, ...]: the examples one after the other
    arguments: Any = None  # (args, kwargs), each tensor replaced by its place in `tensors`
    tensors: tuple[torch.Tensor, ...] = ()
    gradient: torch.Tensor | None = None

    @property
    def input(self) -> torch.Tensor:
        """The first tensor of the call."""
        return self.tensors[0]

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of this use as the layer saw it, examples one after the other where that is how it sees them."""
        return tensor.flatten(0, 1) if self.flattened else tensor

    def receive(self, tensors: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
        """What autograd brings back; one row per example from here on."""
        if self.flattened:
            gradient, *tensors = (t.unflatten(0, (self.batch_size, -1)) for t in (gradient, *tensors))
        self.tensors, self.gradient = tuple(tensors), gradient

    def call(self, module: nn.Module, tensors) -> torch.Tensor:
        """`module` on this call's arguments with other tensors in their places."""
        args, kwargs = pytree.tree_map_only(_Place, lambda place: tensors[place.index], self.arguments)
        return module.forward(
            *args, **kwargs
        )  # not its hooks: the arguments are those after them, the output that before


class Recorder:
    """Hooks on every layer that owns a trainable parameter; calls `done(use)` when a use has its gradient.

    `start` begins a pass, `stop` ends it; hooks do nothing outside of one.
    """

    def __init__(self, done: Callable[[Use], None]):
        self._each = 1
        self.idle: frozenset[str] = frozenset()  # parameters whose gradients nobody wants in this pass
        self.uses: list[Use] = []
        self.batch_size: int | None = None
        self._done = done
        self._handles: list = []
        # Requires grad but belongs to no layer: it makes autograd reach every tap and stop at the lowest one.
        self._anchor = torch.zeros(0, requires_grad=True)

    def watch(self, path: str, module: nn.Module, owned: dict[str, str], flattened: bool = False) -> None:
        """Tap `module`; `owned` and `flattened` as in Use."""
        if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:

            def tapped(tokens: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
                return self._tapped(Use(path, module, owned, self.batch_size), (tokens,), {}, output)

            lookup = _Lookup(tapped, module)
            self._handles.append(
                module.register_forward_pre_hook(lambda *_: lookup.enter() if self.recording else None)
            )
            self._handles.append(module.register_forward_hook(lambda *_: lookup.leave(), always_call=True))
            return

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
            if not self.recording or self.idle.issuperset(owned.values()):
                return None
            return self._tapped(Use(path, module, owned, self.batch_size, flattened), args, kwargs, output)

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

    def start(self, batch_size: int, device: torch.device, each: int = 1) -> None:
        """each: how many rows of one example layers may see, one after the other: [batch * each, ...]."""
        self.uses, self.batch_size, self._each = [], batch_size, each
        self._anchor = self._anchor.detach().to(device).requires_grad_()

    def stop(self) -> None:
        self.uses, self.batch_size = [], None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _tapped(self, use: Use, args, kwargs, output) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise CannotRun(
                f"Layer {use.path} ({type(use.module).__name__}) returns no single tensor, so what each example adds to its "
                "gradient cannot be told; freeze it or use --engine reference."
            )
        tensors: list[torch.Tensor] = []
        use.arguments = pytree.tree_map_only(torch.Tensor, lambda t: _place(tensors, t), (args, kwargs))
        tensors, output = self._rows_per_example(use, tensors, output)
        self.uses.append(use)
        return _Tap.apply(output, self._anchor, (use, self._done), *tensors)

    def _rows_per_example(self, use: Use, tensors: list[torch.Tensor], output: torch.Tensor):
        """Raises CannotRun unless row i of the first input and of the output belongs to example i.

        A table looked up once for the whole batch (positions of shape [1, T]) is looked up for every example instead:
        its output would be broadcast later, and its gradient summed over the batch.
        """
        size, whole = self.batch_size, self.batch_size * self._each
        if isinstance(use.module, nn.Embedding) and tensors[0].dim() > 1 and len(tensors[0]) == 1 < whole:
            tensors[0] = tensors[0].expand(whole, *tensors[0].shape[1:])
            output = output.expand(whole, *output.shape[1:])
        rows = len(tensors[0]) if tensors and tensors[0].dim() else 0
        use.flattened = rows != size and (rows == whole or (use.flattened and rows % whole == 0))
        if (rows != size and not use.flattened) or output.dim() == 0 or len(output) != rows:
            raise CannotRun(
                f"Layer {use.path} sees {rows} rows for {size} examples, so their gradients cannot be told apart; "
                "give it one row per example, freeze it, or use --engine reference."
            )
        return tensors, output


@dataclass(frozen=True)
class _Place:
    """Stands for the tensor number `index` of a call."""

    index: int


def _place(tensors: list[torch.Tensor], tensor: torch.Tensor) -> _Place:
    tensors.append(tensor.detach())
    return _Place(len(tensors) - 1)


class _Tap(torch.autograd.Function):
    """Identity that hands its output gradient, and the saved inputs of the layer, to the use."""

    @staticmethod
    def forward(ctx, output, anchor, target, *tensors):
        ctx.target = target
        ctx.save_for_backward(*tensors)
        return output.data  # no view: what follows may work in place, as relu(inplace=True) does

    @staticmethod
    def backward(ctx, gradient):
        use, done = ctx.target
        use.receive(ctx.saved_tensors, gradient)
        done(use)
        return (gradient if ctx.needs_input_grad[0] else None), *([None] * (len(ctx.needs_input_grad) - 1))


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
