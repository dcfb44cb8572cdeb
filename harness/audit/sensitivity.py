"""How far one example moves a release: the same batch with and without it, noise off, in every phase of the run that was seen."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from dpft.harness.audit.directions import joint
from dpft.harness.audit.listening import Listener, flattened, listening
from dpft.harness.audit.observe import Observation
from dpft.harness.audit.replayed import Enough, hand_out
from dpft.harness.audit.subject import Question, aim, built, near_canaries, train
from dpft.harness.query.noisy_sum import NoisySum
from dpft.harness.train.parts import Run

PAIRS = 24  # neighbouring batches of each phase that has so many steps
LEAST = 8  # and of one that has fewer
ROUNDING = 2e-5  # of an fp32 sum of some tens of clipped rows, times the batch size and divided by it again
MATCH = 0.05  # clip norms: an engine in bf16 is off by one hundredth

Pair = tuple[
    list[int], list[int]
]  # the others, and those who come and go: one example, or all of one user's; ascending


@dataclass(frozen=True)
class Sensitivity:
    """worst: the largest distance of two neighbouring sums without noise, of one release or of all of a step side by side, in
    bounds, over as many examples of one user as the ledger says may come together; others: examples in that batch. off: the
    largest distance of what is added from what is to be added, in bounds; of: the largest gradient norm there, in bounds. pairs:
    how many were compared."""

    worst: float
    others: int
    off: float
    of: float
    pairs: int


def sensitivity(question: Question, seen: Observation) -> Sensitivity:
    """The largest of some neighbouring batches of every phase: from an empty one to about twice the expected size.

    Both batches of a pair meet the state that the audited run had in that step: the recorded releases are handed out again.
    Those who come and go have gradients of a tenth of the clip norm to far above. Where examples of users are sampled, every
    other time a user comes and goes, with all its examples.
    """
    found = []
    for pairs in _rounds(question, seen):
        batches = {step: others for step, (others, _) in pairs.items()}
        without, _ = _sums(question, seen, batches, {})
        more = {step: sorted([*others, *ones]) for step, (others, ones) in pairs.items()}
        with_it, wanted = _sums(question, seen, more, {step: ones for step, (_, ones) in pairs.items()})
        for step in sorted(without.keys() & with_it.keys()):
            (expected, norm), moved = wanted[step], []
            for (weight, before), (_, after) in zip(without[step], with_it[step], strict=True):
                moved.append((weight, after - before))
            whole = torch.cat([weight * part for weight, part in moved])
            allowed = min(len(pairs[step][1]), seen.together)
            worst = max(float(part.norm()) for part in (whole, *(part for _, part in moved))) / allowed
            found.append((worst, len(batches[step]), float((whole - expected).norm()), norm))
    if not found:
        return Sensitivity(0.0, 0, 0.0, 0.0, 0)
    far, off = max(found), max(found, key=lambda pair: pair[2])
    return Sensitivity(far[0], far[1], off[2], off[3], len(found))


def _rounds(question: Question, seen: Observation) -> list[dict[int, Pair]]:
    """Pairs by step, for as many replays as the shortest phase needs."""
    rng, count = random.Random(question.seed), question.records
    company = question.user_rows if count == question.canaries else 0  # of a user whose examples are sampled one by one
    near = near_canaries(count)
    rest = [i for i in range(count) if i not in near]
    order = [one for both in zip(_cycled(near, rng, count), _cycled(rest, rng, count), strict=True) for one in both]
    available = numpy.arange(min(seen.steps, len(seen.kept)))
    phases = [[int(step) for step in available if seen.phases[step] == phase] for phase in numpy.unique(seen.phases)]
    rounds: list[dict[int, Pair]] = []
    made = 0
    for steps in filter(None, phases):
        wanted = min(PAIRS, max(LEAST, len(steps)))
        for pair in range(wanted):
            number, place = divmod(pair, len(steps))
            rounds += [{}] * (number >= len(rounds))
            step = steps[place * len(steps) // min(wanted, len(steps))] if wanted <= len(steps) else steps[place]
            one = order[made % len(order)]
            size = min(count - 1, round(2 * seen.spec.batch_size * pair / wanted))
            whole = company if company and pair % 2 == 0 else 1
            ones = list(range(one // whole * whole, one // whole * whole + whole))
            others = sorted(rng.sample([i for i in range(count) if i not in ones], min(size, count - len(ones))))
            rounds[number] = {**rounds[number], step: (others, ones)}
            made += 1
    return rounds


def _cycled(canaries: list[int], rng: random.Random, count: int) -> list[int]:
    """`count` of them, each equally often, in random order; all norms come first."""
    return [one for _ in range(count // len(canaries) + 1) for one in rng.sample(canaries, len(canaries))][:count]


def _sums(
    question: Question, seen: Observation, batches: dict[int, list[int]], ones: dict[int, list[int]]
) -> tuple[dict[int, list[tuple[float, torch.Tensor]]], dict[int, tuple[torch.Tensor, float]]]:
    """By step, of those batches: the weight of each release, and it without noise times the expected batch size, in bounds
    (float64); and what `ones` are to add to all of them side by side, with the largest of their gradient norms, in bounds."""
    sums, added, run = {}, {}, Run()
    with built(question, seen.spec, seen.privacy) as setup:
        aim(setup)
        noiseless = _noiseless(setup.mechanism)
        steps = iter(range(seen.steps + 1))
        listener = _Noiseless(setup, run, lambda step: ones.get(step, []))

        def sampled() -> list[int]:
            step = next(steps)
            if step > max(batches):
                raise Enough
            return list(batches.get(step, []))

        def after(step, row) -> None:
            step, heard, clean = step - 1, listener.taken().heard, listener.taken_clean()
            if step not in batches or not heard:
                return
            size = seen.spec.batch_size
            sums[step] = [
                (one.weight, flattened(c).double() * (size / one.bound)) for one, c in zip(heard, clean, strict=True)
            ]
            if step in ones:
                found = joint([(one.rows, one.weight) for one in heard])
                added[step] = found.rows.double().sum(0), float(found.norms.max())

        setup.sampler.sample = sampled
        hand_out(setup, run, seen, lambda *given: listener.clean.append(noiseless(*given)))
        try:
            with listening(listener):
                train(setup, after, run)
        except Enough:
            pass
        except Exception:  # a run that does not follow from its releases may fail at any step; `replay` says so
            pass
    return sums, added


class _Noiseless(Listener):
    """Hears a run whose recorded releases are handed out; clean: what they would have been without noise."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.clean: list[NoisySum] = []

    def taken_clean(self) -> list[NoisySum]:
        """Those of the step that was taken last."""
        found, self.clean = self.clean, []
        return found


def _noiseless(mechanism: Any):
    """Its release with the noise turned off; what it says of itself to the loop, which books it, stays."""
    original, noise_multiplier = mechanism.release, mechanism.noise_multiplier

    def released(clipped_sum, clip_norm, share):
        mechanism.noise_multiplier = 0.0
        try:
            return original(clipped_sum, clip_norm, share)
        finally:
            mechanism.noise_multiplier = noise_multiplier

    return released
