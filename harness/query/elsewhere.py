"""A model computes at other weights while its own stay where they are, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}  # attributes of a tensor that hold its numbers
_FORMS = {
    "__set__", "__delete__", "__hash__", "__len__", "data_ptr", "dim", "element_size", "get_device", "is_complex",
    "is_contiguous", "is_floating_point", "is_signed", "ndimension", "nelement", "numel", "register_hook", "requires_grad_",
    "size", "storage_offset", "stride",
}  # fmt: skip


class Elsewhere(TorchFunctionMode):
    """While it is entered, every torch function that is given a parameter of `moved` gets what `moved` makes of it instead.

    moved: by `id` of the parameter, what makes its other values, in its shape, dtype and device. They are made when a function
    is called and let go with it: beside inference one call's weights are held. A parameter is known by identity, also inside
    lists and tuples, so tied weights move together. looked_up: by `id` of a table, from row numbers to its moved rows: a table
    in which a few rows are looked up is never made whole. A function that asks only for its form, or writes into it, gets itself.
    No gradients: raises RuntimeError where a moved parameter would need one.
    """

    def __init__(
        self,
        moved: Mapping[int, Callable[[], torch.Tensor]],
        looked_up: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ):
        super().__init__()
        self._moved, self._looked_up = moved, looked_up or {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _FORMS or (name == "__get__" and getattr(func.__self__, "__name__", "") not in _VALUES):
            return func(*args, **kwargs)
        if func is F.embedding and len(args) > 1 and id(args[1]) in self._looked_up and not any(args[3:4]):
            return self._looked_up[id(args[1])](args[0])
        if not self._holds(args) and not (kwargs and self._holds(kwargs.values())):  # most calls
            return func(*args, **kwargs)
        made: dict[int, torch.Tensor] = {}
        if name.endswith("_") and not name.endswith("__"):  # in place of its first argument
            return func(*args[:1], *self._all(args[1:], made), **self._all(kwargs, made))
        return func(*self._all(args, made), **self._all(kwargs, made))

    def _holds(self, values: Iterable[Any]) -> bool:
        """Whether a parameter that is moved is among `values`, or in a list, tuple or dict of them."""
        for value in values:
            if id(value) in self._moved:
                return True
            if type(value) in (list, tuple):
                if self._holds(value):
                    return True
            elif type(value) is dict and self._holds(value.values()):
                return True
        return False

    def _all(self, value: Any, made: dict[int, torch.Tensor]) -> Any:
        """`value` with the moved in place of what it holds; itself where it holds none."""
        if isinstance(value, torch.Tensor):
            return self._one(value, made) if id(value) in self._moved else value
        if type(value) is dict:
            found = {key: self._all(held, made) for key, held in value.items()}
            return found if any(found[key] is not held for key, held in value.items()) else value
        if type(value) in (list, tuple):
            found = [self._all(held, made) for held in value]
            return type(value)(found) if any(a is not b for a, b in zip(found, value, strict=True)) else value
        return value

    def _one(self, p: nn.Parameter, made: dict[int, torch.Tensor]) -> torch.Tensor:
        if torch.is_grad_enabled() and p.requires_grad:
            raise RuntimeError("Moved weights have no gradients; compute under torch.no_grad().")
        if id(p) not in made:
            made[id(p)] = self._moved[id(p)]()
        return made[id(p)]
