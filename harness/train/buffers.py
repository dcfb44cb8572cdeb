"""State of a model beside what trains: nothing in it may change while gradients of private examples are taken."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from numbers import Number
from typing import Any

import torch
from torch import nn

from dpft.harness.engine import parted
from dpft.harness.errors import CannotRun
from dpft.harness.train.later import AT_ONCE, Later

LARGE = 1 << 20  # bytes: larger tensors are remembered by a checksum, not by a copy
_OWN = frozenset(
    {"_parameters", "_buffers", "_modules", "training", "activations", "max_batch_len"}
)  # the last two: Opacus's
# What `_held` finds nothing in and most attributes of a module are: hooks, names, what is not set.
_NOTHING = frozenset({OrderedDict, type(None), str, set})

State = dict[str, Any]


def fingerprint(model: nn.Module, owners: Mapping[str, Any] | None = None, weights: bool = False) -> State:
    """What `changed` compares: buffers, tensors and numbers that modules hold as plain attributes, and parameters.

    Buffers and attributes (also inside a list or dict that an attribute holds) by content, to the bit. Parameters by address and
    PyTorch's count of writes in place; weights: by content too, for a write to `p.data` is not counted. owners: by what they are
    called, objects whose attributes are looked at as those of modules are.
    """
    found: State = {}
    for name, value in _state(model):
        found[name] = _content(value) if isinstance(value, torch.Tensor) else value
    attributes = (
        (f"{owner}'s attribute {key}", v) for owner, o in (owners or {}).items() for key, v in vars(o).items()
    )
    for attribute, held in attributes:
        for name, value in _held(attribute, held):
            if isinstance(value, torch.Tensor):
                as_weight = value.nbytes > LARGE and not weights  # a copy of the weights, or moments
                value = (value.data_ptr(), value._version) if as_weight else _content(value)
            found[name] = value
    for name, p in model.named_parameters():
        p = parted.held(p)
        found[f"parameter {name}"] = (p.data_ptr(), p._version)
        if weights:
            found[f"parameter {name}'s values"] = _content(p.detach(), copied=False)
    return found


def changed(before: State, model: nn.Module, owners: Mapping[str, Any] | None = None) -> list[str]:
    """Names of what differs from `before`, a fingerprint of the same model."""
    found: list[str] = []
    tell(before, model, owners, AT_ONCE, found.extend)
    return sorted(found)


def tell(
    before: State,
    model: nn.Module,
    owners: Mapping[str, Any] | None,
    later: Later,
    told: Callable[[list[str]], None],
) -> None:
    """Call `told` with names of what differs: now, and of tensors later; the loop asks around the gradients of every step."""
    after = fingerprint(model, owners, weights=any(name.endswith("'s values") for name in before))
    names = sorted(before.keys() ^ after.keys())
    flags, compared = [], []
    for name in before.keys() & after.keys():
        was, now = before[name], after[name]
        if not isinstance(was, torch.Tensor) or not isinstance(now, torch.Tensor) or was.shape != now.shape:
            same = (
                type(was) is type(now)
                and not isinstance(was, torch.Tensor)
                and (was == now or (was != was and now != now))
            )
            names += [] if same else [name]
        elif was.device != now.device or was.dtype != now.dtype:
            names.append(name)
        elif was.numel():
            flags.append((was != now).any())
            compared.append(name)
    told(sorted(names))
    for place in dict.fromkeys(flag.device for flag in flags):  # one look at each
        own = {name: flag for name, flag in zip(compared, flags, strict=True) if flag.device == place}

        def those(differ: torch.Tensor, own=tuple(own)) -> None:
            told(sorted(name for name, differs in zip(own, differ.tolist(), strict=True) if differs))

        later.ask(torch.stack([*own.values()]), those)


def refusal(names: list[str]) -> CannotRun:
    """The error for what `changed` found."""
    return CannotRun(
        f"The model's {names[0]} changed while private gradients were taken, so it holds what no noise covers; keep such a "
        "statistic out of the model, or update it from releases in `decode`."
    )


def refuse_statistics(model: nn.Module, batched: bool) -> None:
    """Raise CannotRun for a layer that keeps statistics of its inputs in training, or normalises by those of a batch.

    batched: several examples go through the model at once; otherwise BatchNorm sees one at a time and mixes nothing.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise CannotRun(
                f"Embedding {name} has max_norm, which rescales its rows as examples look them up; set max_norm=None."
            )
        if not isinstance(module, nn.modules.batchnorm._NormBase) or not module.training:
            continue
        kind = type(module).__name__
        if module.track_running_stats:
            raise CannotRun(
                f"Layer {name} is a {kind} that tracks statistics of its inputs in training, which no noise covers; convert it "
                "to GroupNorm, or keep it in evaluation mode."
            )
        if batched and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise CannotRun(f"Layer {name} is a {kind}, which mixes examples; convert it to GroupNorm.")


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's buffers by name, for a checkpoint."""
    return {name: buffer for name, buffer in model.named_buffers() if buffer.dtype.is_complex is False}


def restore(model: nn.Module, kept: dict[str, torch.Tensor]) -> None:
    """Put back what `tensors` returned; one that has another shape now is made anew by its model."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in kept and kept[name].shape == buffer.shape and not torch.equal(kept[name], buffer.cpu()):
                buffer.copy_(kept[name])


def _state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        where = f" of {path}" if path else ""
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield f"buffer {path + '.' if path else ''}{name}", buffer
        for name, value in vars(module).items():
            if type(value) not in _NOTHING and name not in _OWN:
                yield from _held(f"attribute {name}{where}", value)


def _held(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Tensors and numbers of one attribute, one container deep; parameters are looked at elsewhere."""
    if isinstance(value, Number):
        yield name, value
    elif isinstance(value, torch.Tensor):
        if not isinstance(value, nn.Parameter):
            yield name, value
    elif type(value) in (list, tuple, dict) and value:
        for key, inner in value.items() if type(value) is dict else enumerate(value):
            if isinstance(inner, Number) or (isinstance(inner, torch.Tensor) and not isinstance(inner, nn.Parameter)):
                yield f"{name}[{key!r}]", inner


@torch.no_grad()
def _content(tensor: torch.Tensor, copied: bool = True) -> Any:
    """The bits of a tensor as integers; of a large one (or not `copied`) their sum."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return (id(tensor), tensor._version)
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if copied and flat.numel() <= LARGE:
        return flat.clone()
    whole = flat.numel() // 8 * 8
    if not whole or flat.storage_offset() % 8:
        return flat.sum(dtype=torch.int64)[None]
    sums = [flat[:whole].view(torch.int64).sum(), flat[whole:].sum(dtype=torch.int64)]
    return torch.stack(sums)
