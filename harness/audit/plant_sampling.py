"""Contexts in which batches are drawn, counted or booked wrongly, each in one way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch

from dpft.harness.audit.patches import released, wrapped
from dpft.harness.privacy import Release
from dpft.harness.privacy.samplings import POISSON
from dpft.harness.runs import plan
from dpft.harness.train import batches, loop
from dpft.harness.train.answer import Answers
from dpft.harness.train.sampling import Sampler, TruncatedSampler
from dpft.methods.clipping.quantile import Quantile


def users_as_examples():
    """Several examples of a user may be in a batch, and noise and ledger know of one."""

    def make(made):
        return lambda kind, *rest: POISSON if kind == "grouped" else made(kind, *rest)

    return wrapped(plan, "made", make)


def shuffled():
    """Every epoch is cut into batches of the expected size; booked as Poisson."""

    def sample(self):
        size = round(self.num_examples * self.sampling_probability)
        left = getattr(self, "left", [])
        if len(left) < size:
            left = left + torch.randperm(self.num_examples, generator=self.generator).tolist()
        self.left = left[size:]
        return sorted(left[:size])

    return patch.object(Sampler, "sample", sample)


def fixed_size():
    """Batches of exactly the expected size, drawn anew each step."""

    def sample(self):
        size = round(self.num_examples * self.sampling_probability)
        return sorted(torch.randperm(self.num_examples, generator=self.generator)[:size].tolist())

    return patch.object(Sampler, "sample", sample)


def with_replacement():
    """As many draws as are expected, each of any example: one may be in a batch twice."""

    def sample(self):
        size = round(self.num_examples * self.sampling_probability)
        return sorted(torch.randint(self.num_examples, (size,), generator=self.generator).tolist())

    return patch.object(Sampler, "sample", sample)


def doubled_rate():
    def sample(self):
        draws = torch.rand(self.num_examples, dtype=torch.float64, generator=self.generator)
        return (draws < 2 * self.sampling_probability).nonzero().flatten().tolist()

    return patch.object(Sampler, "sample", sample)


def cyclic():
    """Two groups take turns, each at twice the rate; booked as Poisson."""

    def sample(self):
        self.drawn = getattr(self, "drawn", -1) + 1
        draws = torch.rand(self.num_examples, dtype=torch.float64, generator=self.generator)
        turn = torch.arange(self.num_examples) % 2 == self.drawn % 2
        return ((draws < 2 * self.sampling_probability) & turn).nonzero().flatten().tolist()

    return patch.object(Sampler, "sample", sample)


def uncut():
    """Batches are booked as cut, and are not."""
    return patch.object(TruncatedSampler, "_chosen", Sampler._chosen)


def capped():
    """Of a batch a tenth above the expected size and larger, only the first examples are trained."""

    def make(microbatches):
        return lambda setup, indices, step: microbatches(setup, indices[: round(1.1 * setup.spec.batch_size)], step)

    return wrapped(loop, "microbatches", make)


@contextlib.contextmanager
def second_batch() -> Iterator[None]:
    """A second query is answered on a batch of its own, and booked as if it were on the first one: two releases of one batch."""
    this: dict = {}

    def noted(microbatches):
        def noting(setup, indices, step):
            this.update(setup=setup, step=step)
            return microbatches(setup, indices, step)

        return noting

    def twice(sums_of):
        def asked(self, queries):
            found, own = sums_of(self, queries), self._batches
            indices = this["setup"].sampler.sample()
            self._batches = lambda: batches.microbatches(this["setup"], indices, this["step"])
            this["other"], _ = sums_of(self, queries)
            self._batches = own
            return found

        return asked

    def around(ask, mechanism, clipped_sum):
        honest = mechanism.noise_multiplier
        mechanism.noise_multiplier = honest * 2**0.5
        try:
            answer, noisy = ask(this["other"]["gradient"]), ask(clipped_sum)
        finally:
            mechanism.noise_multiplier = honest
        for name, tensor in noisy.tensors.items():
            tensor.add_(answer.tensors[name]).div_(2)
        return noisy

    def book(setup, run, declared):
        half = setup.mechanism.noise_multiplier * 2**0.5
        releases = [Release(name=name, noise_multiplier=half) for name in ("gradient", "second")]
        run.progress.ledger.append(run.progress.step, setup.sampler.sampling_probability, releases)

    with (
        wrapped(loop, "microbatches", noted),
        wrapped(Answers, "_sums", twice),
        released(around),
        patch.object(loop, "_book", book),
    ):
        yield


def half_booked():
    """Every other step is left out of the account."""

    def book(setup, run, declared):
        if run.progress.step % 2 == 0:
            ledger = run.progress.ledger
            ledger.append(ledger.steps, setup.sampler.sampling_probability, setup.mechanism.entries(declared))

    return patch.object(loop, "_book", book)


@contextlib.contextmanager
def moving_shares() -> Iterator[None]:
    """How much of the budget the count of `quantile` gets follows its last release; booked as drawn."""
    last = [0.0]

    def declaring(shares):
        def declared(self):
            return {name: share * (2.0 if last[0] > 0 else 1.0) for name, share in shares(self).items()}

        return declared

    def learning(learn):
        def learnt(self, gradient, beside):
            last[0] = float(beside["count"].values[0])
            return learn(self, gradient, beside)

        return learnt

    with wrapped(Quantile, "shares", declaring), wrapped(Quantile, "learn", learning):
        yield


@contextlib.contextmanager
def early_stop() -> Iterator[None]:
    """The run ends in the first step of its second half whose loss, which nobody noised, is below that of the step before."""
    losses: list[float] = []

    def make(step_of):
        def step(setup, run, *rest):
            row = step_of(setup, run, *rest)
            late = run.progress.step > setup.spec.steps // 2 and losses and row["loss"] is not None
            if late and row["loss"] < losses[-1]:
                run.progress.step = setup.spec.steps - 1
            losses.append(float("-inf") if row["loss"] is None else row["loss"])
            return row

        return step

    with wrapped(loop, "_measured_step", make):
        yield
