"""What a model is measured by: its metric on the validation split, and what it writes for a few fixed inputs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from dpft.harness.train.sampling import buckets, spread

if TYPE_CHECKING:
    from dpft.harness.train.loop import Setup, State


@torch.no_grad()
def evaluate(setup: Setup, state: State, examples: int | None) -> dict[str, float]:
    """The task's metrics on the validation split, or on `examples` of it, evenly spaced: splits may be sorted."""
    start = time.perf_counter()
    model, prepared = setup.prepared.model, setup.prepared
    metric = setup.task.make_metric()
    model.eval()
    size = len(prepared.validation)
    indices = spread(size, size if examples is None else examples)
    found = []
    for micro in buckets(indices, prepared.validation_lengths, setup.max_tokens * 2):
        batch = batch_of(setup, prepared.validation, micro)
        predictions, references = setup.task.predict(model, batch)
        found += zip(micro, predictions, references, strict=True)
    found.sort(key=lambda item: item[0])
    model.train()
    values = metric.compute(predictions=[p for _, p, _ in found], references=[r for _, _, r in found])
    state.eval_seconds += time.perf_counter() - start
    return {key: float(value) for key, value in values.items()}


def finish(setup: Setup, state: State) -> None:
    """The metrics of the trained model, those that are too dear for the curve among them, and its samples."""
    state.metrics = evaluate(setup, state, None)
    state.final = state.metrics[setup.task.metric]
    start = time.perf_counter()
    dear, state.definitions = setup.task.last_metrics(setup.prepared, setup.device)
    state.metrics |= dear
    state.samples["after"] = setup.task.samples(setup.prepared, setup.device)
    state.eval_seconds += time.perf_counter() - start


def batch_of(setup: Setup, examples, indices: list[int], step: int | None = None) -> dict[str, torch.Tensor]:
    """Those examples, padded to the longest of them, on the run's device; step: with their views of that training step."""
    chosen, views = [examples[i] for i in indices], setup.prepared.train_collate
    batch = setup.prepared.collate(chosen) if step is None or views is None else views(chosen, step)
    return {key: value.to(setup.device, non_blocking=True) for key, value in batch.items()}
