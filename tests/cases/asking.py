"""What a method asks in a step, what it makes of an answer, and what a run sums before its noise."""

import contextlib
import dataclasses

from small_runs import silent, trained, unevaluated

from dpft.harness.query.preview import first_questions as first
from dpft.harness.runs.releases import shares
from dpft.harness.train import core
from dpft.harness.train.answer import Answers
from dpft.harness.train.batches import microbatches

__all__ = ["Summed", "answered", "encodings_of", "first", "heard", "recorded"]


def encodings_of(method, parameters, step=0):
    """By parameter: the encodings of the gradient that is asked for first in a step."""
    return core.encodings_of(first(method, step)["gradient"], parameters)


def answered(method, step, *noisy):
    """What `method.step` makes of these releases, which its questions are answered with in their order."""
    left = list(noisy)
    update = method.step(lambda **queries: tuple(left.pop(0) for _ in queries), step)
    assert not left, "it asked for less than there is"
    return update


class Listening(core.Watcher):
    def __init__(self):
        self.queries = {}

    def asked(self, queries):
        self.queries |= queries


def heard(setup, step=0, indices=(0, 1, 2)):
    """All questions of a step by name, the rule's among them, answered without noise on a few examples."""
    setup.method.rule.start(setup.spec, setup.mechanism.noise_multiplier, setup.engine.members, setup.prepared.model)
    listening, some = Listening(), dataclasses.replace(setup.core, mechanism=silent(setup.spec.batch_size))
    declared = shares(setup.method, step)
    setup.method.step(Answers(some, declared, lambda: microbatches(setup, indices, step), watcher=listening), step)
    return listening.queries


@dataclasses.dataclass(frozen=True)
class Summed:
    """A clipped sum on its way to the noise: tensors by name; of which step, with which bound and share; what was answered."""

    step: int
    clean: dict
    bound: float
    share: float
    noisy: object


def copied(noisy):
    """A method may change what it gets in place."""
    beside = None if noisy.beside is None else noisy.beside.clone()
    return dataclasses.replace(noisy, tensors={n: t.clone() for n, t in noisy.tensors.items()}, beside=beside)


def recorded(setup, batches, answers=(), watched=True):
    """Train on these batches of indices, one a step; -> every clipped sum, in order, and the run.

    watched: as in small_runs.trained; an unwatched run is not evaluated either.
    answers: what another run has recorded; its noisy sums are handed out in place of this run's, so that both ask the same.
    """
    found, left, now = [], list(answers), [None]
    trains, release, own = setup.method.step, setup.mechanism.release, list(batches)

    def step(ask, number):
        now[0] = number
        return trains(ask, number)

    def releasing(total, bound, share):
        clean = {name: tensor.clone() for name, tensor in total.items()}
        noisy = copied(left.pop(0).noisy) if answers else release(total, bound, share)
        found.append(Summed(now[0], clean, bound, share, copied(noisy)))
        return noisy

    setup.method.step, setup.mechanism.release, setup.sampler.sample = step, releasing, lambda: own.pop(0)
    with contextlib.nullcontext() if watched else unevaluated():
        made = trained(setup, watched=watched)
    assert not left and not own
    return found, made
