"""What a run asks of its engine, its model and its questions when a kind of step begins, around every pass and now and then.

It may end a run, and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dpft.harness import devices, probes
from dpft.harness.engine import agreement
from dpft.harness.engine.base import Batch, RunningSums
from dpft.harness.errors import CannotRun
from dpft.harness.query.queries import Gradients, Query, Seen, Values
from dpft.harness.train import buffers
from dpft.harness.train.batches import batch_of, grouped
from dpft.harness.train.core import Found, encodings_of
from dpft.harness.train.later import AT_ONCE, Later
from dpft.harness.train.parts import Run, Setup
from dpft.harness.train.row_sum import check_rows
from dpft.harness.train.sampling import spread


def rehearse(setup: Setup, run: Run, indices: Sequence[int], queries: dict[str, Query]) -> None:
    """Check the engine on examples of this step's batch (of the whole data where it has too few) before a kind of step begins."""
    if len(indices) < agreement.ROWS:
        indices = sorted({*indices, *spread(len(setup.prepared.train), agreement.ROWS)})
    few = [indices[i] for i in spread(len(indices), agreement.ROWS)]
    batch, alone = _together_and_alone(setup, few, run.progress.step)
    note_peak(setup, run)
    with setup.clock.stopped(), probes.uncounted():
        before = buffers.fingerprint(setup.prepared.model, _owners(setup))
        for name, query in queries.items():
            if isinstance(query, Gradients) and setup.engine.needs_per_example:
                _compare_once(setup, run, name, query, batch, alone)
        one_by_one(setup, queries, batch)
        changed = buffers.changed(before, setup.prepared.model, _owners(setup))
        _refuse([name for name in changed if not name.startswith("parameter")])  # weights were filled and emptied again
    if devices.is_card(setup.device):  # a later kind of step must not be measured by its check
        devices.of(setup.device).reset_peak_memory_stats(setup.device)


def _compare_once(setup: Setup, run: Run, name: str, query: Gradients, batch: Batch, alone: list[Batch]) -> None:
    """agreement.check, unless this process has made it for a run that differs in seed, rate and noise alone: layers are the same.

    `compare` looks at examples of every run.
    """
    alike = setup.spec.setting(with_noise=False)
    kind = f"{name} {run.progress.step} {setup.engine.name} {setup.device} {setup.max_tokens} {alike}"
    if setup.compared is not None and kind in setup.compared:
        setup.engine.agreed = True  # as `check` leaves it
        return
    with setup.engine.under(query.loss):
        encodings, bound = _encodings(setup, query), setup.core.bound(query)
        told = agreement.check(setup.engine, batch, encodings, bound, alone, _half(setup))
    if told and setup.compared is not None:
        setup.compared.add(kind)


def one_by_one(setup: Setup, queries: dict[str, Query], batch: Batch) -> None:
    """Raises CannotRun where the numbers of an example in `batch` are not those that it has by itself."""
    gradient = next((query for query in queries.values() if isinstance(query, Gradients)), None)
    asked = {name: query for name, query in queries.items() if isinstance(query, Values)}
    if gradient is not None and gradient.beside is not None:
        asked["beside"] = gradient.beside
    if not asked:
        return
    lengths = clipped = None
    losses = _losses(setup, batch)
    if gradient is not None and setup.engine.needs_per_example:
        bound, encodings = setup.core.bound(gradient), _encodings(setup, gradient)
        with setup.engine.under(gradient.loss):
            _, lengths = setup.engine.accumulate(batch, RunningSums(setup.parameters, encodings), bound, encodings)
        clipped = setup.engine.clipped(lengths, bound)
    for name, query in asked.items():
        points = len(getattr(query, "at", ()))
        # of points other losses, so that differences say something; they need not be those that the points would give
        seen = losses[:, None] * (1 + 0.1 * torch.arange(points, device=losses.device)) if points else losses
        whole = query.of(_seen(setup, batch, seen, lengths, clipped, slice(None)))
        check_rows(whole, len(losses), query.size, name)
        for i in range(len(losses)):
            one = query.of(_seen(setup, batch, seen, lengths, clipped, slice(i, i + 1)))
            check_rows(one, 1, query.size, name)
            a, b = (t.to_dense() if t.is_sparse else t for t in (one, whole))
            if not torch.allclose(a[0].double(), b[i].double(), rtol=1e-4, atol=1e-6, equal_nan=True):
                raise CannotRun(
                    f"The question {name!r} gives an example other numbers in its batch than alone, so they are not one "
                    "example's; let `of` treat each row by itself."
                )


def _losses(setup: Setup, batch: Batch) -> torch.Tensor:
    with torch.no_grad(), setup.engine.plain():
        return setup.engine.losses(batch).detach()


def _seen(setup: Setup, batch: Batch, losses, lengths, clipped, rows: slice) -> Seen:
    part = {key: value[rows] for key, value in batch.items()}
    lengths, clipped = (None if t is None else t[rows] for t in (lengths, clipped))
    return Seen(setup.prepared.model, part, lambda: losses[rows], lengths, clipped)


def _together_and_alone(setup: Setup, indices: list[int], step: int) -> tuple[Batch, list[Batch]]:
    """As many of the examples as fit into a microbatch: as one batch, and each as a batch without the padding of others."""
    first = next(grouped(setup, indices))
    return batch_of(setup, setup.prepared.train, first, step), [
        batch_of(setup, setup.prepared.train, [index], step) for index in first
    ]


@contextmanager
def unchanged(setup: Setup, step: int, later: Later = AT_ONCE) -> Iterator[None]:
    """Raises CannotRun where model, method, decoder or clipping rule hold something else after a private pass than before it."""
    if not setup.private:
        yield
        return
    weights = agreement.due(step, setup.starts)
    with setup.clock.stopped(), probes.uncounted():
        before = buffers.fingerprint(setup.prepared.model, _owners(setup), weights)
    yield
    with setup.clock.stopped(), probes.uncounted():
        buffers.tell(before, setup.prepared.model, _owners(setup), later, _refuse)


def _owners(setup: Setup) -> dict[str, Any]:
    """What a question's `of` or `loss` could keep something of the examples in, besides the model."""
    if not setup.private:
        return {}
    return {"method": setup.method, "decoder": setup.method.decoder, "clipping rule": setup.method.rule}


def compare(setup: Setup, run: Run, indices: Sequence[int], query: Gradients, found: Found) -> None:
    """Check now and then what a step has found of a few of its examples; found: in the order of the microbatches."""
    if not (indices and setup.engine.needs_per_example and setup.engine.batched):
        return
    step = run.progress.step
    if not agreement.due(step, setup.starts):
        return
    place = {index: i for i, index in enumerate(index for micro in grouped(setup, indices) for index in micro)}
    few = [indices[(i + step) % len(indices)] for i in spread(len(indices), agreement.LATER)]
    few = list(next(grouped(setup, few)))
    batch, alone = _together_and_alone(setup, few, step)
    at = [place[index] for index in few]
    losses, norms = torch.cat(found.losses)[at], torch.cat(found.norms)[at]
    note_peak(setup, run)
    with setup.clock.stopped(), probes.uncounted(), setup.engine.under(query.loss):
        encodings, bound = _encodings(setup, query), setup.core.bound(query)
        agreement.compare(setup.engine, batch, encodings, bound, alone, _half(setup), losses, norms)
    if devices.is_card(setup.device):
        devices.of(setup.device).reset_peak_memory_stats(setup.device)


def _encodings(setup: Setup, query: Gradients):
    return encodings_of(query, setup.parameters)


def note_peak(setup: Setup, run: Run) -> None:
    """The allocator's peak so far, where the device is a card."""
    if devices.is_card(setup.device):
        seen = devices.of(setup.device).max_memory_allocated(setup.device)
        run.cost.peak_bytes = {"allocated": max(seen, run.cost.peak_bytes.get("allocated", 0))}


def _half(setup: Setup) -> bool:
    dtypes = {p.dtype for p in setup.prepared.model.parameters()}
    return setup.spec.precision != "fp32" or bool(dtypes & {torch.bfloat16, torch.float16})


def _refuse(names: list[str]) -> None:
    if names:
        raise buffers.refusal(names)
