"""Noise that is correlated over steps, and what must stay the same from step to step for that (harness/privacy/strategy.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from dpft.harness.errors import CannotRun
from dpft.harness.privacy.strategy import coefficients, deviation
from dpft.harness.query.queries import Query
from dpft.harness.train.noise import Source, Tensors

MADE, SPACE = "made", "space"  # beside the earlier noise, in a checkpoint


class Correlated:
    """A source of noise whose draws are w_t = (z_t - sum_k c_k w_(t-k)) / c_0, z_t those of `source`: one `add` a step.

    It holds the w of the last `bands - 1` steps, in fp32: so many sums more in memory and in checkpoints.
    """

    def __init__(self, source: Source, bands: int):
        self._source, self._bands = source, bands
        self._past: list[list[torch.Tensor]] = []  # the last step's first
        self._space: bytes = b""
        self.made = 0

    @property
    def spread(self) -> float:
        """Standard deviation of the draws of the last step."""
        return deviation(self._bands, max(0, self.made - 1))

    def add(self, tensors: Tensors, scale: float, divisor: float, kind: str) -> None:
        """As `KeyStream.add`. Raises CannotRun where the tensors have other shapes than those of the last step."""
        if self._past and [t.shape for t in self._past[0]] != [t.shape for t in tensors]:
            raise CannotRun(
                "A step releases other shapes than the one before, so their noise cannot be correlated; leave out bands."
            )
        first, *rest = coefficients(self._bands)
        drawn = [torch.zeros_like(t, dtype=torch.float32) for t in tensors]
        self._source.add(drawn, 1.0, 1.0, kind)
        for c, past in zip(rest, self._past, strict=False):
            torch._foreach_add_(drawn, past, alpha=-c)
        torch._foreach_div_(drawn, first)
        self._past, self.made = [drawn, *self._past][: self._bands - 1], self.made + 1
        for tensor, own in zip(tensors, drawn, strict=True):
            tensor.add_(own.to(tensor.dtype), alpha=scale).div_(divisor)

    def same_space(self, asker: str, queries: Mapping[str, Query]) -> None:
        """Raises CannotRun where a step asks in another space than the first one did: other parameters, encodings or bounds.

        The noise of two spaces cannot cancel. (It would still protect: this is about what a run is good for.)
        """
        space = hashlib.sha256(
            "".join(f"{name}: {_written(query)};" for name, query in queries.items()).encode()
        ).digest()
        if self._space and space != self._space:
            raise CannotRun(
                f"{asker} asks in another space than in its first step, so their noise cannot be correlated; leave out bands."
            )
        self._space = space

    def kept(self) -> dict[str, torch.Tensor]:
        """What goes on from step to step beside `state`, for a checkpoint."""
        past = {f"{k}.{i}": t for k, tensors in enumerate(self._past) for i, t in enumerate(tensors)}
        return {**past, MADE: torch.tensor([self.made]), SPACE: torch.tensor([*self._space], dtype=torch.uint8)}

    def set_kept(self, kept: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Restore what `kept` returned."""
        self.made, self._space = int(kept[MADE][0]), bytes(kept[SPACE].tolist())
        places = sorted(tuple(map(int, key.split("."))) for key in kept if key not in (MADE, SPACE))
        self._past = [[] for _ in range(1 + max((k for k, _ in places), default=-1))]
        for k, i in places:
            self._past[k].append(kept[f"{k}.{i}"].to(device))

    def room(self, tensors: Tensors) -> list[torch.Tensor]:
        """As `KeyStream.room`."""
        return [*self._source.room(tensors), *(torch.zeros_like(t, dtype=torch.float32) for t in tensors)]

    def uniform(self, count: int = 1) -> Any:
        """As `KeyStream.uniform`."""
        return self._source.uniform(count)

    def state(self) -> torch.Tensor:
        return self._source.state()

    def set_state(self, state: torch.Tensor) -> None:
        self._source.set_state(state)

    def close(self) -> None:
        self._source.close()


def _written(value: Any) -> str:
    """What of a question says in which space its answer is; tensors by their digest, losses and other functions not at all."""
    if isinstance(value, torch.Tensor):
        numbers = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(numbers.tobytes()).hexdigest()}"
    if isinstance(value, frozenset):
        return str(sorted(value))
    if isinstance(value, Mapping):
        return str({key: _written(value[key]) for key in sorted(value)})
    if isinstance(value, tuple):
        return str([_written(one) for one in value])
    if is_dataclass(value):
        held = {each.name: getattr(value, each.name) for each in fields(value)}
        return type(value).__name__ + str(
            [(name, _written(one)) for name, one in held.items() if one is not None and not callable(one)]
        )
    return repr(value)
