"""One real training, seen by someone who knows every batch and every release: what was drawn, added and released."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from dpft.harness.audit.directions import Directions, directions
from dpft.harness.audit.noise_notes import FEW, Noise, Notes
from dpft.harness.audit.subject import Question, Watched, aim, built, fingerprints, train, watch
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.runs.plan import PrivacyPlan
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import loop

KEPT = 1 << 28  # bytes of releases that are kept for the replays
FAR = 20.0  # clip norms: from there on a canary is one of those whose gradients are far above


@dataclass
class Observation:
    """What one run showed. n canaries, T steps that were taken.

    phases: [T], the number of the phase; empty: the step whose batch was made empty, which says nothing of the sampler.
    times: [T, n], how often each was trained in a step; strangers: the first step that did not train what was sampled, or None;
    batches, releases: how many were drawn and made in all; events: what was booked.
    places: [n], the layer a canary aims at, -1 all of them. seen: [T, n], the release times the expected batch size along each
    canary's gradient, less what the others add, in clip norms; expected: [T, n], of those who are in the batch; norms: [T, n],
    of their gradients, in clip norms, zero where a phase does not ask for what they aim at; spread: [T, 3], the squared lengths
    of the sums of the directions of those far above the clip norm and in the batch, of the others in it, and of those absent.
    sampling_probability, noise_multiplier [T]: of the gradient's release, as booked. noise: in units of it.
    kept: releases for the replays, of the first steps; states: fingerprints after each step, and after the run's end.
    """

    spec: RunSpec
    privacy: PrivacyPlan
    phases: numpy.ndarray
    empty: int | None
    times: numpy.ndarray
    strangers: int | None
    batches: int
    releases: int
    events: list[dict[str, Any]]
    places: numpy.ndarray
    seen: numpy.ndarray
    expected: numpy.ndarray
    norms: numpy.ndarray
    spread: numpy.ndarray
    sampling_probability: float
    noise_multiplier: numpy.ndarray
    noise: Noise
    kept: list[Any] = field(default_factory=list)
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
    def far(self) -> numpy.ndarray:
        """[T, n], whose gradients are far above the clip norm: they add all of it when in the batch."""
        return self.norms >= FAR


@dataclass
class _Diary:
    """What is written down step by step."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {key: [] for key in _COLUMNS})
    noise: Notes = field(default_factory=Notes)
    kept: list[Any] = field(default_factory=list)
    bytes: int = 0
    strangers: int | None = None


_COLUMNS = ("times", "seen", "expected", "norms", "spread")


def observe(question: Question, progress: Callable[[int, int], None] = lambda done, of: None) -> Observation:
    """Run the method once with its noise. Raises BadInput for what cannot be audited, and for a run that stops itself."""
    spec = question.spec()
    privacy = question.plan(spec)
    diary, states = _Diary(), []
    with built(question, spec, privacy) as setup:
        if setup.mechanism.noise.mechanism != "gaussian":
            raise BadInput(
                f"The audit by canaries knows Gaussian noise, not {setup.mechanism.noise.mechanism!r}; use --one-run."
            )
        places, starts = aim(setup), setup.method.phases()
        empty = _middle_of_the_longest(starts, spec.steps)
        made = watch(setup, lambda seen, noisy, step: _note(setup, diary, seen, noisy, step), empty)

        def after(step, row):
            states.append(fingerprints(setup))
            progress(step, spec.steps)

        try:
            state = train(setup, after)
        except CannotRun as reason:
            raise BadInput(f"The audited run stopped itself: {reason}") from None
        states.append(fingerprints(setup))
    steps = len(diary.columns["times"])
    q, sigma = _booked(state.ledger.events, steps)
    return Observation(
        spec=spec,
        privacy=privacy,
        phases=numpy.searchsorted(numpy.array(starts), numpy.arange(steps), side="right") - 1,
        empty=empty if empty is not None and empty < steps else None,
        strangers=diary.strangers,
        batches=made.batches,
        releases=made.releases,
        events=state.ledger.events,
        places=places.numpy(),
        sampling_probability=q,
        noise_multiplier=sigma,
        noise=diary.noise.collected().rescaled(privacy.noise_multiplier / sigma),
        kept=diary.kept,
        states=states,
        **{key: numpy.stack(rows) for key, rows in diary.columns.items()},
    )


def _middle_of_the_longest(starts: tuple[int, ...], steps: int) -> int | None:
    """The step in the middle of the longest phase; None where no phase has more than two."""
    width, start = max((end - start, start) for start, end in zip(starts, (*starts[1:], steps), strict=True))
    return start + width // 2 if width > 2 else None


def _booked(events: list[dict[str, Any]], steps: int) -> tuple[float, numpy.ndarray]:
    """(sampling probability, noise multiplier [T] of the gradient's own release); the last one for steps that nobody booked.

    Raises BadInput for several probabilities, and where nothing is booked.
    """
    rates = {event["sampling_probability"] for event in events}
    if len(rates) != 1:
        raise BadInput(
            f"The audit knows one sampling rate per run, and {len(rates)} were booked; audit with --one-run."
        )
    sigma = []
    for event in events:
        own = [r["noise_multiplier"] for r in event["releases"] if r["name"] == "gradient"]
        sigma += [own[0] if own else event["noise_multiplier"]] * (event["step_to"] - event["step_from"])
    return rates.pop(), numpy.array(sigma[:steps] + sigma[-1:] * (steps - len(sigma)))


def _note(setup: loop.Setup, diary: _Diary, watched: Watched, noisy: Any, step: int) -> None:
    """Measure one release before it is decoded; it is left as it is."""
    count, clip_norm, number = len(setup.prepared.train), setup.spec.clip_norm, len(diary.columns["times"])
    found = directions(setup, step, range(count))
    times = torch.zeros(count)
    times.index_add_(0, torch.tensor(watched.trained, dtype=torch.long), torch.ones(len(watched.trained)))
    if diary.strangers is None and sorted(watched.trained) != sorted(sum(watched.sampled, [])):
        diary.strangers = number
    flat = torch.cat([t.detach().flatten() for t in noisy.tensors.values()]).to(found.units.dtype)
    flat = flat * (setup.spec.batch_size / clip_norm)
    batch = times @ found.clipped
    expected = found.expected
    others = found.units @ batch - times * expected
    rows = {
        "times": times.to(torch.int64),
        "seen": (found.units @ flat - others).double(),
        "expected": expected.double(),
        "norms": found.norms.double(),
        "spread": _spread(found, times > 0),
    }
    for key, value in rows.items():
        diary.columns[key].append(value.numpy())
    quiet = found.units[times > 0].abs().sum(0) == 0
    if quiet.sum() < FEW:  # an encoding spreads every gradient over all coordinates
        flat, quiet = flat - batch, torch.ones_like(quiet)
    sizes = {name: t.numel() for name, t in noisy.tensors.items()}
    diary.noise.add(sizes, flat / setup.mechanism.noise_multiplier, quiet)
    if diary.bytes < KEPT:
        copy = dataclasses.replace(noisy, tensors={name: t.clone() for name, t in noisy.tensors.items()})
        diary.kept.append(copy)
        diary.bytes += sum(t.nbytes for t in copy.tensors.values())


def _spread(found: Directions, member: torch.Tensor) -> torch.Tensor:
    """Squared lengths of sums of directions: the variance of the sum of what is seen along them, in noise variances."""
    far = found.norms >= FAR
    groups = (member & far, member & ~far, ~member)
    return torch.stack([found.units[group].sum(0).double().square().sum() for group in groups])
