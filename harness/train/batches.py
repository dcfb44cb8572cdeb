"""Batches of a run's examples, padded and on its device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch

from dpft.harness import padding
from dpft.harness.train import by_user
from dpft.harness.train.parts import Setup
from dpft.harness.train.sampling import buckets

Batch = dict[str, torch.Tensor]


def batch_of(setup: Setup, examples, indices: Sequence[int], step: int | None = None) -> Batch:
    """Those examples, padded to the longest of them, on the run's device; step: with their views of that training step."""
    chosen, views = [examples[i] for i in indices], setup.prepared.train_collate
    batch = setup.prepared.collate(chosen) if step is None or views is None else views(chosen, step)
    return padding.sent(batch, setup.device)


def microbatches(setup: Setup, indices: Sequence[int], step: int) -> Iterator[Batch]:
    """The logical batch `indices` of a training step, in microbatches of like length."""
    kept = setup.spec.options.get("features") == "kept"  # then a batch may take a pass through the encoder
    for micro in grouped(setup, indices):
        with setup.clock("features") if kept else nullcontext():
            batch = batch_of(setup, setup.prepared.train, micro, step)
        yield batch


def grouped(setup: Setup, indices: Sequence[int]) -> Iterator[list[int]]:
    """The indices of each microbatch; users with as many examples are together, so that no rows are made up."""
    alike: dict[int, list[int]] = {}
    for index in indices:
        alike.setdefault(by_user.rows_of(setup.prepared.train[index]), []).append(index)
    for _, own in sorted(alike.items()):
        yield from buckets(own, setup.prepared.train_lengths, setup.max_tokens)
