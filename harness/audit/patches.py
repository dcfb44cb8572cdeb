"""How the code that runs is changed for as long as a context lasts: what the planted bugs share."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from dpft.harness.engine import agreement
from dpft.harness.train import loop
from dpft.harness.train.mechanism import Mechanism

Sums = dict[str, torch.Tensor]


def wrapped(owner: Any, name: str, make: Callable[[Callable], Callable]):
    """`owner.name` replaced by `make(original)` for as long as the context lasts."""
    return patch.object(owner, name, make(getattr(owner, name)))


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without the loop's own comparison of its engine with autograd, which would end many a run before an audit sees anything."""
    with contextlib.ExitStack() as stack:
        for owner, name in itertools.product((loop, agreement), ("check", "compare")):
            if hasattr(owner, name):
                stack.enter_context(patch.object(owner, name, lambda *_, **__: None))
        yield


def released(around: Callable[[Callable[[Sums], Any], Mechanism, Sums], Any]):
    """Every release is `around(ask, mechanism, clipped sum)` instead, where `ask` is the mechanism's own."""

    def make(original):
        def instead(self, clipped_sum):
            return around(lambda total: original(self, total), self, clipped_sum)

        return instead

    return wrapped(Mechanism, "release", make)


def scaled_noise(factor: Callable[[Mechanism], float]):
    """Noise of another size than is booked."""

    def around(ask, mechanism, clipped_sum):
        honest = mechanism.noise_multiplier
        mechanism.noise_multiplier = honest * factor(mechanism)
        try:
            return ask(clipped_sum)
        finally:
            mechanism.noise_multiplier = honest

    return released(around)


def altered_noise(change: Callable[[Sums], Sums]):
    """Noise that is `change` of the honest one, by name, in units of its standard deviation."""

    def around(ask, mechanism, clipped_sum):
        scale = mechanism.noise_multiplier * mechanism.clip_norm
        if not scale:
            return ask(clipped_sum)
        clean = {name: t.clone() for name, t in clipped_sum.items()}
        noisy, size = ask(clipped_sum), mechanism.expected_batch_size
        noise = {name: (t * size - clean[name]) / scale for name, t in noisy.tensors.items()}
        for name, entries in change(noise).items():
            noisy.tensors[name].copy_((clean[name] + scale * entries) / size)
        return noisy

    return released(around)


def batches(look: Callable[[list[int]], Any]):
    """`look` is told the examples of every batch whose gradients are taken."""

    def make(accumulate):
        def told(setup, indices, *rest):
            look(indices)
            return accumulate(setup, indices, *rest)

        return told

    return wrapped(loop, "_accumulate", make)
