"""How far one example moves a release: the same batch with and without it, noise off, through the loop itself."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from dpft.harness.audit.subject import Question, aim, built, silent, train, watch
from dpft.harness.plan import PrivacyPlan
from dpft.harness.spec import RunSpec

PAIRS = 16
ROUNDING = 2e-5  # of an fp32 sum of some tens of clipped rows, times the batch size and divided by it again


@dataclass(frozen=True)
class Sensitivity:
    """worst: the largest distance of two neighbouring sums without noise, in clip norms; others: examples in that batch."""

    worst: float
    others: int


def sensitivity(question: Question, spec: RunSpec, privacy: PrivacyPlan) -> Sensitivity:
    """The largest of PAIRS neighbouring batches: from an empty one to about twice the expected size.

    Both batches of a pair meet the same step, hence the same encodings; weights stay where they are.
    """
    rng = random.Random(question.seed)
    count = question.canaries
    order = rng.sample(range(count), count)
    batches, more = [], []
    for pair in range(PAIRS):
        one = order[pair % count]
        size = min(count - 1, round(2 * spec.batch_size * pair / PAIRS))
        others = sorted(rng.sample([i for i in range(count) if i != one], size))
        batches.append(others)
        more.append(sorted([*others, one]))
    without, with_it = (_sums(question, spec, privacy, chosen) for chosen in (batches, more))
    distances = [
        (float((a.double() - b.double()).norm()) / spec.clip_norm, len(others))
        for a, b, others in zip(with_it, without, batches, strict=True)
    ]
    return Sensitivity(*max(distances))


def _sums(question: Question, spec: RunSpec, privacy: PrivacyPlan, batches: list[list[int]]) -> list[torch.Tensor]:
    """The releases of those batches times the expected batch size, without noise."""
    still, plan = silent(spec, privacy, len(batches))
    found: list[torch.Tensor] = []

    def keep(batch, noisy, step):
        found.append(torch.cat([t.detach().flatten() for t in noisy.tensors.values()]) * spec.batch_size)
        return {name: torch.zeros_like(p) for name, p in setup.parameters.items()}

    with built(question, still, plan) as setup:
        aim(setup)
        _hush(setup.mechanism)
        left = iter(batches)
        setup.sampler.sample = lambda: next(left)
        watch(setup, keep)
        train(setup)
    return found


def _hush(mechanism: Any) -> None:
    """Make its releases noise-free; what it says of itself to the loop, which books it, stays."""
    original, noise_multiplier = mechanism.release, mechanism.noise_multiplier

    def released(clipped_sum):
        mechanism.noise_multiplier = 0.0
        try:
            return original(clipped_sum)
        finally:
            mechanism.noise_multiplier = noise_multiplier

    mechanism.release = released
