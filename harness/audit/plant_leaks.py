"""Contexts in which something beside the releases decides what the run ends with, each in one way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from dpft.harness.audit.patches import batches, released, touched, wrapped
from dpft.harness.query.queries import Gradients
from dpft.harness.train import loop
from dpft.methods.clipping.quantile import Quantile
from dpft.methods.full import DPAdam
from dpft.methods.grape import DPGRAPE
from dpft.methods.token_table import TableRows


@contextlib.contextmanager
def _from_clean(decide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """What becomes of a release depends on the clipped sum before its noise."""
    clean: dict[str, torch.Tensor] = {}

    def around(ask, mechanism, clipped_sum):
        clean.update({name: t.clone() for name, t in clipped_sum.items()})
        return ask(clipped_sum)

    def stepping(step_of):
        def stepped(self, ask, step):
            return {name: t * decide(t, clean[name]) for name, t in step_of(self, ask, step).items()}

        return stepped

    with released(around), wrapped(DPAdam, "step", stepping):
        yield


def mask():
    return _from_clean(lambda noisy, clean: (clean.abs() > clean.abs().mean()).to(noisy.dtype))


def clean_decoder():
    return _from_clean(lambda noisy, clean: (noisy.sign() * clean.sign() >= 0).to(noisy.dtype))


@contextlib.contextmanager
def clean_projection() -> Iterator[None]:
    """The random projection of a step is drawn from a seed that is a function of the last step's clean sum."""
    clean = [0]

    def around(ask, mechanism, clipped_sum):
        clean[0] = int(1e6 * sum(float(t.abs().sum()) for t in clipped_sum.values()))
        return ask(clipped_sum)

    def drawing(subspace):
        def drawn(self, name, step, device):
            self._seed = clean[0]
            return subspace(self, name, step, device)

        return drawn

    with released(around), wrapped(DPGRAPE, "_subspace", drawing):
        yield


@contextlib.contextmanager
def kept_losses() -> Iterator[None]:
    """The loss that the method asks for keeps what it saw, and the size of the next update follows it."""
    kept = [0.0]

    def wrapper(loss):
        def keeping(model, batch):
            losses = loss(model, batch)
            kept[0] = float(losses.detach().mean())
            return losses

        return keeping

    def stepping(step_of):
        def stepped(self, ask, step):
            (noisy,) = ask(gradient=Gradients(loss=wrapper))
            return {name: t * (1.0 if kept[0] > 0 else 0.5) for name, t in noisy.mean().items()}

        return stepped

    with wrapped(DPAdam, "step", stepping):
        yield


@contextlib.contextmanager
def kept_rows() -> Iterator[None]:
    """The closure that counts gradients within the bound keeps its rows, and the size of the next update follows them."""
    kept = [0.0]

    def amending(amend):
        def amended(self, gradient):
            found, more = amend(self, gradient)

            def of(seen):
                rows = more["count"].of(seen)
                kept[0] += float(rows.sum())
                return rows

            return found, {"count": replace(more["count"], of=of)}

        return amended

    def stepping(step_of):
        def stepped(self, ask, step):
            kept[0] = 0.0
            return {name: t * (1.0 + abs(kept[0])) for name, t in step_of(self, ask, step).items()}

        return stepped

    with wrapped(Quantile, "amend", amending), wrapped(DPAdam, "step", stepping):
        yield


@contextlib.contextmanager
def best_checkpoint() -> Iterator[None]:
    """At the end the weights of the step with the least training loss are put back."""
    best: list = []

    def measuring(step_of):
        def step(setup, run, *rest):
            row = step_of(setup, run, *rest)
            if row["loss"] is not None and (not best or row["loss"] < best[0]):
                best[:] = [row["loss"], [p.detach().clone() for p in setup.parameters.values()]]
            return row

        return step

    def ending(finish):
        def finished(setup, run):
            if best:
                with torch.no_grad():
                    for p, kept in zip(setup.parameters.values(), best[1], strict=True):
                        p.copy_(kept)
            best.clear()
            return finish(setup, run)

        return finished

    with wrapped(loop, "_measured_step", measuring), wrapped(loop, "finish", ending):
        yield


@contextlib.contextmanager
def membership_buffer() -> Iterator[None]:
    """A buffer of the trained model, which `state_dict` leaves out, counts who was in the batches."""
    turns: dict[int, int] = {}

    def count(indices):
        for index in indices:
            turns[index] = turns.get(index, 0) + 1

    def ending(finish):
        def finished(setup, run):
            seen = torch.zeros(len(setup.prepared.train))
            for index, number in turns.items():
                seen[index] = number
            turns.clear()
            setup.prepared.model.register_buffer("turns", seen, persistent=False)
            return finish(setup, run)

        return finished

    with batches(count), wrapped(loop, "finish", ending):
        yield


@contextlib.contextmanager
def untouched_rows_dropped() -> Iterator[None]:
    """Rows of the table that survive though nobody in the batch touched them are not asked for: their gradient is zero anyway."""
    this: dict = {}

    def dropping(train_rows):
        def trained(self, ask, rows, seen):
            return train_rows(self, ask, rows[this["touched"][rows] > 0], seen)

        return trained

    with touched(this), wrapped(TableRows, "train_rows", dropping):
        yield
