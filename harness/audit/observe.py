"""One real training, seen by someone who knows every batch and every release: what was drawn, added and released."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from dpft.harness.audit.directions import Directions, joint
from dpft.harness.audit.listening import Counts, Heard, Listener, Step, counted, listening
from dpft.harness.audit.noise_notes import FEW, Noise, Notes
from dpft.harness.audit.subject import Question, aim, built, fingerprints, train
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.privacy import Ledger
from dpft.harness.privacy.strategy import coefficients
from dpft.harness.query.noisy_sum import NoisySum
from dpft.harness.runs.plan import PrivacyPlan
from dpft.harness.runs.releases import shares
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train.mechanism import BESIDE
from dpft.harness.train.parts import Run

KEPT = 1 << 28  # bytes of releases that are kept for the replays
FAR = 20.0  # clip norms: from there on a canary is one of those whose gradients are far above


@dataclass
class Observation:
    """What one run showed. n canaries, T steps that were taken. All releases of a step are seen side by side as one vector, each
    in its own bound and times the root of its share (see Directions): one sum of bound 1, one noise multiplier.

    Attributes:
        phases: [T], the number of the kind of step.
        empty: the step whose batch was made empty, which says nothing of the sampler.
        times: [T, n], how often each was looked at in the first pass of a step.
        strangers: the first step with a pass over others than were sampled, or None.
        batches, releases: how many were drawn and made in all.
        names: how often each release was made.
        declared: shares by name, of every planned step.
        events: what was booked.
        places: [n], the layer a canary aims at, -1 all of them.
        seen: [T, n], the releases times the expected batch size along what each canary is to add, less what the others add.
        expected: [T, n], of those who are in the batch: the squared length of what they are to add.
        norms: [T, n], of their gradients, in bounds, as known before the step's noise; zero where it does not ask for what they
            aim at.
        spread: [T, 3], the squared lengths of the sums of what is to be added by those far above the bound and in the batch, by
            the others in it, and by those absent.
        sampling_probability, noise_multiplier: of each step [T], as booked.
        noise: in units of it.
        eligible: [T, n], who may have been drawn, by the plan.
        lead: what of an example's gradient is in the row of its own step, once the noise of earlier steps is taken out: the rest
            is in the rows of the next ones. 1 where noise is not correlated.
        kept: releases for the replays, by step in their order, of the first steps.
        states: fingerprints after each step, and after the run's end.
    """

    spec: RunSpec
    privacy: PrivacyPlan
    phases: numpy.ndarray
    empty: int | None
    times: numpy.ndarray
    strangers: int | None
    batches: int
    releases: int
    names: Mapping[str, int]
    declared: list[dict[str, float]]
    events: list[dict[str, Any]]
    places: numpy.ndarray
    seen: numpy.ndarray
    expected: numpy.ndarray
    norms: numpy.ndarray
    spread: numpy.ndarray
    sampling_probability: float
    noise_multiplier: numpy.ndarray
    noise: Noise
    eligible: numpy.ndarray
    lead: float = 1.0
    kept: list[list[NoisySum]] = field(default_factory=list)
    states: list[dict[str, str]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def member(self) -> numpy.ndarray:
        """[T, n], who was in the batch."""
        return self.times > 0

    @property
    def sampled(self) -> numpy.ndarray:
        """[T], the steps whose batches are the sampler's."""
        return numpy.arange(self.steps) != (-1 if self.empty is None else self.empty)

    @property
    def together(self) -> int:
        """How many examples of who is protected a batch may hold, as booked."""
        return Ledger.from_events(self.events).sampling.together

    @property
    def far(self) -> numpy.ndarray:
        """[T, n], whose gradients are far above the clip norm: they add all of it when in the batch."""
        return self.norms >= FAR


@dataclass
class _Diary:
    """What is written down step by step. earlier: the noise of the last steps, the last one's first, where it is correlated."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {key: [] for key in _COLUMNS})
    noise: Notes = field(default_factory=Notes)
    kept: list[list[NoisySum]] = field(default_factory=list)
    bytes: int = 0
    strangers: int | None = None
    earlier: list[torch.Tensor] = field(default_factory=list)


_COLUMNS = ("times", "seen", "expected", "norms", "spread")


def observe(question: Question, progress: Callable[[int, int], None] = lambda done, of: None) -> Observation:
    """Run the method once with its noise. Raises BadInput for what cannot be audited, and for a run that stops itself."""
    spec = question.spec()
    privacy = question.plan(spec)
    diary, states, run = _Diary(), [], Run()
    with built(question, spec, privacy) as setup:
        if setup.mechanism.noise.mechanism != "gaussian":
            raise BadInput(
                f"The audit by canaries knows Gaussian noise, not {setup.mechanism.noise.mechanism!r}; use --one-run."
            )
        declared = [shares(setup.method, step) for step in range(spec.steps)]
        places, starts = aim(setup), setup.starts
        empty = _middle_of_the_longest(starts, spec.steps)
        made = counted(setup, empty)
        everyone = range(len(setup.prepared.train))
        listener = Listener(setup, run, lambda step: everyone)

        def after(step, row):
            _note(setup, diary, made, listener.taken())
            states.append(fingerprints(setup))
            progress(step, spec.steps)

        try:
            with listening(listener):
                train(setup, after, run)
        except CannotRun as reason:
            raise BadInput(f"The audited run stopped itself: {reason}") from None
        states.append(fingerprints(setup))
        steps = len(diary.columns["times"])
        eligible = torch.stack([setup.sampler.eligible(step) for step in range(steps)]).numpy()
    q, sigma = _booked(run.progress.ledger.events, steps)
    return Observation(
        spec=spec,
        privacy=privacy,
        phases=numpy.searchsorted(numpy.array(starts), numpy.arange(steps), side="right") - 1,
        empty=empty if empty is not None and empty < steps else None,
        strangers=diary.strangers,
        batches=made.batches,
        releases=made.releases,
        names=Counter(listener.names),
        declared=declared,
        events=run.progress.ledger.events,
        places=places.numpy(),
        sampling_probability=q,
        noise_multiplier=sigma,
        noise=diary.noise.collected(),
        eligible=eligible,
        lead=coefficients(spec.bands)[0],
        kept=diary.kept,
        states=states,
        **{key: numpy.stack(rows) for key, rows in diary.columns.items()},
    )


def _middle_of_the_longest(starts: tuple[int, ...], steps: int) -> int | None:
    """The step in the middle of the longest phase; None where no phase has more than two."""
    width, start = max((end - start, start) for start, end in zip(starts, (*starts[1:], steps), strict=True))
    return start + width // 2 if width > 2 else None


def _booked(events: list[dict[str, Any]], steps: int) -> tuple[float, numpy.ndarray]:
    """(sampling probability, noise multiplier [T] of all releases of a step); the last one for steps that nobody booked.

    Raises BadInput for several probabilities, and where nothing is booked.
    """
    rates = {event["sampling_probability"] for event in events}
    if len(rates) != 1:
        raise BadInput(
            f"The audit knows one sampling rate per run, and {len(rates)} were booked; audit with --one-run."
        )
    sigma = []
    for event in events:
        sigma += [event["noise_multiplier"]] * (event["step_to"] - event["step_from"])
    return rates.pop(), numpy.array(sigma[:steps] + sigma[-1:] * (steps - len(sigma)))


def _note(setup, diary: _Diary, made: Counts, step: Step) -> None:
    """Measure what one step released."""
    count, number = len(setup.prepared.train), len(diary.columns["times"])
    sampled = sorted(sum(made.sampled, []))
    made.sampled.clear()
    if diary.strangers is None and any(sorted(one) != sampled for one in step.passes):
        diary.strangers = number
    times = torch.zeros(count)
    for one in step.passes[:1] or [sampled]:
        times.index_add_(0, torch.tensor(one, dtype=torch.long), torch.ones(len(one)))
    nothing = torch.zeros(count, 0)  # a step may declare releases and ask for none
    parts = [(heard.rows, heard.weight) for heard in step.heard]
    found = joint(parts, step.norms) if parts else Directions(nothing, times * 0)
    flat = torch.cat([nothing[0], *(heard.flat * heard.weight for heard in step.heard)])
    # along a row as it is, not as a unit vector: where a second question follows the first answer, so does the row's length
    batch, expected = times @ found.rows, found.expected
    strategy = coefficients(setup.spec.bands)
    white = _whitened(flat - batch, diary.earlier, strategy)
    if len(strategy) > 1:
        flat = batch + white / strategy[0]
    others = found.rows @ batch - times * expected
    rows = {
        "times": times.to(torch.int64),
        "seen": (found.rows @ flat - others).double(),
        "expected": expected.double(),
        "norms": found.norms.double(),
        "spread": _spread(found.rows, found.norms, times > 0),
    }
    for key, value in rows.items():
        diary.columns[key].append(value.numpy())
    _note_noise(diary.noise, step.heard, times, white if len(strategy) > 1 else None)
    if diary.bytes < KEPT:
        diary.kept.append([heard.noisy for heard in step.heard])
        diary.bytes += sum(heard.flat.nbytes for heard in step.heard)


def _whitened(noise: torch.Tensor, earlier: list[torch.Tensor], strategy: tuple[float, ...]) -> torch.Tensor:
    """C w of one step, the independent draws that its noise w and that of the steps before were made of; `earlier` gets w."""
    if len(strategy) == 1:
        return noise
    earlier.insert(0, noise)
    del earlier[len(strategy) :]
    return sum(c * w for c, w in zip(strategy, earlier, strict=False))


def _note_noise(notes: Notes, heard: list[Heard], times: torch.Tensor, white: torch.Tensor | None = None) -> None:
    """What is left of each release where no canary of the batch is, in its own standard deviations. white: instead of it, where
    noise is correlated; it is of all coordinates, and what the batches add has been taken out."""
    sizes, entries, quiet = {}, [], []
    for one in heard:
        added, lone = times @ one.rows.rows, one.rows.rows[times > 0].abs().sum(0) == 0
        start, parts = 0, one.rows.parts
        for group in (sum(n for name, n in parts.items() if name != BESIDE), parts.get(BESIDE, 0)):
            own = slice(start, start + group)
            noise, still = one.flat[own], lone[own]
            if white is not None:
                noise, still = white[own], torch.ones_like(still)
            elif still.sum() < FEW:  # numbers, or an encoding that spreads every gradient over all coordinates
                noise, still = noise - added[own], torch.ones_like(still)
            entries.append(noise / one.noise_multiplier)
            quiet.append(still)
            start += group
        sizes |= {(one.name, name): size for name, size in parts.items()}
    nothing = torch.zeros(0)
    notes.add(sizes, torch.cat([nothing, *entries]), torch.cat([nothing.bool(), *quiet]))


def _spread(rows: torch.Tensor, norms: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Squared lengths of sums of rows: the variance of the sum of what is seen along them, in noise variances."""
    far = norms >= FAR
    groups = (member & far, member & ~far, ~member)
    return torch.stack([rows[group].sum(0).double().square().sum() for group in groups])
