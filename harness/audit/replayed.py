"""The recorded releases handed out again: the run must end in the same state without data, whatever it does at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from dpft.harness.audit.listening import Listener, copied, listening, tensors_of
from dpft.harness.audit.noise_notes import picked
from dpft.harness.audit.observe import Observation
from dpft.harness.audit.subject import Question, aim, built, fingerprints, train
from dpft.harness.query.noisy_sum import NoisySum
from dpft.harness.train.mechanism import Mechanism
from dpft.harness.train.noise import source
from dpft.harness.train.parts import Run, Setup


@dataclass(frozen=True)
class Replay:
    """steps: how many were replayed; ended: whether the run's end was. departed: the first step after which the state differs,
    one more than there are steps for the end, None for none; held: what differs, `weights` or `buffers`."""

    steps: int
    ended: bool
    departed: int | None
    held: str


@dataclass
class Redrawn:
    """The noise of the run beside what its mechanism draws under another key, where neither holds anything else: by release and
    tensor, sums of products, of the squares of either, and number."""

    sums: dict[Any, numpy.ndarray] = field(default_factory=dict)

    def add(self, seen: Observation, step: int, release: str, fresh: NoisySum) -> None:
        """What was released in a step of the run, and what the mechanism makes of nothing in its place."""
        for name, tensor in tensors_of(fresh).items():
            key = seen.noise.key((release, name), tensor.numel())
            own = seen.noise.columns.get(key)
            if own is None:
                continue
            other = picked(tensor.detach().flatten().float(), seen.noise.picks[key]).astype(float)
            recorded, mask = seen.noise.kept[step, own].astype(float), seen.noise.quiet[step, own]
            found = numpy.array(
                [(recorded * other)[mask].sum(), (recorded**2)[mask].sum(), (other**2)[mask].sum(), mask.sum()]
            )
            self.sums[key[0]] = self.sums.get(key[0], 0.0) + found


class Enough(Exception):
    """All that is wanted of this run has been seen."""


class _Departed(Exception):
    """The state of the replay differs."""


def replay(
    question: Question, seen: Observation, progress: Callable[[int], None] = lambda done: None
) -> tuple[Replay, Redrawn]:
    """Train again on empty batches: a state that follows from the releases alone is the same, bit for bit.

    The mechanism has another key, and what it draws in passing is compared with the noise of the run.
    """
    last, held, run, redrawn = 0, "weights", Run(), Redrawn()

    def compare(expected: dict[str, str]) -> None:
        nonlocal held
        found = fingerprints(setup)
        different = [kind for kind in expected if found[kind] != expected[kind]]
        if different:
            held = different[0]
            raise _Departed

    def after(step, row):
        nonlocal last
        progress(step)
        last = step
        compare(seen.states[step - 1])
        if step == len(seen.kept) < seen.steps:
            raise Enough

    with built(question, seen.spec, seen.privacy) as setup:
        aim(setup)
        setup = dataclasses.replace(setup, mechanism=_rekeyed(setup, question))
        setup.sampler.sample = lambda: []
        original = setup.mechanism.release
        listener = _Redrawing(setup, run, seen, redrawn)
        hand_out(setup, run, seen, lambda *sums: listener.fresh.append(original(*sums)))
        try:
            with listening(listener):
                train(setup, after, run)
            last += 1
            compare(seen.states[-1])
        except Enough:
            return Replay(last, False, None, held), redrawn
        except _Departed:
            return Replay(min(last, seen.steps), False, last, held), redrawn
        except Exception:  # what it looked for beside the release was not there
            return Replay(last, False, last + 1, held), redrawn
        finally:
            setup.mechanism.close()
    return Replay(seen.steps, True, None, held), redrawn


class _Redrawing(Listener):
    """Notes what was drawn anew in place of each recorded release."""

    def __init__(self, setup: Setup, run: Run, seen: Observation, redrawn: Redrawn):
        super().__init__(setup, run)
        self._seen, self._redrawn, self.fresh = seen, redrawn, []

    def released(self, name: str, noisy: NoisySum) -> None:
        super().released(name, noisy)
        self._redrawn.add(self._seen, self._run.progress.step, name, self.fresh.pop())


def _rekeyed(setup: Setup, question: Question) -> Mechanism:
    """The run's mechanism with noise of another key."""
    other = source(setup.device, "audit", "another key", question.seed, version=setup.spec.noise_stream)
    own = setup.mechanism
    return Mechanism(own.noise, own.clip_norm, own.expected_batch_size, other)


def hand_out(
    setup: Setup,
    run: Run,
    seen: Observation,
    look: Callable[[dict[str, torch.Tensor], float | None, float], Any] = lambda clipped_sum, clip_norm, share: None,
) -> None:
    """Let the mechanism hand out copies of the recorded releases, those of a step in their order; `look` sees what it is given,
    and may change it."""
    handed = {"step": -1, "number": 0}

    def released(clipped_sum, clip_norm=None, share=1.0):
        if handed["step"] != run.progress.step:
            handed.update(step=run.progress.step, number=0)
        recorded = seen.kept[handed["step"]][handed["number"]]
        handed["number"] += 1
        look(clipped_sum, clip_norm, share)
        return copied(recorded)

    setup.mechanism.release = released
