"""What one run trains with, and what it has done so far: the sections of its record in the making."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dpft.harness.engine.base import Engine
from dpft.harness.plugins.contract import called
from dpft.harness.privacy import Ledger
from dpft.harness.probes import Clock
from dpft.harness.runs.plan import PrivacyPlan
from dpft.harness.runs.releases import kind_starts
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train.core import Core
from dpft.harness.train.mechanism import Mechanism
from dpft.harness.train.ranks import ALONE, Ranks
from dpft.harness.train.sampling import Sampler
from dpft.methods.base import Method
from dpft.tasks.base import Prepared, Task

MEMORY_STEPS = 2  # live bytes are counted over the first two steps of a kind: the second has the optimizer's state


class OutOfTime(Exception):
    """The run's deadline has passed."""


@dataclass(frozen=True)
class Setup:
    """What one run trains with.

    Attributes:
        plan: what it will spend: epsilon [upper] after 0..steps steps (None when not private), what is released when.
        parameters: what trains, by name.
        head: names of the task head's parameters, trained or not.
        matrices: parameters whose singular values are recorded.
        begun: when this process began with the run (time.perf_counter).
        secure_noise: no generator's state is written to disk, and a resumed run goes on with new entropy.
        note: told what the user should know, once each, with trouble=False where nothing went wrong.
        compared: kinds of steps that this process has held against autograd (guard.py), in other runs too; None: not remembered.
        witness: with secure_noise called before each release, beside the journal; raises where it cannot be counted.
        ranks: the processes that share the run.
    """

    spec: RunSpec
    plan: PrivacyPlan
    task: Task
    method: Method
    prepared: Prepared
    parameters: dict[str, torch.nn.Parameter]
    head: frozenset[str]
    engine: Engine
    clock: Clock
    sampler: Sampler
    mechanism: Mechanism
    device: torch.device
    max_tokens: int
    begun: float = field(default_factory=time.perf_counter)
    matrices: list[str] = field(default_factory=list)
    deadline: float | None = None
    checkpoint_path: Path | None = None
    checkpoint_seconds: float = 300.0
    secure_noise: bool = False
    note: Callable[..., None] = lambda text, trouble=True: None
    witness: Callable[[], None] = lambda: None
    compared: set[str] | None = None
    ranks: Ranks = ALONE

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The steps at which another kind of step begins."""
        return kind_starts(self.method)

    @property
    def private(self) -> bool:
        return self.plan.epsilon_curve is not None

    @property
    def core(self) -> Core:
        """What its questions are answered with."""
        clip_norm = self.spec.clip_norm if self.spec.clip_norm is not None else math.inf
        return Core(
            self.prepared.model,
            self.parameters,
            self.engine,
            self.mechanism,
            self.method.rule,
            clip_norm,
            self.clock,
            f"Method {called(self.method)}",
            self.ranks,
        )


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: steps trained.
        lost: releases that no training step used, because the process died after them (harness/train/journal.py).
        curve: a row a step.
        chain: harness/records/chain.py, after the steps so far.
        ledger: what was booked.
    """

    step: int = 0
    lost: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    chain: str = ""
    ledger: Ledger = field(default_factory=Ledger)


@dataclass
class Outcome:
    """The record's `result` in the making.

    Attributes:
        untrained: the metric before training, where neither the task nor its data say what chance is.
        final: the metric at the end.
        metrics: all of them, at the end.
        definitions: of metrics that are defined differently elsewhere.
        samples: texts before and after training.
    """

    untrained: float | None = None
    final: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)


@dataclass
class Cost:
    """The record's `cost` in the making.

    Attributes:
        earlier_seconds: what processes before this one spent on the run, up to the checkpoint that it goes on from.
        peak_bytes: by category, or the allocator's peak.
        step_seconds, processor_seconds: of every step; the first by phase.
        eval_seconds: of all evaluations.
        trains: how many numbers the last step could move; None: not known.
    """

    earlier_seconds: float = 0.0
    peak_bytes: dict[str, int] = field(default_factory=dict)
    step_seconds: list[dict[str, float]] = field(default_factory=list)
    processor_seconds: list[float | None] = field(default_factory=list)
    eval_seconds: float = 0.0
    trains: int | None = None


@dataclass
class Diagnostics:
    """The record's `diagnostics` in the making: from clean gradients, never fed back.

    Attributes:
        alignment_by_parameter, decoder_by_parameter, spectra: a row for each step that was looked at.
        row_scores: of clean sums, by matrix, for `selection` alone.
        selection: how many of the chosen rows clean scores would have chosen.
    """

    alignment_by_parameter: list[dict[str, Any]] = field(default_factory=list)
    decoder_by_parameter: list[dict[str, Any]] = field(default_factory=list)
    spectra: list[dict[str, Any]] = field(default_factory=list)
    row_scores: dict[str, list[float]] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """What a run has done so far; everything here and in the tensors of a checkpoint is restored on resume."""

    progress: Progress = field(default_factory=Progress)
    outcome: Outcome = field(default_factory=Outcome)
    cost: Cost = field(default_factory=Cost)
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
