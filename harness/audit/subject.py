"""What is audited: a method on canaries, set up by the code that sets up its runs, and run by the loop of its runs."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from dpft.harness.audit.directions import first_lengths
from dpft.harness.errors import BadInput
from dpft.harness.runs.plan import PrivacyPlan, plan
from dpft.harness.runs.resolve import resolve
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import loop, run
from dpft.harness.train.parts import Run, Setup
from dpft.harness.train.settings import Settings

MICROBATCH = 4  # canaries per microbatch, so that a step has several
MOST = 256  # canaries of which every step's directions are computed
NEAR = (
    0.1,
    10.0,
)  # clip norms: a quarter of the canaries have gradients of such norms, where clipping makes a difference
# Settings that no certificate depends on, and with which there is something to see: of so few examples none would stand out.
SHOWN = {"dp-adafest": {"tau": 0.5}}


@dataclass(frozen=True)
class Question:
    """What is to be audited. epsilon, delta, steps T, sampling_rate q, canaries n: of the run; changes: other settings of the
    spec, as of `dpft run --set`; seed: of sampler, noise and model, so that an audit repeats exactly. Where the unit is a user,
    every `group_size` canaries are one.
    """

    method: str
    epsilon: float = 4.0
    delta: float = 1e-5
    steps: int = 200
    sampling_rate: float = 0.125
    canaries: int = 64
    seed: int = 0
    engine: str = "factored"
    changes: dict[str, Any] = field(default_factory=dict)

    def spec(self, **more: Any) -> RunSpec:
        """The run that is made. Raises BadInput for settings that cannot work and for methods without an epsilon."""
        if not 0 < self.sampling_rate <= 1:
            raise BadInput(f"The sampling rate must lie in (0, 1], not {self.sampling_rate}; correct it.")
        settings = {
            "task": "canaries",
            "model": f"canaries-{self.canaries}",
            "method": self.method,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "steps": self.steps,
            "eval_every": self.steps,
            "batch_size": max(1, round(self.sampling_rate * self.records)),
            "seed": self.seed,
            "user_rows": self.user_rows or None,
        }
        spec = resolve({**settings, **SHOWN.get(self.method, {}), **self.changes, **more})
        if spec.epsilon is None:
            raise BadInput(f"{self.method} is not private: there is no epsilon to audit; name a private method.")
        return spec

    @property
    def user_rows(self) -> int:
        """How many canaries a user has; 0 where there are no users. Raises BadInput where they cannot be dealt out."""
        rows = self.changes.get("group_size") if self.changes.get("unit") == "user" else 0
        if rows and (type(rows) is not int or rows < 0 or self.canaries % rows):
            raise BadInput(
                f"{self.canaries} canaries cannot be dealt out to users of {rows}; give --canaries a multiple of it."
            )
        return rows or 0

    @property
    def records(self) -> int:
        """How many training examples there are: canaries, or users where those are sampled whole."""
        whole = self.user_rows and self.changes.get("user_sampling", "uls") == "uls"
        return self.canaries // self.user_rows if whole else self.canaries

    def plan(self, spec: RunSpec) -> PrivacyPlan:
        """The budget of `spec`, calibrated as for a run on as many examples as there are canaries."""
        users = self.canaries // self.user_rows if self.user_rows else None
        return plan(spec, None, num_examples=self.canaries, num_users=users)


@contextlib.contextmanager
def built(question: Question, spec: RunSpec, privacy: PrivacyPlan) -> Iterator[Setup]:
    """The run as `dpft run` builds it, on microbatches of MICROBATCH canaries."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers are small
    setup = None
    try:
        setup = run.build(spec, Settings(engine=question.engine, max_tokens=MICROBATCH), privacy, None)
        yield setup
    except run.Skipped as reason:
        raise BadInput(f"{question.method} cannot be audited on the canaries' model: {reason}") from None
    finally:
        if setup is not None:
            setup.engine.close()
            setup.mechanism.close()
        torch.set_num_threads(threads)


def canaries_of(setup: Setup) -> list[list[int]]:
    """The numbers of the canaries of every training example: one each, or all of a user's where users are sampled whole."""
    return [[e["canary"] for e in (own if isinstance(own, list) else [own])] for own in setup.prepared.train]


def aim(setup: Setup) -> torch.Tensor:
    """Point a quarter of the examples at one trained layer each and the others at all; returns the layer [examples], -1: all.

    A layer trains when a parameter inside it does: adapters are inside the layer they adapt. A quarter, of those that aim at all
    layers, have gradients of norms evenly spread (in logarithm) over NEAR at the first step; the others are far above.
    """
    model = setup.prepared.model
    live = [i for i, site in enumerate(model.sites) if any(n.startswith(f"{site}.") for n in setup.parameters)]
    if not live:
        raise BadInput("The method trains none of the layers of the canaries' model, so nothing can be audited.")
    members = torch.tensor(canaries_of(setup))
    count = len(members)
    places = torch.full((count,), -1)
    if len(live) > 1:
        single = torch.arange(3, count, 4)
        places[single] = torch.tensor(live)[torch.arange(len(single)) % len(live)]
        only = torch.nn.functional.one_hot(places[single], len(model.sites)).to(model.aims.dtype)
        model.aims[members[single]] *= only[:, None]
    near = near_canaries(count)
    wanted = torch.logspace(*(math.log10(edge) for edge in NEAR), len(near), dtype=model.aims.dtype)
    model.aims[members[near]] *= (wanted / first_lengths(setup, near).clamp_min(1e-30))[:, None, None]
    return places


def near_canaries(count: int) -> list[int]:
    """Those of `count` canaries whose gradients are about as large as the clip norm, in the order of their norms."""
    return list(range(1, count, 4))


def train(setup: Setup, observe: loop.Observer | None = None, made: Run | None = None) -> Run:
    """The loop's own training, from its first step; made: what it has done, for those who look on."""
    made = Run() if made is None else made
    loop.train(setup, made, observe or (lambda step, row: None))
    return made


def fingerprints(setup: Setup) -> dict[str, str]:
    """SHA-256 of the model's parameters (`weights`) and of whatever else it holds (`buffers`, also those that are not saved)."""
    model = setup.prepared.model
    held = {
        "weights": list(model.named_parameters()),
        "buffers": [
            *model.named_buffers(),
            *((k, v) for k, v in model.state_dict().items() if k.endswith("_extra_state")),
        ],
    }
    return {kind: _digest(tensors) for kind, tensors in held.items()}


def _digest(tensors: list[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(name.encode())
        if torch.is_tensor(value):
            value = value.detach().contiguous().flatten().view(torch.uint8) if value.numel() else value.detach()
            digest.update(numpy.ascontiguousarray(value.numpy()).tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
