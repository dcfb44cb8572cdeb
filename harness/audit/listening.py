"""How the audit listens to a training: at the one place where a step's questions are answered, and at the sampler."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from dpft.harness.audit.directions import Contributions, breath
from dpft.harness.audit.subject import canaries_of
from dpft.harness.privacy.shares import noise_multiplier
from dpft.harness.probes import uncounted
from dpft.harness.query.noisy_sum import NoisySum
from dpft.harness.query.queries import Gradients, Query, Values, named
from dpft.harness.train import loop
from dpft.harness.train.answer import Answers
from dpft.harness.train.core import Watcher
from dpft.harness.train.mechanism import BESIDE
from dpft.harness.train.parts import Run, Setup


@dataclass(frozen=True)
class Heard:
    """One release.

    Attributes:
        bound: of its question.
        noise_multiplier: its own, as booked.
        weight: the root of its share of the step; times it, all releases of a step have one noise and one bound side by side.
        rows: of the canaries, where they are noted.
        noisy: a copy.
    """

    name: str
    bound: float
    noise_multiplier: float
    weight: float
    rows: Contributions | None
    noisy: NoisySum

    @property
    def flat(self) -> torch.Tensor:
        """The noisy sum, in bounds, [coordinates]."""
        return flattened(self.noisy) * (self.noisy.expected_batch_size / self.bound)


@dataclass
class Step:
    """What was heard of one step. passes: who was looked at in each pass over the batch, in order. norms: [n], of the canaries'
    gradients before the step's first noise, in clip norms, where a later question may depend on it; or None."""

    passes: list[list[int]] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    norms: torch.Tensor | None = None


class Listener(Watcher):
    """Hears the questions and releases of a step. canaries: those whose rows are noted as questions are asked; none: no rows."""

    def __init__(self, setup: Setup, run: Run, canaries: Callable[[int], Sequence[int]] = lambda step: ()):
        self._setup, self._run, self._canaries = setup, run, canaries
        self._places = {own[0]: place for place, own in enumerate(canaries_of(setup))}
        self.step, self.names = Step(), Counter()
        self._shares: Mapping[str, float] = {}
        self._asked: dict[str, tuple[float, Contributions | None]] = {}

    def begun(self, shares: Mapping[str, float]) -> None:
        """A step is about to ask; shares: what it declared."""
        self._shares = shares

    def asked(self, queries: Mapping[str, Query]) -> None:
        canaries = self._canaries(self._run.progress.step)
        with uncounted():
            rows = breath(self._setup, queries, canaries) if canaries else {}
            more = self._shares.keys() - queries.keys()
            if canaries and more and not self._asked and not named(queries, Gradients):
                self.step.norms = breath(self._setup, {"gradient": Gradients()}, canaries)["gradient"].norms
        self._asked |= {name: (self._bound(query), rows.get(name)) for name, query in queries.items()}

    def released(self, name: str, noisy: NoisySum) -> None:
        self.names[name] += 1
        bound, rows = self._asked[name]
        own, whole = self._booked(name)
        self.step.heard.append(Heard(name, bound, own, whole / own, rows, copied(noisy)))

    def noted(self, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        """The microbatches of one pass, whose examples are noted."""
        looked: list[int] = []
        self.step.passes.append(looked)
        for batch in batches:
            looked += [self._places[one] for one in batch["canary"].view(len(batch["canary"]), -1)[:, 0].tolist()]
            yield batch

    def taken(self) -> Step:
        """What was heard since the last call."""
        step, self.step, self._asked = self.step, Step(), {}
        return step

    def _bound(self, query: Query) -> float:
        if isinstance(query, Values):
            return query.bound
        bound = getattr(query, "bound", None)
        if isinstance(bound, Mapping):
            return sum(c**2 for c in bound.values()) ** 0.5
        return self._setup.spec.clip_norm if bound is None else bound

    def _booked(self, name: str) -> tuple[float, float]:
        """Noise multipliers of a release and of its step, as booked last; of a release that nobody booked, as declared."""
        events = self._run.progress.ledger.events[-1:]
        whole = events[0]["noise_multiplier"] if events else self._setup.plan.noise_multiplier
        own = [r["noise_multiplier"] for event in events for r in event["releases"] if r["name"] == name]
        return own[0] if own else noise_multiplier(whole, self._shares[name]), whole


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Every step of a training is heard by `listener`, beside whoever looks on anyway."""

    class Heard(Answers):
        def __init__(self, core, shares, batches, book=lambda: None, watcher=None):
            listener.begun(shares)
            both = _Both(watcher or Watcher(), listener)
            super().__init__(core, shares, lambda: listener.noted(batches()), book, both)

    with patch.object(loop, "Answers", Heard):
        yield


class _Both(Watcher):
    """Two who look on."""

    def __init__(self, *watchers: Watcher):
        self._watchers, self.later = watchers, watchers[0].later

    def asked(self, queries):
        for one in self._watchers:
            one.asked(queries)

    def passing(self) -> AbstractContextManager[None]:
        stack = ExitStack()
        for one in self._watchers:
            stack.enter_context(one.passing())
        return stack

    def summed(self, name, query, total, found):
        for one in self._watchers:
            one.summed(name, query, total, found)

    def released(self, name, noisy):
        for one in self._watchers:
            one.released(name, noisy)


@dataclass
class Counts:
    """What a run did, from outside of it. sampled: the batches drawn since the last step; releases, batches: how many the
    mechanism made and the sampler drew in all."""

    sampled: list[list[int]] = field(default_factory=list)
    releases: int = 0
    batches: int = 0


def counted(setup: Setup, empty: int | None = None) -> Counts:
    """Count what sampler and mechanism are asked for, whoever asks. empty: the number of the draw, from 0, whose batch is
    replaced by an empty one; the sampler goes on as ever."""
    sample, original, made = setup.sampler.sample, setup.mechanism.release, Counts()

    def sampled() -> list[int]:
        drawn = list(sample())
        made.sampled.append([] if made.batches == empty else drawn)
        made.batches += 1
        return list(made.sampled[-1])

    def released(*arguments: Any, **more: Any) -> NoisySum:
        made.releases += 1
        return original(*arguments, **more)

    setup.sampler.sample, setup.mechanism.release = sampled, released
    return made


def tensors_of(noisy: NoisySum) -> dict[str, torch.Tensor]:
    """All that a release holds, by name, the numbers beside a gradient last."""
    return noisy.tensors if noisy.beside is None else {**noisy.tensors, BESIDE: noisy.beside}


def flattened(noisy: NoisySum) -> torch.Tensor:
    """Side by side, [coordinates]."""
    return torch.cat([t.detach().flatten().float() for t in tensors_of(noisy).values()])


def copied(noisy: NoisySum) -> NoisySum:
    """One that nobody else writes to."""
    beside = None if noisy.beside is None else noisy.beside.clone()
    return dataclasses.replace(noisy, tensors={name: t.clone() for name, t in noisy.tensors.items()}, beside=beside)
