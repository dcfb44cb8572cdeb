"""The whole trip of a batch: a step's questions become noisy sums here, and nowhere else.

    ask(name=query, ...)
      -> the clipping rule adds this step's bound, and what it asks for itself
      -> microbatches -> engine (gradients) or forward passes (numbers) -> rows per example -> clipped -> summed
      -> added to the sums of other processes, where several share the run (ranks.py)
      -> booked (all releases of the step, once) -> noise -> NoisySum

Training, bench, memory prediction, audit, replay and golden traces all run this code; who wants to look is a `Watcher`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dpft.harness.engine.base import Batch, RunningSums, Sums, zero_sums
from dpft.harness.engine.fakes import has_values
from dpft.harness.errors import BadInput, Diverged
from dpft.harness.query import fitting
from dpft.harness.query.noisy_sum import VALUES, NoisySum
from dpft.harness.query.queries import Gradients, Nothing, Query, Seen, Values, named
from dpft.harness.train import hooks
from dpft.harness.train.core import Core, Found, Watcher, encodings_of
from dpft.harness.train.mechanism import BESIDE
from dpft.harness.train.row_sum import Rows


class Answers:
    """The `ask` of one step; see harness/query/queries.py.

    batches: makes the step's microbatches, as often as asked. shares: of the budget, by name of what this step releases (the
    rule's own among them). book: charges all of them, called before the first noise is drawn.
    """

    def __init__(
        self,
        core: Core,
        shares: Mapping[str, float],
        batches: Callable[[], Iterable[Batch]],
        book: Callable[[], None] = lambda: None,
        watcher: Watcher | None = None,
    ):
        self._core, self._shares, self._batches, self._book = core, shares, batches, book
        self._watcher, self._asked, self.booked = watcher or Watcher(), set(), False

    def __call__(self, *unnamed: Query, **queries: Query) -> tuple[NoisySum, ...]:
        if unnamed or not queries:
            raise BadInput(
                f"{self._core.asker} asks for nothing by name; name each question, for example ask(gradient=Gradients())."
            )
        with self._core.clock(None):  # not the method's own time
            return self._answer(queries)

    def _answer(self, queries: Mapping[str, Query]) -> tuple[NoisySum, ...]:
        amended, more = dict(queries), {}
        gradient = queries.get("gradient")
        if isinstance(gradient, Gradients):
            amended["gradient"], more = self._amended(gradient)
        if clash := sorted(more.keys() & amended.keys()):
            raise BadInput(f"The method and the clipping rule both ask for {clash[0]!r}; rename one of them.")
        amended |= more
        self._admit(amended)
        self._core.mechanism.asked(self._core.asker, amended)
        self._watcher.asked(amended)
        with self._watcher.passing():
            sums, found = self._sums(amended)
        for name in amended:
            self._watcher.later.ask(found[name].finite, _refuse_infinite)
        self._core.ranks.add(sums[name] for name in amended)
        for name, query in amended.items():
            self._watcher.summed(name, query, sums[name], found[name])
        self.charge()
        answers = {name: self._release(name, query, sums[name]) for name, query in amended.items()}
        ruled = more or amended.get("gradient") is not gradient
        if ruled and all(map(has_values, answers["gradient"].tensors.values())):
            self._core.rule.learn(answers["gradient"], {name: answers[name] for name in more})
        return tuple(answers[name] for name in queries)

    def _amended(self, gradient: Gradients) -> tuple[Gradients, Mapping[str, Values]]:
        if gradient.bound is None:
            amended = self._core.rule.amend(gradient)
            hooks.check_amended(self._core.rule, amended)
            return amended
        if self._core.rule.adaptive:
            raise BadInput(
                "The method sets the bound of its gradients itself, so no clipping rule can; leave out clipping."
            )
        return gradient, {}

    def charge(self) -> None:
        """Book all releases of this step, those included that are never asked for."""
        if not self.booked:
            self._book()
            self.booked = True

    def _admit(self, queries: Mapping[str, Query]) -> None:
        asker = self._core.asker
        fitting.check(queries, self._core.parameters, asker)
        for name in queries:
            if name not in self._shares:
                raise BadInput(
                    f"{asker} asks for {name!r}, which `releases` does not declare for this step; declare it."
                )
            if name in self._asked:
                raise BadInput(f"{asker} asks for {name!r} twice in one step; declare a second name and its share.")
            self._asked.add(name)
        if len(named(queries, Gradients)) > 1:
            raise BadInput("One call of `ask` takes one question for gradients; ask the second in a call of its own.")

    def _sums(self, queries: Mapping[str, Query]) -> tuple[dict[str, Sums], dict[str, Found]]:
        """One pass for gradients and for numbers at the present weights, and one at every point of each other question."""
        found = {name: Found() for name in queries}
        sums: dict[str, Any] = {name: zero_sums(self._core.parameters, {}) for name in named(queries, Nothing)}
        here = {
            name: Rows(query.size, query.bound, self._core.device)
            for name, query in named(queries, Values).items()
            if not query.at
        }
        for name, query in named(queries, Values).items():
            if query.at:
                sums[name] = self._at_points(query, found[name])
        gradients = next(iter(named(queries, Gradients).items()), None)
        if gradients is not None:
            sums[gradients[0]] = self._gradients(*gradients, queries, here, found)
        elif here:
            for batch in self._batches():
                self._numbers(queries, here, found, Seen(self._core.model, batch, self._evaluation(batch)))
        return {**sums, **{name: {VALUES: rows.total()} for name, rows in here.items()}}, found

    def _gradients(self, name: str, query: Gradients, queries, here: dict[str, Rows], found: dict[str, Found]) -> Sums:
        core, mine = self._core, found[name]
        encodings = encodings_of(query, core.parameters)
        total, bound = RunningSums(core.parameters, encodings), core.bound(query)
        beside = Rows(query.beside.size, core.engine.ball(bound), core.device) if query.beside is not None else None
        with core.engine.under(query.loss):
            for batch in self._batches():
                losses, norms = core.engine.accumulate(batch, total, bound, encodings)
                mine.losses.append(losses)
                mine.norms.append(norms)
                if core.engine.needs_per_example:
                    mine.over.append(core.engine.overall(norms, bound) > core.engine.ball(bound))
                if beside is not None or here:
                    clipped = core.engine.clipped(norms, bound)
                    seen = Seen(core.model, batch, lambda losses=losses: losses, norms, clipped)
                    self._numbers(queries, here, found, seen)
                    if beside is not None:
                        room = (beside.bound**2 - clipped.double().square()).clamp_min(0).sqrt()
                        mine.beside.append(beside.add(query.beside.of(seen), len(losses), room))
        summed = total.complete()
        return summed if beside is None else {**summed, BESIDE: beside.total()}

    def _numbers(self, queries, here: dict[str, Rows], found: dict[str, Found], seen: Seen) -> None:
        size = len(next(iter(seen.batch.values())))
        for name, rows in here.items():
            norms = rows.add(queries[name].of(seen), size)
            found[name].norms.append(norms[:, None])
            found[name].over.append(norms > rows.bound * (1 + 1e-9))

    def _at_points(self, query: Values, found: Found) -> Sums:
        """Points outside, microbatches inside: at most one set of moved weights at a time, at the memory of inference."""
        rows, batches = Rows(query.size, query.bound, self._core.device), list(self._batches())
        losses = [[] for _ in batches]
        for point in query.at:
            with point():
                for own, batch in zip(losses, batches, strict=True):
                    own.append(self._evaluation(batch)())
        for own, batch in zip(losses, batches, strict=True):
            stacked = torch.stack(own, 1)
            seen = Seen(self._core.model, batch, lambda stacked=stacked: stacked)
            norms = rows.add(query.of(seen), len(stacked))
            found.losses.append(stacked.mean(1))
            found.norms.append(norms[:, None])
            found.over.append(norms > rows.bound * (1 + 1e-9))
        return {VALUES: rows.total()}

    def _evaluation(self, batch: Batch) -> Callable[[], torch.Tensor]:
        """Losses [b] without gradients, in evaluation mode."""

        def evaluate() -> torch.Tensor:
            core = self._core
            with torch.no_grad(), _evaluating(core.model), core.engine.plain(), core.clock("forward"):
                return core.engine.losses(batch).detach()

        return evaluate

    def _release(self, name: str, query: Query, total: Sums) -> NoisySum:
        bound = query.bound if isinstance(query, Values) else self._core.engine.ball(self._core.bound(query))
        with self._core.clock("noise"):
            noisy = self._core.mechanism.release(total, bound, self._shares[name])
        self._watcher.released(name, noisy)
        return noisy


def _refuse_infinite(finite: torch.Tensor) -> None:
    if not finite:
        raise Diverged("A training loss or gradient is not finite; lower lr, or look for broken examples.")


@contextmanager
def _evaluating(model: nn.Module):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
