"""dpft check: planted regressions are caught, clean changes are not, and what cannot be compared is named."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest
from scipy import stats

from dpft.harness import cli, mechanism, registry, spec
from dpft.harness.engine.clipping import Clipping
from dpft.harness.regression import baseline, gate, golden
from dpft.harness.store import Store
from dpft.methods.decoders import spectral

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = tuple(range(10))
SIZE = dict(task="low-rank", optimizer="sgd", lr=1.0, batch_size=1024, steps=8, eval_every=4, eval_examples=64, clip_norm=2.0)
METHODS = ("dp-sgd", "rmt")


@pytest.fixture(scope="module", autouse=True)
def load_once():
    """The pairs of the task are drawn once for all runs of this file; the data are the task's own."""
    cls, patch = registry.task("low-rank"), pytest.MonkeyPatch()
    patch.setattr(cls, "load", functools.cache(cls.load))
    patch.setattr(registry.task("low-rank"), "load", lambda self, folder, load=cls().load(None): load)
    yield
    patch.undo()


def too_much_noise(patch):
    real = mechanism._add_noise
    patch.setattr(mechanism, "_add_noise", lambda work: real((*work[:2], 1.2 * work[2], work[3])))


def half_the_clip_norm(patch):
    real = Clipping.factors
    patch.setattr(Clipping, "factors", lambda self, norms, clip, groups=1: real(self, norms, clip / 2, groups))


def misplaced_root(patch):
    """sqrt(t^2) - sqrt(4 s^4 mn) for sqrt(t^2 - 4 s^4 mn), in the shrinker of rmt."""

    def unbiased(y, m, n, s):
        t = y**2 - s**2 * (m + n)
        r = ((t**2) ** 0.5 - (4 * s**4 * m * n) ** 0.5).clamp(min=spectral._TINY)
        return y >= spectral.bulk_edge(m, n, s), t, r, ((t + r) / 2).clamp(min=spectral._TINY) ** 0.5

    patch.setattr(spectral, "_unbiased", unbiased)


PLANTS = {"dp-sgd": (too_much_noise, half_the_clip_norm), "rmt": (misplaced_root,)}
