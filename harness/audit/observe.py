"""One real training, seen by someone who knows every batch and every release: what was drawn, added and released."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from dpft.harness import loop
from dpft.harness.audit.subject import Question, aim, built, directions, train, watch
from dpft.harness.errors import BadInput
from dpft.harness.plan import PrivacyPlan
from dpft.harness.spec import RunSpec

SAMPLE = 512  # coordinates of each parameter whose noise is kept, to compare steps with each other
REPLAYED = 1 << 28  # bytes of releases that are kept for the replay


@dataclass
class Observation:
    """What one run showed. n canaries, T steps, P parameters.

    member: [T, n], who was in the batch; seen: [T, n], the release times the expected batch size along each canary's gradient, in
    units of the clip norm; places: [n], the layer a canary aims at, -1 all of them.
    sampling_probability, noise_multiplier [T]: of the gradient's release, as booked.
    squares, counts: [T, P], sum and number of squared noise entries (units of the booked std) where no example of the batch has
    a gradient. noise, quiet: [T, k], those entries at k coordinates that stay the same, and whether there was only noise.
    repeated: the share of the first step's noise entries that occur twice. events: what was booked; releases: how many were made.
    replayed: steps replayed without data; departed: the first after which the weights differ, or None.
    """

    spec: RunSpec
    privacy: PrivacyPlan
    places: numpy.ndarray
    sampling_probability: float
    noise_multiplier: numpy.ndarray
    member: numpy.ndarray
    seen: numpy.ndarray
    squares: numpy.ndarray
    counts: numpy.ndarray
    noise: numpy.ndarray
    quiet: numpy.ndarray
    repeated: float
    events: list[dict[str, Any]]
    releases: int
    replayed: int
    departed: int | None


@dataclass
class _Notes:
    """What is written down step by step."""

    member: list[numpy.ndarray] = field(default_factory=list)
    seen: list[numpy.ndarray] = field(default_factory=list)
    squares: list[list[float]] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    noise: list[numpy.ndarray] = field(default_factory=list)
    quiet: list[numpy.ndarray] = field(default_factory=list)
    releases: list[Any] = field(default_factory=list)
    weights: list[str | None] = field(default_factory=list)
    kept: int = 0
    repeated: float = 0.0


def observe(question: Question, progress: Callable[[int, int], None] = lambda done, of: None) -> Observation:
    """Run the method once with its noise, then once without data on the releases of the first run. Raises BadInput."""
    spec = question.spec()
    privacy = question.plan(spec)
    notes = _Notes()
    with built(question, spec, privacy) as setup:
        if setup.mechanism.noise.mechanism != "gaussian":
            raise BadInput(
                f"The audit by canaries knows Gaussian noise, not {setup.mechanism.noise.mechanism!r}; use --one-run."
            )
        if len(setup.method.phases()) > 1:
            raise BadInput(
                f"The audit by canaries follows one release shape, and {spec.method} has several phases; use --one-run."
            )
        places, picks = aim(setup), _Picks()
        made = watch(setup, lambda batch, noisy, step: _note(setup, notes, picks, batch, noisy, step))

        def after(step, row):
            notes.weights.append(_fingerprint(setup))
            progress(step, 2 * spec.steps)

        state = train(setup, after)
    departed = _replay(question, spec, privacy, notes, lambda step: progress(spec.steps + step, 2 * spec.steps))
    stacked = {
        key: numpy.stack(getattr(notes, key)) for key in ("member", "seen", "squares", "counts", "noise", "quiet")
    }
    q, sigma = _booked(state.ledger.events, len(notes.member))
    stacked["noise"] /= sigma[:, None]
    stacked["squares"] /= sigma[:, None] ** 2
    return Observation(
        spec=spec,
        privacy=privacy,
        places=places.numpy(),
        sampling_probability=q,
        noise_multiplier=sigma,
        repeated=notes.repeated,
        events=state.ledger.events,
        releases=made["releases"],
        replayed=len(notes.releases),
        departed=departed,
        **stacked,
    )


def _booked(events: list[dict[str, Any]], steps: int) -> tuple[float, numpy.ndarray]:
    """(sampling probability, noise multiplier [T] of the gradient's own release); the last one for steps that nobody booked.

    Raises BadInput for several probabilities.
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


class _Picks:
    """Up to SAMPLE coordinates of each parameter, the same in every step, by a generator of their own."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(20)
        self._chosen: dict[str, torch.Tensor] = {}

    def of(self, name: str, size: int) -> torch.Tensor:
        if name not in self._chosen:
            order = torch.randperm(size, generator=self._generator)
            self._chosen[name] = order[:SAMPLE]
        return self._chosen[name]


def _note(setup: loop.Setup, notes: _Notes, picks: _Picks, batch: list[int], noisy: Any, step: int) -> None:
    """Measure one release before it is decoded; it is left as it is."""
    count, clip_norm = len(setup.prepared.train), setup.spec.clip_norm
    units, norms = directions(setup, step, range(count))
    member = numpy.zeros(count, dtype=bool)
    member[batch] = True
    release = {name: t.detach().flatten() * setup.spec.batch_size for name, t in noisy.tensors.items()}
    flat = torch.cat(list(release.values())).to(units.dtype)
    along = (units @ flat) / clip_norm
    along -= _overlap(units, norms, torch.from_numpy(member), clip_norm)
    noise, free = flat / clip_norm, units[member].abs().sum(0) == 0
    if not notes.member:
        notes.repeated = 1 - len(noise[free].abs().unique()) / max(1, int(free.sum()))
    sizes = [len(t) for t in release.values()]
    parts = zip(noise.split(sizes), free.split(sizes), strict=True)
    notes.member.append(member)
    notes.seen.append(along.double().numpy())
    squares, counts, kept, quiet = [], [], [], []
    for name, (values, mask) in zip(release, parts, strict=True):
        squares.append(float(values[mask].double().square().sum()))
        counts.append(int(mask.sum()))
        chosen = picks.of(name, len(values))
        kept.append((values * mask)[chosen])
        quiet.append(mask[chosen])
    notes.squares.append(squares)
    notes.counts.append(counts)
    notes.noise.append(torch.cat(kept).numpy())
    notes.quiet.append(torch.cat(quiet).numpy())
    if notes.kept < REPLAYED:
        copy = dataclasses.replace(noisy, tensors={name: t.clone() for name, t in noisy.tensors.items()})
        notes.releases.append(copy)
        notes.kept += sum(t.nbytes for t in copy.tensors.values())


def _overlap(units: torch.Tensor, norms: torch.Tensor, member: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """What the others of the batch have along each direction, in units of the clip norm: zero where encodings keep them apart."""
    gram = units @ units[member].T
    gram[member.nonzero().flatten(), torch.arange(int(member.sum()))] = 0
    if not (gram.abs() > 1e-6).any():
        return torch.zeros(len(units), dtype=units.dtype)
    return gram @ (norms[member] / clip_norm).clamp_max(1.0)


def _fingerprint(setup: loop.Setup) -> str:
    digest = hashlib.sha256()
    for p in setup.prepared.model.parameters():
        digest.update(p.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Enough(Exception):
    """All releases that were kept have been replayed."""


class _Departed(Exception):
    """The weights of the replay differ."""


def _replay(question: Question, spec: RunSpec, privacy: PrivacyPlan, notes: _Notes, done) -> int | None:
    """Train again on empty batches, handing out the releases of the first run: weights that follow from them alone are equal,
    bit for bit. Returns the first step after which they are not."""
    releases, last = iter(notes.releases), 0
    with built(question, spec, privacy) as setup:
        aim(setup)
        setup.sampler.sample = lambda: []
        setup.mechanism.release = lambda total: next(releases)

        def compare(step, row):
            nonlocal last
            done(step)
            last = step
            if _fingerprint(setup) != notes.weights[step - 1]:
                raise _Departed
            if step == len(notes.releases):
                raise _Enough

        try:
            train(setup, compare)
        except _Enough:
            return None
        except _Departed:
            return last
        except Exception:  # what it looked for beside the release was not there
            return last + 1
    return None
