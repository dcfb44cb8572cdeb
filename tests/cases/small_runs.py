"""Runs of four steps on the tiny BERT, for the tests that need the real loop."""

import contextlib
import dataclasses

import pytest

from dpft.harness.runs.resolve import resolve
from dpft.harness.train import guard, loop
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source
from dpft.harness.train.parts import Run

# of the command line, without data
TWO_STEPS = [
    "run",
    "--task",
    "low-rank",
    "--method",
    "dp-adam",
    "--steps",
    "2",
    "--batch-size",
    "256",
    "--epsilon",
    "2",
]
SIZE = dict(task="sst2", batch_size=60, steps=4, eval_every=2, epsilon=3.0, max_length=32)


def a_spec(method, tiny_bert, **more):
    return resolve({"method": method, "model": str(tiny_bert), **SIZE, **more})


def quiet(step, row):
    pass


def weights(setup):
    return {name: p.detach().clone() for name, p in setup.prepared.model.named_parameters()}


@contextlib.contextmanager
def unwatched():
    """No comparison with autograd and no count of live bytes: two thirds of a small run's time.

    They may end a run and change nothing in it. What a test finds without them it finds of the same numbers; but each
    configuration should have a run with them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "rehearse", lambda *_: None)
        patch.setattr(guard, "compare", lambda *_: None)
        patch.setattr(loop, "MEMORY_STEPS", 0)
        yield


@contextlib.contextmanager
def unevaluated():
    """No look at the validation split, for tests of what is released and of the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda setup, *_: {setup.task.metric: 0.0})
        patch.setattr(loop, "finish", lambda *_: None)
        yield


def trained(setup, observe=quiet, watched=True):
    made = Run()
    with contextlib.nullcontext() if watched else unwatched():
        loop.train(setup, made, observe)
    return made


def stopped(setup, at=3):
    """Train until step `at` is over, with a checkpoint after every step before it; then the process is interrupted."""

    def interrupt(step, row):
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(dataclasses.replace(setup, checkpoint_seconds=0.0), Run(), interrupt)


def silent(expected_batch_size=60, clip_norm=1.0):
    """A mechanism without noise: what it releases is the sum over the expected batch size."""
    return GaussianMechanism(0.0, clip_norm, expected_batch_size, source("cpu", 0))


def not_private(setup, **more):
    """The same run without noise, which has no epsilon."""
    plan = dataclasses.replace(setup.plan, epsilon_curve=None)
    return dataclasses.replace(setup, **{"mechanism": silent(setup.spec.batch_size), "plan": plan, **more})
