"""What answers need of a run, what is found on the way, and who may look on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dpft.harness.engine.base import Engine, Sums
from dpft.harness.engine.fakes import has_values
from dpft.harness.query.encoding import Encoding
from dpft.harness.query.noisy_sum import NoisySum
from dpft.harness.query.queries import Bound, Gradients, Query
from dpft.harness.train.later import AT_ONCE, Later
from dpft.harness.train.mechanism import Mechanism
from dpft.harness.train.ranks import ALONE, Ranks
from dpft.methods.clipping.base import ClippingRule

NOT_ASKED = Encoding(left=torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True)
class Core:
    """What answers need of a run.

    Attributes:
        model, parameters: what is trained, and which of it trains, by name.
        engine: makes gradients, clips them, sums them; knows the task's loss.
        mechanism: adds noise.
        rule: what becomes of the bound.
        clip_norm: the run's C; infinite where nothing is clipped.
        clock: of the phases.
        asker: who asks, for messages.
        ranks: who else has examples of the batch.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    engine: Engine
    mechanism: Mechanism
    rule: ClippingRule
    clip_norm: float
    clock: Any
    asker: str = "The method"
    ranks: Ranks = ALONE

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def bound(self, query: Query) -> Bound:
        """C of a question for gradients."""
        given = getattr(query, "bound", None)
        return self.clip_norm if given is None else given


@dataclass
class Found:
    """What one query's examples were like, in the order of the microbatches: diagnostics, and what checks compare.

    losses: [n]; norms: [n, groups] of gradients, [n, 1] of rows of numbers, before clipping; over: [n], them against the bound;
    beside: [n] norms of the numbers beside a gradient, before they are cut.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    over: list[torch.Tensor] = field(default_factory=list)
    beside: list[torch.Tensor] = field(default_factory=list)

    @property
    def finite(self) -> torch.Tensor:
        """Whether all of them are, [], where they are."""
        parts = [torch.isfinite(t).all() for t in (*self.losses, *self.norms, *self.beside) if has_values(t)]
        return torch.stack(parts).all() if parts else torch.tensor(True)


class Watcher:
    """Who looks on, non-privately; nothing that it finds is fed back. later: when values are looked at."""

    later: Later = AT_ONCE

    def asked(self, queries: Mapping[str, Query]) -> None:
        """Before the examples are looked at."""

    def passing(self) -> AbstractContextManager[None]:
        """Around the passes over the examples."""
        return nullcontext()

    def summed(self, name: str, query: Query, total: Sums, found: Found) -> None:
        """A clipped sum, before its noise."""

    def released(self, name: str, noisy: NoisySum) -> None:
        """A release, before the method sees it."""


def encodings_of(query: Gradients, parameters: Mapping[str, nn.Parameter]) -> dict[str, Encoding]:
    """By parameter; one of no rows for each that `only` leaves out."""
    left_out = () if query.only is None else [name for name in parameters if name not in query.only]
    nothing = {
        name: replace(NOT_ASKED, left=NOT_ASKED.left.new_empty(0, device=parameters[name].device)) for name in left_out
    }
    return {name: e for name, e in {**query.encodings, **nothing}.items() if e is not None}
