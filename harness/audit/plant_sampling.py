"""Contexts in which batches are drawn, counted or booked wrongly, each in one way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch

from dpft.harness.audit.patches import released, wrapped
from dpft.harness.engine.base import RunningSums
from dpft.harness.privacy import Release
from dpft.harness.train import loop
from dpft.harness.train.sampling import PoissonSampler


def shuffled():
    """Every epoch is cut into batches of the expected size; booked as Poisson."""

    def sample(self):
        size = round(self.num_examples * self.sampling_probability)
        left = getattr(self, "left", [])
        if len(left) < size:
            left = left + torch.randperm(self.num_examples, generator=self.generator).tolist()
        self.left = left[size:]
        return sorted(left[:size])

    return patch.object(PoissonSampler, "sample", sample)


def fixed_size():
    """Batches of exactly the expected size, drawn anew each step."""

    def sample(self):
        size = round(self.num_examples * self.sampling_probability)
        return sorted(torch.randperm(self.num_examples, generator=self.generator)[:size].tolist())

    return patch.object(PoissonSampler, "sample", sample)


def with_replacement():
    """As many draws as are expected, each of any example: one may be in a batch twice."""

    def sample(self):
        size = round(self.num_examples * self.sampling_probability)
        return sorted(torch.randint(self.num_examples, (size,), generator=self.generator).tolist())

    return patch.object(PoissonSampler, "sample", sample)


def doubled_rate():
    def sample(self):
        draws = torch.rand(self.num_examples, dtype=torch.float64, generator=self.generator)
        return (draws < 2 * self.sampling_probability).nonzero().flatten().tolist()

    return patch.object(PoissonSampler, "sample", sample)


def capped():
    """Of a batch a tenth above the expected size and larger, only the first examples are trained."""

    def make(accumulate):
        def cut(setup, indices, *rest):
            found = accumulate(setup, indices[: round(1.1 * setup.spec.batch_size)], *rest)
            return tuple(torch.cat([part, part.new_zeros(len(indices) - len(part))]) for part in found)

        return cut

    return wrapped(loop, "_accumulate", make)


@contextlib.contextmanager
def second_batch() -> Iterator[None]:
    """A second query is answered on a batch of its own, and booked as if it were on the first one: two releases of one batch."""
    other: list[RunningSums] = []

    def twice(accumulate):
        def asked(setup, indices, step, total, encodings):
            other[:] = [RunningSums(setup.parameters, encodings)]
            accumulate(setup, setup.sampler.sample(), step, other[0], encodings)
            return accumulate(setup, indices, step, total, encodings)

        return asked

    def around(ask, mechanism, clipped_sum):
        honest = mechanism.noise_multiplier
        mechanism.noise_multiplier = honest * 2**0.5
        try:
            answer, noisy = ask(other[0].complete()), ask(clipped_sum)
        finally:
            mechanism.noise_multiplier = honest
        for name, tensor in noisy.tensors.items():
            tensor.add_(answer.tensors[name]).div_(2)
        return noisy

    def book(setup, account, step):
        half = setup.mechanism.noise_multiplier * 2**0.5
        account.append(
            step,
            setup.sampler.sampling_probability,
            [Release(name=name, noise_multiplier=half) for name in ("gradient", "second")],
        )

    with wrapped(loop, "_accumulate", twice), released(around), patch.object(loop, "_book", book):
        yield


def half_booked():
    """Every other step is left out of the account."""

    def book(setup, account, step):
        if step % 2 == 0:
            release = Release(name="gradient", noise_multiplier=setup.mechanism.noise_multiplier)
            account.append(account.steps, setup.sampler.sampling_probability, [release])

    return patch.object(loop, "_book", book)


@contextlib.contextmanager
def early_stop() -> Iterator[None]:
    """The run ends in the first step of its second half whose loss, which nobody noised, is below that of the step before."""
    losses: list[float] = []

    def make(step_of):
        def step(setup, state, *rest):
            row = step_of(setup, state, *rest)
            late = state.step > setup.spec.steps // 2 and losses and row["loss"] is not None
            if late and row["loss"] < losses[-1]:
                state.step = setup.spec.steps - 1
            losses.append(float("-inf") if row["loss"] is None else row["loss"])
            return row

        return step

    with wrapped(loop, "_measured_step", make):
        yield
