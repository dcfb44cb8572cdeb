"""How the code that runs is changed for as long as a context lasts: what the planted bugs share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from dpft.harness.audit.listening import tensors_of
from dpft.harness.query.noisy_sum import VALUES
from dpft.harness.train import guard, loop
from dpft.harness.train.mechanism import Mechanism

Sums = dict[str, torch.Tensor]


def wrapped(owner: Any, name: str, make: Callable[[Callable], Callable]):
    """`owner.name` replaced by `make(original)` for as long as the context lasts."""
    return patch.object(owner, name, make(getattr(owner, name)))


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without the loop's own comparison of its engine with autograd, which would end many a run before an audit sees anything."""
    with contextlib.ExitStack() as stack:
        for name in ("rehearse", "compare"):
            stack.enter_context(patch.object(guard, name, lambda *_, **__: None))
        yield


def released(
    around: Callable[[Callable[[Sums], Any], Mechanism, Sums], Any], of: Callable[[Sums], bool] = lambda s: True
):
    """Every release is `around(ask, mechanism, clipped sum)` instead, where `ask` is the mechanism's own. of: of which sums."""

    def make(original):
        def instead(self, clipped_sum, clip_norm=None, share=1.0):
            if not of(clipped_sum):
                return original(self, clipped_sum, clip_norm, share)
            return around(lambda total: original(self, total, clip_norm, share), self, clipped_sum)

        return instead

    return wrapped(Mechanism, "release", make)


def numbers(clipped_sum: Sums) -> bool:
    """Whether a sum answers a question for numbers."""
    return VALUES in clipped_sum


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


def altered_noise(change: Callable[[Sums], Sums], of: Callable[[Sums], bool] = lambda s: True):
    """Noise that is `change` of the honest one, by name, in units of its standard deviation. of: of which sums."""

    def around(ask, mechanism, clipped_sum):
        clean = {name: t.clone() for name, t in clipped_sum.items()}
        noisy, size = ask(clipped_sum), mechanism.expected_batch_size
        scale, tensors = noisy.noise_multiplier * noisy.clip_norm, tensors_of(noisy)
        if not scale:
            return noisy
        noise = {name: (t * size - clean[name]) / scale for name, t in tensors.items()}
        for name, entries in change(noise).items():
            tensors[name].copy_((clean[name] + scale * entries) / size)
        return noisy

    return released(around, of)


def batches(look: Callable[[list[int]], Any]):
    """`look` is told the examples of every pass over a batch."""

    def make(microbatches):
        def told(setup, indices, step):
            look(indices)
            return microbatches(setup, indices, step)

        return told

    return wrapped(loop, "microbatches", make)


def touched(this: dict):
    """`this["touched"]` is how many examples touch each row: what a question for numbers is answered with, before its noise."""

    def around(ask, mechanism, clipped_sum):
        this["touched"] = clipped_sum[VALUES].clone()
        return ask(clipped_sum)

    return released(around, of=numbers)
