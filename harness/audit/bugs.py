"""Known ways to get differential privacy wrong, each planted in the code that runs, to see what the audit says of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from dpft.harness import loop
from dpft.harness.audit.subject import MICROBATCH
from dpft.harness.engine.base import RunningSums
from dpft.harness.engine.clipping import Clipping
from dpft.harness.engine.factored import FactoredEngine
from dpft.harness.mechanism import GaussianMechanism
from dpft.harness.privacy import Release
from dpft.harness.sampling import PoissonSampler
from dpft.methods.full import DPAdam


@dataclass(frozen=True)
class Bug:
    """plant: a context in which the code has the bug; rings: the violation that must be found; changes: of the spec."""

    name: str
    about: str
    rings: str
    plant: Callable[[], contextlib.AbstractContextManager]
    changes: dict[str, Any] = field(default_factory=dict)


def _wrapped(owner: Any, name: str, make: Callable[[Callable], Callable]):
    """`owner.name` replaced by `make(original)` for as long as the context lasts."""
    return patch.object(owner, name, make(getattr(owner, name)))


def _scaled_noise(factor: Callable[[GaussianMechanism], float]):
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

    return _wrapped(GaussianMechanism, "release", make)


def _noise_over_batch():
    return _scaled_noise(lambda mechanism: 1 / mechanism.expected_batch_size)


def _half_the_variance():
    return _scaled_noise(lambda mechanism: 0.5**0.5)


@contextlib.contextmanager
def _noise_per_microbatch() -> Iterator[None]:
    """Every microbatch adds sigma C / sqrt(m), but for the last one, which is forgotten."""
    parts = [1]

    def make(accumulate):
        def counted(setup, indices, total, encodings):
            parts[0] = max(1, math.ceil(len(indices) / MICROBATCH))
            return accumulate(setup, indices, total, encodings)

        return counted

    with _wrapped(loop, "_accumulate", make), _scaled_noise(lambda mechanism: ((parts[0] - 1) / parts[0]) ** 0.5):
        yield


def _weights_only():
    """Vectors (biases, norms) are released without noise."""

    def make(original):
        def released(self, clipped_sum):
            plain = {n: t.clone() / self.expected_batch_size for n, t in clipped_sum.items() if t.dim() < 2}
            noisy = original(self, clipped_sum)
            noisy.tensors.update(plain)
            return noisy

        return released

    return _wrapped(GaussianMechanism, "release", make)


def _reseeded(within: bool):
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

    return _wrapped(GaussianMechanism, "release", make)


def _clip_after_sum():
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

    return _wrapped(FactoredEngine, "accumulate", make)


def _no_clip():
    def make(accumulate):
        return lambda self, batch, total, clip_norm, encodings: accumulate(self, batch, total, math.inf, encodings)

    return _wrapped(FactoredEngine, "accumulate", make)


def _layer_clip():
    """Every layer is clipped to C, not to C / sqrt(layers)."""
    return _wrapped(Clipping, "factors", lambda factors: lambda self, norms, c, groups=1: factors(self, norms, c, 1))


def _half_precision_norms():
    def make(factors):
        return lambda self, norms, c, groups=1: factors(self, norms.bfloat16().double(), c, groups)

    return _wrapped(Clipping, "factors", make)


def _shuffled():
    """Every epoch is cut into batches of the expected size; booked as Poisson."""

    def sample(self):
        size = round(self.num_examples * self.sampling_probability)
        left = getattr(self, "left", [])
        if len(left) < size:
            left = left + torch.randperm(self.num_examples, generator=self.generator).tolist()
        self.left = left[size:]
        return sorted(left[:size])

    return patch.object(PoissonSampler, "sample", sample)


def _fixed_size():
    """Batches of exactly the expected size, drawn anew each step."""

    def sample(self):
        size = round(self.num_examples * self.sampling_probability)
        return sorted(torch.randperm(self.num_examples, generator=self.generator)[:size].tolist())

    return patch.object(PoissonSampler, "sample", sample)


def _doubled_rate():
    def sample(self):
        draws = torch.rand(self.num_examples, dtype=torch.float64, generator=self.generator)
        return (draws < 2 * self.sampling_probability).nonzero().flatten().tolist()

    return patch.object(PoissonSampler, "sample", sample)


@contextlib.contextmanager
def _realised_size() -> Iterator[None]:
    """The noisy sum is divided by the number of examples that were drawn."""
    drawn = [1]

    def counting(accumulate):
        def counted(setup, indices, total, encodings):
            drawn[0] = max(1, len(indices))
            return accumulate(setup, indices, total, encodings)

        return counted

    def make(original):
        def released(self, clipped_sum):
            noisy = original(self, clipped_sum)
            torch._foreach_mul_(list(noisy.tensors.values()), self.expected_batch_size / drawn[0])
            return noisy

        return released

    with _wrapped(loop, "_accumulate", counting), _wrapped(GaussianMechanism, "release", make):
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

    with _wrapped(GaussianMechanism, "release", make), _wrapped(DPAdam, "decode", decoding):
        yield


def _mask():
    return _from_clean(lambda noisy, clean: (clean.abs() > clean.abs().mean()).to(noisy.dtype))


def _clean_decoder():
    return _from_clean(lambda noisy, clean: (noisy.sign() * clean.sign() >= 0).to(noisy.dtype))


def _second_release():
    """The method gets a second noisy sum of the same batch, which nobody books."""

    def make(original):
        def released(self, clipped_sum):
            other = original(self, {name: t.clone() for name, t in clipped_sum.items()})
            noisy = original(self, clipped_sum)
            for name, tensor in noisy.tensors.items():
                tensor.add_(other.tensors[name]).div_(2)
            return noisy

        return released

    return _wrapped(GaussianMechanism, "release", make)


def _half_booked():
    """Every other step is left out of the account."""

    def book(setup, account, step):
        if step % 2 == 0:
            release = Release(name="gradient", noise_multiplier=setup.mechanism.noise_multiplier)
            account.append(account.steps, setup.sampler.sampling_probability, [release])

    return patch.object(loop, "_book", book)


SMALL, FAR, REPEATED = "noise too small", "sensitivity exceeds the clip norm", "noise is repeated"
RATE, POISSON, LEAK = (
    "sampling rate is not the certified one",
    "sampling is not Poisson",
    "weights do not follow from the releases",
)
BUGS = (
    Bug("noise-over-batch", "sigma C / B is added to the sum", SMALL, _noise_over_batch),
    Bug("noise-root-two", "noise of half the variance", SMALL, _half_the_variance),
    Bug("microbatch-noise", "noise by microbatch, the last one forgotten", SMALL, _noise_per_microbatch),
    Bug("second-release", "two noisy sums of one batch, booked once", SMALL, _second_release),
    Bug("half-booked", "every other step is left out of the ledger", "releases that are not booked", _half_booked),
    Bug("vectors-without-noise", "biases and norms are released as they are", SMALL, _weights_only),
    Bug("noise-every-step", "the same noise in every step", REPEATED, lambda: _reseeded(False)),
    Bug("noise-every-tensor", "the same noise in every tensor", REPEATED, lambda: _reseeded(True)),
    Bug("no-clip", "nothing is clipped", FAR, _no_clip),
    Bug("clip-after-sum", "the sum of a microbatch is clipped", FAR, _clip_after_sum),
    Bug("layer-clip", "every layer is clipped to C", FAR, _layer_clip, {"clip_groups": "layer"}),
    Bug("bf16-norms", "norms are rounded to bfloat16", FAR, _half_precision_norms),
    Bug(
        "realised-size", "divided by the realised batch size", "noise depends on the step or the batch", _realised_size
    ),
    Bug("double-rate", "q is twice what is booked", RATE, _doubled_rate),
    Bug("shuffled", "shuffled epochs, booked as Poisson", POISSON, _shuffled),
    Bug("fixed-size", "batches of fixed size, booked as Poisson", POISSON, _fixed_size),
    Bug("clean-mask", "a mask chosen from clean gradients", LEAK, _mask),
    Bug("clean-decoder", "a decoder that sees clean gradients", LEAK, _clean_decoder),
)
