"""Does a question fit what trains? Looked at before an example is: a misfit is a sentence, not an error deep in an engine."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dpft.harness.errors import BadInput
from dpft.harness.query.encoding import Complement, Encoding, Stacked
from dpft.harness.query.queries import Gradients, Nothing, Query, Values


def check(queries: Mapping[str, Query], parameters: Mapping[str, nn.Parameter], asker: str) -> None:
    """Raises BadInput with one sentence: who asks, of which parameter, what was seen and what is wanted.

    Looks at shapes, and on a CPU at row numbers; on another device that would wait for it.
    """
    for name, query in queries.items():
        for problem in _problems(query, parameters):
            raise BadInput(f"{asker} asks for {name!r}: {problem}")


def stranger(name: Any, parameters: Collection[str], what: str) -> str | None:
    """What is wrong with a name that is to be one of what trains, with the nearest such; None: nothing."""
    if name in parameters:
        return None
    near = difflib.get_close_matches(str(name), list(parameters), n=1, cutoff=0.5)
    return f"{what} {name!r}, and no parameter that trains is called so; " + (
        f"did you mean {near[0]!r}?"
        if near
        else f"there are {len(parameters)}, the first is {next(iter(parameters))!r}."
    )


def misfit(update: Any, like: torch.Tensor, what: str = "the parameter") -> str | None:
    """What is wrong with an update that is to have the form of `like`, and what to do; None: nothing."""
    if not isinstance(update, torch.Tensor):
        return f"is {kind_of(update)}; return a tensor of shape {list(like.shape)}, or leave the name out."
    if update.shape != like.shape:
        return f"has shape {list(update.shape)} and {what} {list(like.shape)}; return it in that shape."
    if not update.is_floating_point():
        return f"is of {update.dtype}; return floating-point numbers."
    if update.device != like.device:
        return f"is on {update.device} and {what} on {like.device}; keep it there."
    return None


def kind_of(value: Any) -> str:
    """What a thing is that should be another, for a message."""
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _problems(query: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[str]:
    if isinstance(query, Values):
        yield from _of_numbers(query)
    elif isinstance(query, Gradients):
        yield from _of_gradients(query, parameters)
    elif not isinstance(query, Nothing):
        yield f"{kind_of(query)} is no question; ask Gradients(...), Values(...) or Nothing()."


def _of_numbers(query: Any) -> Iterator[str]:
    if not isinstance(query.size, int) or query.size < 1:
        yield f"size is {query.size!r}; give how many numbers a row has."
    if not callable(query.of):
        yield f"of is {kind_of(query.of)}, which cannot be called; give a function of what may be seen of some examples."


def _of_gradients(query: Gradients, parameters: Mapping[str, nn.Parameter]) -> Iterator[str]:
    if not isinstance(query.encodings, Mapping):
        yield f"encodings is {kind_of(query.encodings)}; give a dictionary from names of parameters to Encoding(...)."
    if isinstance(query.only, str) or (query.only is not None and not isinstance(query.only, Collection)):
        yield f"only is {query.only!r}; give a set of names of parameters."
    for name in query.only or ():
        if problem := stranger(name, parameters, "only names"):
            yield problem
    if query.loss is not None and not callable(query.loss):
        yield f"loss is {kind_of(query.loss)}, which cannot be called; give a function from the task's loss to another."
    if query.beside is not None:
        yield from _of_numbers(query.beside)
    for name, encoding in query.encodings.items():
        if problem := stranger(name, parameters, "an encoding is of"):
            yield problem
        if encoding is not None:
            p = parameters[name]
            for problem in _of_encoding(encoding, p):
                yield f"the encoding of {name}, whose shape is {list(p.shape)}, {problem}"


def _of_encoding(encoding: Any, p: nn.Parameter) -> Iterator[str]:
    if not isinstance(encoding, Encoding):
        yield f"is {kind_of(encoding)}; give an Encoding(...), or None for the gradient as it is."
        return
    if isinstance(encoding, Stacked):
        for part in encoding.parts:
            yield from _of_encoding(part, p)
        return
    size = p.shape[1:].numel()
    sides = {"left": (encoding.left, p.shape[0] if p.dim() else 1), "right": (encoding.right, size)}
    if p.dim() < 2 and encoding.right is not None:
        yield "has a right side, and a gradient of one dimension has a left one only; give left."
    for side, (given, wanted) in sides.items():
        if given is not None:
            other = next(n for label, (_, n) in sides.items() if label != side)
            yield from _of_side(side, given, wanted, other, p)
    weights, shape = encoding.weights, encoding.shape(p.shape)
    if weights is not None and tuple(weights.shape) != shape:
        yield f"has weights of shape {list(weights.shape)}; give one for each entry of what is encoded, {list(shape)}."


def _of_side(side: str, given: Any, wanted: int, other: int, p: nn.Parameter) -> Iterator[str]:
    tensor = given.basis if isinstance(given, Complement) else given
    if not isinstance(tensor, torch.Tensor) or tensor.dim() not in (1, 2):
        seen = f"shape {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else kind_of(tensor)
        yield f"has a {side} side of {seen}; give a matrix [{wanted}, r] or the numbers of the rows to keep."
    elif tensor.device != p.device:
        yield f"has a {side} side on {tensor.device}, the parameter is on {p.device}; move it there."
    elif tensor.dim() == 2:
        if not tensor.is_floating_point():
            yield f"has a {side} side of {tensor.dtype}; give floating-point numbers."
        if len(tensor) != wanted:
            swapped = f" Did you mean {'right' if side == 'left' else 'left'}?" if len(tensor) == other else ""
            yield f"has a {side} side of shape {list(tensor.shape)}; give [{wanted}, r].{swapped}"
    elif tensor.dtype != torch.int64:
        yield f"has a {side} side that is a vector of {tensor.dtype}; give int64 numbers of the rows to keep."
    elif tensor.device.type == "cpu" and len(tensor) and not 0 <= int(tensor.min()) <= int(tensor.max()) < wanted:
        wrong = int(tensor.max()) if int(tensor.max()) >= wanted else int(tensor.min())
        yield f"keeps row {wrong} on its {side} side; give numbers from 0 to {wanted - 1}."
