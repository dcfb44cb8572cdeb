"""The black-box check: train once with half of the canaries in the data, then guess from the final losses which half."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dpft.harness.audit import guessing
from dpft.harness.audit.bounds import CONFIDENCE
from dpft.harness.audit.subject import Question, built, train
from dpft.harness.errors import BadInput, Diverged
from dpft.harness.privacy import certify
from dpft.harness.train.noise import stream

SHARES = (0.05, 0.125, 0.25, 0.5, 1.0)  # of the canaries that are guessed; the bounds pay for trying all of them
MOST = 2000


@dataclass(frozen=True)
class Guesses:
    """guesses made, the surest ones, and how many were right, with the two bounds they give."""

    guesses: int
    right: int
    epsilon_delta: float
    tradeoff: float | None


@dataclass(frozen=True)
class OneRun:
    """certificate: upper epsilon of what was booked; epsilon_delta, tradeoff: the best lower bounds of `tried` (2305.08846, and
    2410.22235 where noise is Gaussian and batches are Poisson's); ceiling: the most that the first could say of so many
    canaries."""

    question: Question
    certificate: float
    epsilon_delta: float
    tradeoff: float | None
    ceiling: float
    tried: list[Guesses]

    @property
    def bound(self) -> float:
        return max(self.epsilon_delta, self.tradeoff or 0.0)

    @property
    def verdict(self) -> str:
        return "VIOLATION: bound exceeds certificate" if self.bound > self.certificate else "consistent"

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self) | {"bound": self.bound, "verdict": self.verdict, "confidence": CONFIDENCE}


def one_run(question: Question, progress: Callable[[str, int, int], None] = lambda what, done, of: None) -> OneRun:
    """Audit a whole training by what it did to the losses of its canaries. Raises BadInput for what cannot be audited.

    A canary that is out is in no batch and adds nothing to any answer: zero-out neighbours. Score: how far its loss fell, over
    its magnitude.
    """
    if question.canaries > MOST:
        raise BadInput(f"--one-run takes at most {MOST} canaries, not {question.canaries}; take fewer.")
    spec = question.spec()
    if spec.unit != "example":
        raise BadInput(
            "--one-run guesses who was in the data example by example, and users have several; leave it out."
        )
    privacy = question.plan(spec)
    count = question.canaries
    inside = torch.rand(count, generator=stream("cpu", "one-run", question.seed)) < 0.5
    with built(question, spec, privacy) as setup:
        everyone, sample = setup.prepared.collate(setup.prepared.train), setup.sampler.sample
        setup.sampler.sample = lambda: [one for one in sample() if inside[one]]
        before = _losses(setup, everyone)
        try:
            run = train(setup, lambda step, row: progress("training", step, spec.steps))
        except Diverged as problem:
            raise BadInput(f"The audited run diverged ({str(problem).rstrip('.')}), so it shows nothing.") from None
        scores = (before - _losses(setup, everyone)) / setup.prepared.model.aims[:, -1]
        gaussian = setup.mechanism.noise.mechanism == "gaussian" and privacy.sampling.poisson
    certificate = certify(run.progress.ledger.events, spec.delta, spec.epsilon, spec.noise_stream)
    if certificate["epsilon"] is None:
        raise BadInput(f"The run has no certificate to audit: {certificate['error']}")
    order = torch.argsort(scores, descending=True)
    wrong = (1 - CONFIDENCE) / len(SHARES)
    tried = []
    for number, share in enumerate(SHARES):
        progress("bounds", number, len(SHARES))
        half = max(1, round(share * count / 2))
        right = int(inside[order[:half]].sum() + (~inside[order[count - half :]]).sum())
        plain = guessing.by_guesses(spec.delta, count, 2 * half, right, wrong)
        tradeoff = None
        if gaussian:
            turns = privacy.sampling.participations(spec.steps)
            own = (privacy.probability, privacy.noise_multiplier, turns, spec.delta, spec.epsilon)
            tradeoff = guessing.by_tradeoff(*own, count, 2 * half, right, wrong)
        tried.append(Guesses(2 * half, right, plain, tradeoff))
    progress("bounds", len(SHARES), len(SHARES))
    return OneRun(
        question=question,
        certificate=certificate["epsilon"][2],
        epsilon_delta=max(one.epsilon_delta for one in tried),
        tradeoff=max(one.tradeoff for one in tried) if gaussian else None,
        ceiling=guessing.ceiling(spec.delta, count, wrong),
        tried=tried,
    )


@torch.no_grad()
def _losses(setup, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return setup.task.loss(setup.prepared.model, batch).double()
