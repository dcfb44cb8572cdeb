"""What a model is measured by: its metric on the validation split, and what it writes for a few fixed inputs."""

from __future__ import annotations

import math
import time
from itertools import chain

import torch

from dpft.harness.errors import Diverged
from dpft.harness.train import hooks
from dpft.harness.train.batches import batch_of
from dpft.harness.train.parts import Run, Setup
from dpft.harness.train.sampling import buckets, spread


@torch.no_grad()
def evaluate(setup: Setup, run: Run, examples: int | None) -> dict[str, float]:
    """The task's metrics on the validation split, or on `examples` of it, evenly spaced: splits may be sorted."""
    start = time.perf_counter()
    model, prepared = setup.prepared.model, setup.prepared
    model.eval()
    size, lengths = len(prepared.validation), prepared.validation_lengths
    indices = setup.ranks.share(spread(size, size if examples is None else examples), lengths)
    found = []
    for micro in buckets(indices, lengths, setup.max_tokens * 2):
        batch = batch_of(setup, prepared.validation, micro)
        predictions, references = setup.task.predict(model, batch)
        hooks.check_predictions(setup.task, predictions, references, len(micro))
        found += zip(micro, predictions, references, strict=True)
    model.train()
    found = sorted(chain.from_iterable(setup.ranks.everyones(found)), key=lambda item: item[0])

    def of_all() -> dict[str, float]:
        values = setup.task.make_metric().compute(
            predictions=[p for _, p, _ in found], references=[r for _, _, r in found]
        )
        hooks.check_metrics(setup.task, values)
        return {key: float(value) for key, value in values.items()}

    values = setup.ranks.same(of_all)
    run.cost.eval_seconds += time.perf_counter() - start
    return values


def samples(setup: Setup) -> list[dict[str, str]]:
    """What the model writes, on the first rank."""
    return setup.ranks.same(lambda: setup.task.samples(setup.prepared, setup.device))


def finish(setup: Setup, run: Run) -> None:
    """The metrics of the trained model, those too dear for the curve among them, and its samples. Raises Diverged for one
    that is not finite."""
    run.outcome.metrics = evaluate(setup, run, None)
    run.outcome.final = run.outcome.metrics[setup.task.metric]
    start = time.perf_counter()
    dear, run.outcome.definitions = setup.ranks.same(lambda: setup.task.last_metrics(setup.prepared, setup.device))
    run.outcome.metrics |= dear
    for name, value in run.outcome.metrics.items():
        if not math.isfinite(value):
            raise Diverged(
                f"The {name} of the trained model is {value}, which says nothing; lower lr, or mend the metric."
            )
    run.outcome.samples["after"] = samples(setup)
    run.cost.eval_seconds += time.perf_counter() - start
