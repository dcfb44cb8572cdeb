"""Contexts in which the noise of a run is wrong, each in one way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from dpft.harness.audit.patches import altered_noise, batches, numbers, released, scaled_noise, touched, wrapped
from dpft.harness.audit.subject import MICROBATCH
from dpft.harness.train import correlated
from dpft.methods import projection
from dpft.methods.sparta import Sparta
from dpft.methods.token_table import TableRows
from dpft.methods.zeroth import DPZO


def noise_over_batch():
    return scaled_noise(lambda mechanism: 1 / mechanism.expected_batch_size)


def unscaled_strategy():
    """Correlated noise of a strategy whose columns are longer than 1."""
    return wrapped(correlated, "coefficients", lambda of: lambda bands: tuple(c / of(bands)[0] for c in of(bands)))


def uncorrelated():
    """Every step draws its noise anew, where it is booked as correlated."""
    return wrapped(correlated, "coefficients", lambda of: lambda bands: (1.0, *[0.0] * (bands - 1)))


def half_the_variance():
    return scaled_noise(lambda mechanism: 0.5**0.5)


@contextlib.contextmanager
def noise_per_microbatch() -> Iterator[None]:
    """Every microbatch adds sigma C / sqrt(m), but for the last one, which is forgotten."""
    parts = [1]

    def count(indices):
        parts[0] = max(1, math.ceil(len(indices) / MICROBATCH))

    with batches(count), scaled_noise(lambda mechanism: ((parts[0] - 1) / parts[0]) ** 0.5):
        yield


@contextlib.contextmanager
def none_without_examples() -> Iterator[None]:
    """An empty batch is released as it is: zeros."""
    drawn = [1]

    def count(indices):
        drawn[0] = len(indices)

    with batches(count), scaled_noise(lambda mechanism: float(drawn[0] > 0)):
        yield


def weights_only():
    """Vectors (biases, norms) are released without noise."""
    return altered_noise(lambda noise: {n: torch.zeros_like(z) for n, z in noise.items() if z.dim() < 2})


def clamped(at: float):
    """No entry of the noise is further out than `at` standard deviations."""
    return altered_noise(lambda noise: {name: z.clamp(-at, at) for name, z in noise.items()})


def reused_bias():
    """The noise of one bias is that of another one, too."""

    def change(noise):
        first, second, *_ = (name for name, z in noise.items() if z.dim() == 1)
        return {second: noise[first]}

    return altered_noise(change)


@contextlib.contextmanager
def constant_bias() -> Iterator[None]:
    """One bias has the noise of the first step in every step."""
    kept: list[torch.Tensor] = []

    def change(noise):
        name = next(name for name, z in noise.items() if z.dim() == 1)
        kept.append(noise[name].clone())
        return {name: kept[0]}

    with altered_noise(change):
        yield


def reseeded(within: bool):
    """The streams start again at every step, or (`within`) at every tensor of a step."""

    def around(ask, mechanism, clipped_sum):
        if not hasattr(mechanism, "first"):
            mechanism.first = mechanism.state()
        if not within:
            mechanism.set_state(mechanism.first)
            return ask(clipped_sum)
        now, parts = mechanism.state(), {}
        for name, tensor in clipped_sum.items():
            mechanism.set_state(now)
            noisy = ask({name: tensor})
            parts |= noisy.tensors
        noisy.tensors.update(parts)
        return noisy

    return released(around)


def second_release():
    """The method gets a second noisy sum of the same batch, which nobody books."""

    def around(ask, mechanism, clipped_sum):
        other = ask({name: t.clone() for name, t in clipped_sum.items()})
        noisy = ask(clipped_sum)
        for name, tensor in noisy.tensors.items():
            tensor.add_(other.tensors[name]).div_(2)
        return noisy

    return released(around)


@contextlib.contextmanager
def realised_size() -> Iterator[None]:
    """The noisy sum is divided by the number of examples that were drawn."""
    drawn = [1]

    def count(indices):
        drawn[0] = max(1, len(indices))

    def around(ask, mechanism, clipped_sum):
        noisy = ask(clipped_sum)
        torch._foreach_mul_(list(noisy.tensors.values()), mechanism.expected_batch_size / drawn[0])
        return noisy

    with batches(count), released(around):
        yield


def after_releases():
    """The noise of a step is a tenth more or less, by the sign of the sum of the last release; what is booked is constant."""

    def around(ask, mechanism, clipped_sum):
        honest = mechanism.noise_multiplier
        mechanism.noise_multiplier = honest * getattr(mechanism, "next_factor", 1.0)
        try:
            noisy = ask(clipped_sum)
        finally:
            mechanism.noise_multiplier = honest
        mechanism.next_factor = 1.1 if sum(float(t.sum()) for t in noisy.tensors.values()) > 0 else 0.9
        return noisy

    return released(around)


@contextlib.contextmanager
def noiseless_selection() -> Iterator[None]:
    """The release by which rows are chosen has no noise."""
    selecting = [False]

    def noted(step_of):
        def stepped(self, ask, step):
            selecting[0] = self.kind(step) == "selection"
            return step_of(self, ask, step)

        return stepped

    with wrapped(Sparta, "step", noted), scaled_noise(lambda mechanism: float(not selecting[0])):
        yield


@contextlib.contextmanager
def from_directions() -> Iterator[None]:
    """The noise is drawn by the generator that draws the first direction of the step, from its seed."""
    this: dict = {}

    def noted(step_of):
        def stepped(self, ask, step):
            this["generator"] = lambda: projection.generator(torch.device("cpu"), self._seed, step, 0, 0)
            return step_of(self, ask, step)

        return stepped

    def drawn(noise):
        return {name: torch.randn(z.shape, generator=this["generator"]()) for name, z in noise.items()}

    with wrapped(DPZO, "step", noted), altered_noise(drawn, of=numbers):
        yield


@contextlib.contextmanager
def untouched_rows_bare() -> Iterator[None]:
    """Rows of the table that survive though nobody in the batch touched them get no noise."""
    this: dict = {}

    def noted(train_rows):
        def trained(self, ask, rows, seen):
            this["table"], this["untouched"] = self.table, this["touched"][rows] == 0
            return train_rows(self, ask, rows, seen)

        return trained

    def bared(noise):
        noise[this["table"]][this["untouched"]] = 0.0
        return noise

    with touched(this), wrapped(TableRows, "train_rows", noted), altered_noise(bared, of=lambda s: not numbers(s)):
        yield
