"""Contexts in which the code that runs gets differential privacy wrong, each in one way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from dpft.harness import loop
from dpft.harness.audit.subject import MICROBATCH
from dpft.harness.engine import agreement
from dpft.harness.engine.base import RunningSums
from dpft.harness.engine.clipping import Clipping
from dpft.harness.engine.factored import FactoredEngine
from dpft.harness.mechanism import Mechanism
from dpft.harness.privacy import Release
from dpft.harness.sampling import PoissonSampler
from dpft.methods.full import DPAdam
from dpft.methods.grape import DPGRAPE


def _wrapped(owner: Any, name: str, make: Callable[[Callable], Callable]):
    """`owner.name` replaced by `make(original)` for as long as the context lasts."""
    return patch.object(owner, name, make(getattr(owner, name)))


@contextlib.contextmanager
def _unchecked(plant) -> Iterator[None]:
    """A plant that the comparison with autograd would end before the audit sees it."""
    with (
        patch.object(agreement, "check", lambda *arguments, **options: None),
        patch.object(agreement, "compare", lambda *arguments, **options: None),
        plant,
    ):
        yield


def _scaled_noise(factor: Callable[[Mechanism], float]):
    """Noise of another size than is booked."""

    def make(original):
        def released(self, clipped_sum):
            honest = self.noise_multiplier
            self.noise_multiplier = honest * factor(self)
            try:
                return original(self, clipped_sum)
            finally:
                self.noise_multiplier = honest

        return released

    return _wrapped(Mechanism, "release", make)


def noise_over_batch():
    return _scaled_noise(lambda mechanism: 1 / mechanism.expected_batch_size)


def half_the_variance():
    return _scaled_noise(lambda mechanism: 0.5**0.5)


@contextlib.contextmanager
def noise_per_microbatch() -> Iterator[None]:
    """Every microbatch adds sigma C / sqrt(m), but for the last one, which is forgotten."""
    parts = [1]

    def make(accumulate):
        def counted(setup, indices, *rest):
            parts[0] = max(1, math.ceil(len(indices) / MICROBATCH))
            return accumulate(setup, indices, *rest)

        return counted

    with _wrapped(loop, "_accumulate", make), _scaled_noise(lambda mechanism: ((parts[0] - 1) / parts[0]) ** 0.5):
        yield


def weights_only():
    """Vectors (biases, norms) are released without noise."""

    def make(original):
        def released(self, clipped_sum):
            plain = {n: t.clone() / self.expected_batch_size for n, t in clipped_sum.items() if t.dim() < 2}
            noisy = original(self, clipped_sum)
            noisy.tensors.update(plain)
            return noisy

        return released

    return _wrapped(Mechanism, "release", make)


def reseeded(within: bool):
    """The streams start again at every step, or (`within`) at every tensor of a step."""

    def make(original):
        def released(self, clipped_sum):
            if not hasattr(self, "first"):
                self.first = self.state()
            if not within:
                self.set_state(self.first)
                return original(self, clipped_sum)
            now, parts = self.state(), {}
            for name, tensor in clipped_sum.items():
                self.set_state(now)
                noisy = original(self, {name: tensor})
                parts |= noisy.tensors
            noisy.tensors.update(parts)
            return noisy

        return released

    return _wrapped(Mechanism, "release", make)


def clip_after_sum():
    """The sum of a microbatch is clipped, not its examples."""

    def make(accumulate):
        def clipped(self, batch, total, clip_norm, encodings):
            whole = RunningSums(self.parameters, encodings)
            losses, norms = accumulate(self, batch, whole, math.inf, encodings)
            norm = math.sqrt(sum(float(t.double().square().sum()) for t in whole.complete().values()))
            for name, tensor in whole.complete().items():
                total[name].add_(tensor, alpha=min(1.0, clip_norm / max(norm, 1e-30)))
            return losses, norms

        return clipped

    return _unchecked(_wrapped(FactoredEngine, "accumulate", make))


def no_clip():
    def make(accumulate):
        return lambda self, batch, total, clip_norm, encodings: accumulate(self, batch, total, math.inf, encodings)

    return _unchecked(_wrapped(FactoredEngine, "accumulate", make))


def layer_clip():
    """Every layer is clipped to C, not to C / sqrt(layers)."""
    wrong = _wrapped(Clipping, "factors", lambda factors: lambda self, norms, c, groups=1: factors(self, norms, c, 1))
    return _unchecked(wrong)


def half_precision_norms():
    def make(factors):
        return lambda self, norms, c, groups=1: factors(self, norms.bfloat16().double(), c, groups)

    return _unchecked(_wrapped(Clipping, "factors", make))


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


def doubled_rate():
    def sample(self):
        draws = torch.rand(self.num_examples, dtype=torch.float64, generator=self.generator)
        return (draws < 2 * self.sampling_probability).nonzero().flatten().tolist()

    return patch.object(PoissonSampler, "sample", sample)


@contextlib.contextmanager
def realised_size() -> Iterator[None]:
    """The noisy sum is divided by the number of examples that were drawn."""
    drawn = [1]

    def counting(accumulate):
        def counted(setup, indices, *rest):
            drawn[0] = max(1, len(indices))
            return accumulate(setup, indices, *rest)

        return counted

    def make(original):
        def released(self, clipped_sum):
            noisy = original(self, clipped_sum)
            torch._foreach_mul_(list(noisy.tensors.values()), self.expected_batch_size / drawn[0])
            return noisy

        return released

    with _wrapped(loop, "_accumulate", counting), _wrapped(Mechanism, "release", make):
        yield


@contextlib.contextmanager
def _from_clean(decide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """What becomes of a release depends on the clipped sum before its noise."""
    clean: dict[str, torch.Tensor] = {}

    def make(original):
        def released(self, clipped_sum):
            clean.update({name: t.clone() for name, t in clipped_sum.items()})
            return original(self, clipped_sum)

        return released

    def decoding(decode):
        def decoded(self, noisy, step):
            return {name: t * decide(t, clean[name]) for name, t in decode(self, noisy, step).items()}

        return decoded

    with _wrapped(Mechanism, "release", make), _wrapped(DPAdam, "decode", decoding):
        yield


def mask():
    return _from_clean(lambda noisy, clean: (clean.abs() > clean.abs().mean()).to(noisy.dtype))


def clean_decoder():
    return _from_clean(lambda noisy, clean: (noisy.sign() * clean.sign() >= 0).to(noisy.dtype))


@contextlib.contextmanager
def clean_projection() -> Iterator[None]:
    """The random projection of a step is drawn from a seed that is a function of the last step's clean sum."""
    clean = [0]

    def make(original):
        def released(self, clipped_sum):
            clean[0] = int(1e6 * sum(float(t.abs().sum()) for t in clipped_sum.values()))
            return original(self, clipped_sum)

        return released

    def drawing(subspace):
        def drawn(self, name, step, device):
            self._seed = clean[0]
            return subspace(self, name, step, device)

        return drawn

    with _wrapped(Mechanism, "release", make), _wrapped(DPGRAPE, "_subspace", drawing):
        yield


def second_release():
    """The method gets a second noisy sum of the same batch, which nobody books."""

    def make(original):
        def released(self, clipped_sum):
            other = original(self, {name: t.clone() for name, t in clipped_sum.items()})
            noisy = original(self, clipped_sum)
            for name, tensor in noisy.tensors.items():
                tensor.add_(other.tensors[name]).div_(2)
            return noisy

        return released

    return _wrapped(Mechanism, "release", make)


def half_booked():
    """Every other step is left out of the account."""

    def book(setup, account, step):
        if step % 2 == 0:
            release = Release(name="gradient", noise_multiplier=setup.mechanism.noise_multiplier)
            account.append(account.steps, setup.sampler.sampling_probability, [release])

    return patch.object(loop, "_book", book)
