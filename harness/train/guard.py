"""What a run asks of its engine and its model before a phase and around a step: it may end a run, and changes nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from dpft.harness import probes
from dpft.harness.engine import agreement
from dpft.harness.engine.base import Batch
from dpft.harness.query.encoding import Encoding
from dpft.harness.train import buffers
from dpft.harness.train.evaluation import batch_of
from dpft.harness.train.sampling import buckets, spread

if TYPE_CHECKING:
    from dpft.harness.train.loop import Setup, State


def rehearse(setup: Setup, state: State, indices: list[int], encodings: dict[str, Encoding]) -> None:
    """Check the engine on examples of this step's batch (of the whole data where it has too few) before a phase begins."""
    if not setup.engine.needs_per_example:
        return
    if len(indices) < agreement.ROWS:
        indices = sorted({*indices, *spread(len(setup.prepared.train), agreement.ROWS)})
    few = [indices[i] for i in spread(len(indices), agreement.ROWS)]
    batch, alone = _together_and_alone(setup, few, state.step)
    before = buffers.fingerprint(setup.prepared.model)
    with setup.method.rehearsal():
        agreement.check(setup.engine, batch, encodings, clip_norm(setup), alone, _half(setup))
    # weights were filled and emptied again
    _refuse([name for name in buffers.changed(before, setup.prepared.model) if not name.startswith("parameter")])
    if setup.device.type == "cuda":  # a later phase must not be measured by its check
        torch.cuda.reset_peak_memory_stats(setup.device)
    setup.clock.take()


def _together_and_alone(setup: Setup, indices: list[int], step: int) -> tuple[Batch, list[Batch]]:
    """As many of the examples as fit into a microbatch: as one batch, and each as a batch without the padding of others."""
    first = next(buckets(indices, setup.prepared.train_lengths, setup.max_tokens))
    return batch_of(setup, setup.prepared.train, first, step), [
        batch_of(setup, setup.prepared.train, [index], step) for index in first
    ]


@contextmanager
def unchanged(setup: Setup, step: int) -> Iterator[None]:
    """Raises CannotRun where model or method hold something else after the gradients of a private step than before them."""
    if setup.epsilon_curve is None:
        yield
        return
    weights = agreement.due(step, setup.method.phases())
    with setup.clock.stopped(), probes.uncounted():
        before = buffers.fingerprint(setup.prepared.model, setup.method, weights)
    yield
    with setup.clock.stopped(), probes.uncounted():
        _refuse(buffers.changed(before, setup.prepared.model, setup.method))


def compare(setup: Setup, state: State, indices: list[int], encodings, losses, norms) -> None:
    """Check now and then what a step has found of a few of its examples; losses, norms: in the order of `_accumulate`."""
    if not (indices and setup.engine.needs_per_example and setup.engine.batched):
        return
    if not agreement.due(state.step, setup.method.phases()):
        return
    micros = buckets(indices, setup.prepared.train_lengths, setup.max_tokens)
    place = {index: i for i, index in enumerate(index for micro in micros for index in micro)}
    few = [indices[(i + state.step) % len(indices)] for i in spread(len(indices), agreement.LATER)]
    few = list(next(buckets(few, setup.prepared.train_lengths, setup.max_tokens)))
    batch, alone = _together_and_alone(setup, few, state.step)
    at = [place[index] for index in few]
    if setup.device.type == "cuda":
        note_peak(setup, state)
    with setup.clock.stopped(), probes.uncounted():
        agreement.compare(setup.engine, batch, encodings, clip_norm(setup), alone, _half(setup), losses[at], norms[at])
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setup.device)


def note_peak(setup: Setup, state: State) -> None:
    """The allocator's peak on a CUDA device so far."""
    seen = torch.cuda.max_memory_allocated(setup.device)
    state.peak_bytes = {"allocated": max(seen, state.peak_bytes.get("allocated", 0))}


def clip_norm(setup: Setup) -> float:
    """C, infinite where nothing is clipped."""
    return setup.spec.clip_norm if setup.spec.clip_norm is not None else math.inf


def _half(setup: Setup) -> bool:
    dtypes = {p.dtype for p in setup.prepared.model.parameters()}
    return setup.spec.precision != "fp32" or bool(dtypes & {torch.bfloat16, torch.float16})


def _refuse(names: list[str]) -> None:
    if names:
        raise buffers.refusal(names)
