"""Contexts in which clipping is wrong, each in one way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import torch

from dpft.harness.audit.patches import wrapped
from dpft.harness.engine.base import WEIGHTS, RunningSums
from dpft.harness.engine.clipping import Clipping
from dpft.harness.engine.factored import FactoredEngine
from dpft.harness.train.row_sum import Rows
from dpft.methods.clipping.quantile import Quantile


def no_clip():
    def make(accumulate):
        return lambda self, batch, total, clip_norm, encodings: accumulate(self, batch, total, math.inf, encodings)

    return wrapped(FactoredEngine, "accumulate", make)


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

    return wrapped(FactoredEngine, "accumulate", make)


def rows_of_users():
    """Each example of a user is clipped by itself, and all are added."""

    def make(accumulate):
        def clipped(self, batch, total, clip_norm, encodings):
            if WEIGHTS not in batch:
                return accumulate(self, batch, total, clip_norm, encodings)
            users, rows = batch[WEIGHTS].shape
            flat = {key: value.flatten(0, 1) for key, value in batch.items() if key != WEIGHTS}
            losses, norms = accumulate(self, flat, total, clip_norm, encodings)
            return losses.view(users, rows).mean(1), norms.view(users, rows, -1).mean(1)

        return clipped

    return wrapped(FactoredEngine, "accumulate", make)


def _factors(instead):
    """What an example is multiplied by is `instead(honest factors, norms [batch], C, groups)`."""

    def make(factors):
        return lambda self, norms, c, groups=1: instead(
            lambda n, bound, k: factors(self, n, bound, k), norms, c, groups
        )

    return wrapped(Clipping, "factors", make)


def layer_clip():
    """Every layer is clipped to C, not to C / sqrt(layers)."""
    return _factors(lambda factors, norms, c, groups: factors(norms, c, 1))


def half_precision_norms():
    return _factors(lambda factors, norms, c, groups: factors(norms.bfloat16().double(), c, groups))


def squared_norms():
    """The squared norm is compared with C."""
    return _factors(lambda factors, norms, c, groups: (c / norms.square().clamp_min(1e-30)).clamp_max(1.0))


def late_clip():
    """Only gradients above 10 C are clipped."""
    return _factors(
        lambda factors, norms, c, groups: torch.where(norms > 10 * c, factors(norms, c, groups), torch.ones_like(norms))
    )


def median_clip():
    """The bound is C or the median of the norms of the microbatch, whichever is less."""

    def instead(factors, norms, c, groups):
        return factors(norms, min(c, float(norms.median())) if len(norms) else c, groups)

    return _factors(instead)


@contextlib.contextmanager
def off_centre() -> Iterator[None]:
    """The count of gradients within the bound counts 1 or 0, with the noise of 1/2 or -1/2."""

    def amending(amend):
        def amended(self, gradient):
            found, more = amend(self, gradient)
            return found, {"count": replace(more["count"], of=lambda seen: more["count"].of(seen) + 0.5)}

        return amended

    with wrapped(Quantile, "amend", amending), _unclipped_rows():
        yield


def _unclipped_rows():
    """Rows of numbers are summed as they are."""
    return patch.object(Rows, "_factors", staticmethod(lambda norms, limit: torch.ones_like(norms)))


def scalars_by_themselves():
    """Each number of a row is clipped to the bound, not the row."""

    def make(add):
        def added(self, rows, count, bounds=None):
            own = rows.detach().clamp(-self.bound, self.bound) if bounds is None else rows
            with _unclipped_rows():
                return add(self, own, count, bounds)

        return added

    return wrapped(Rows, "add", make)
