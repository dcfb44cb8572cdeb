"""The one training loop: the only caller of the noise mechanism and the only writer of the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpft.harness import probes
from dpft.harness.engine.base import Engine, RunningSums, Sums
from dpft.harness.errors import CannotRun, Diverged
from dpft.harness.privacy import Ledger
from dpft.harness.probes import spectra
from dpft.harness.query import updates
from dpft.harness.query.encoding import Encoding
from dpft.harness.records import chain
from dpft.harness.records.digest import digest
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import buffers, guard, journal, resuming
from dpft.harness.train.evaluation import batch_of, evaluate, finish
from dpft.harness.train.mechanism import Mechanism
from dpft.harness.train.sampling import PoissonSampler, buckets
from dpft.methods.base import Method
from dpft.tasks.base import Prepared, Task

MEMORY_STEPS = 2  # live bytes are counted over the first two steps of a phase: the second has the optimizer's state


class OutOfTime(Exception):
    """The run's deadline has passed."""


@dataclass(frozen=True)
class Setup:
    """What one run trains with.

    parameters: what trains, by name; head: names of the task head's parameters, trained or not; epsilon_curve:
    epsilon [upper] after 0..steps steps, None when not private; matrices: parameters whose singular values are recorded;
    secure_noise: no generator's state is written to disk, and a resumed run goes on with new entropy. note: told what the user
    should know, once each, with trouble=False where nothing went wrong.
    """

    spec: RunSpec
    task: Task
    method: Method
    prepared: Prepared
    parameters: dict[str, torch.nn.Parameter]
    head: frozenset[str]
    engine: Engine
    clock: probes.Clock
    sampler: PoissonSampler
    mechanism: Mechanism
    epsilon_curve: list[float] | None
    device: torch.device
    max_tokens: int
    matrices: list[str] = field(default_factory=list)
    deadline: float | None = None
    checkpoint_path: Path | None = None
    checkpoint_seconds: float = 300.0
    secure_noise: bool = False
    note: Callable[..., None] = lambda text, trouble=True: None


@dataclass
class State:
    """What a run has done so far; everything here and in the tensors of a checkpoint is restored on resume.

    lost: releases of this run that no training step used, because the process died after them (harness/train/journal.py).
    """

    step: int = 0
    lost: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    alignment_by_parameter: list[dict[str, Any]] = field(default_factory=list)
    decoder_by_parameter: list[dict[str, Any]] = field(default_factory=list)
    spectra: list[dict[str, Any]] = field(default_factory=list)
    row_scores: dict[str, list[float]] = field(default_factory=dict)  # of clean sums, for `selection` alone
    selection: dict[str, Any] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    step_seconds: list[dict[str, float]] = field(default_factory=list)
    eval_seconds: float = 0.0
    untrained: float | None = None  # the metric before training, where the task has no `chance`
    final: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=dict)  # of metrics that are defined differently elsewhere
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # before and after training
    chain: str = ""  # harness/records/chain.py, after the steps so far
    ledger: Ledger = field(default_factory=Ledger)


Observer = Callable[[int, dict[str, Any]], None]


def train(setup: Setup, state: State, observe: Observer) -> None:
    """Take `state` from where it is to the last step and evaluate; `state` stays usable when an exception ends it.

    Raises Diverged for a non-finite loss, gradient or update; OutOfTime after the deadline.
    """
    spec = setup.spec
    optimizer = setup.method.optimizer(setup.parameters, setup.head, spec)
    if setup.task.chance is None:
        state.untrained = evaluate(setup, state, spec.eval_examples)[setup.task.metric]
    state.chain = chain.start(spec, setup.prepared.data_fingerprint, setup.prepared.model_fingerprint)
    if setup.checkpoint_path is not None:
        resuming.restore(setup, state, optimizer)
        _charge_lost(setup, state)
    if "before" not in state.samples:
        state.samples["before"] = setup.task.samples(setup.prepared, setup.device)
    saved = time.monotonic()
    setup.prepared.model.train()
    if setup.engine.needs_per_example:
        buffers.refuse_statistics(setup.prepared.model, setup.engine.batched)
    begun = state.step
    while state.step + state.lost < spec.steps:
        if setup.deadline is not None and time.monotonic() > setup.deadline:
            resuming.keep(setup, state, optimizer)
            raise OutOfTime(f"The run passed its time limit at step {state.step} of {spec.steps}.")
        indices = setup.sampler.sample()
        if state.step == begun or state.step in setup.method.phases():
            guard.rehearse(setup, state, indices, _encodings(setup, state.step))
        row = _measured_step(setup, state, optimizer, indices)
        state.step += 1
        if state.step % spec.eval_every == 0 or state.step + state.lost == spec.steps:
            row["metric"] = evaluate(setup, state, spec.eval_examples)[setup.task.metric]
        state.curve.append(row)
        state.chain = chain.extended(state.chain, chain.booked(state.ledger.events, state.step - 1), row)
        observe(state.step, row)
        if time.monotonic() - saved > setup.checkpoint_seconds:
            resuming.keep(setup, state, optimizer)
            saved = time.monotonic()
    if state.curve[-1]["metric"] is None:  # a loss of releases made an earlier step the last
        state.curve[-1]["metric"] = evaluate(setup, state, spec.eval_examples)[setup.task.metric]
    finish(setup, state)


def _measured_step(setup: Setup, state: State, optimizer, indices: list[int]) -> dict[str, Any]:
    """One step, with live bytes counted over the first steps (CPU) or the allocator's peak (CUDA)."""
    live = None
    if any(0 <= state.step - start < MEMORY_STEPS for start in setup.method.phases()) and setup.device.type == "cpu":
        live = probes.LiveBytes(setup.clock)
        live.label("parameters", setup.prepared.model.parameters())
        live.label("parameters", setup.prepared.model.buffers())
        live.label("optimizer_state", setup.method.state_dict().values())
        live.label("optimizer_state", [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)])
    if setup.device.type == "cuda" and state.step == 0:
        torch.cuda.reset_peak_memory_stats(setup.device)
    with live or nullcontext():
        row = _step(setup, state, optimizer, indices)
    if live is not None and sum(live.peak.values()) > sum(state.peak_bytes.values()):
        state.peak_bytes = live.peak
    if setup.device.type == "cuda":
        guard.note_peak(setup, state)
    state.step_seconds.append(setup.clock.take())
    return row


def _step(setup: Setup, state: State, optimizer, indices: list[int]) -> dict[str, Any]:
    """Accumulate the clipped sum of the sampled examples over microbatches, release, decode, apply."""
    spec, clock, step = setup.spec, setup.clock, state.step
    encodings = _encodings(setup, step)
    sums = RunningSums(setup.parameters, encodings)
    with guard.unchanged(setup, step):
        losses, norms = _accumulate(setup, indices, step, sums, encodings)
    guard.compare(setup, state, indices, encodings, losses, norms)
    total = sums.complete()
    if setup.method.selects(step):
        probes.add_row_scores(state.row_scores, total)
    evaluated = (step + 1) % spec.eval_every == 0 or step + 1 == spec.steps
    probe = evaluated and setup.epsilon_curve is not None and setup.engine.needs_per_example
    wanted = setup.matrices if probe and step + 1 in spectra.steps(spec.steps, spec.eval_every) else []
    look = probes.Look(total, spec.batch_size, wanted) if probe else None
    if setup.epsilon_curve is not None:
        _book(setup, state.ledger, step + state.lost)
    with clock("noise"):
        noisy = setup.mechanism.release(total)
    released = digest(noisy.tensors) if setup.epsilon_curve is not None else None
    if look is not None:
        look.at_release(noisy)
    setup.method.decoder.observing = evaluated
    with clock("decode"):
        update = setup.method.decode(noisy, step)
    if look is not None:
        estimate, setup.method.decoder.estimate = setup.method.decoder.estimate, None
        look.at_update(update if estimate is None else estimate)
        state.alignment_by_parameter.append({"step": step + 1, **look.by_parameter})
        if look.spectra:
            state.spectra.append({"step": step + 1, "matrices": look.spectra})
    if state.row_scores and setup.method.chosen and not state.selection:
        state.selection = probes.overlap(state.row_scores, setup.method.chosen)
    with clock("optimizer"):
        _apply(setup, optimizer, update, step)
    if evaluated and setup.method.decoder.observed:  # functions of the release alone: this row costs no privacy
        state.decoder_by_parameter.append({"step": step + 1, **setup.method.decoder.observed})
    return {
        "step": step + 1,
        "epsilon": setup.epsilon_curve[step + state.lost + 1] if setup.epsilon_curve is not None else None,
        "loss": float(losses.mean()) if len(losses) and setup.method.query != "none" else None,
        "metric": None,
        "lr": spec.lr * spec.lr_factor(step),
        "clipped_fraction": float((setup.engine.overall(norms, spec.clip_norm) > spec.clip_norm).double().mean())
        if setup.engine.needs_per_example and len(norms)
        else None,
        **dict.fromkeys(("alignment_noisy", "alignment_decoded", "snr")),
        **(look.row if look is not None else {}),
        "release": released,
    }


def _encodings(setup: Setup, step: int) -> dict[str, Encoding]:
    found = {name: setup.method.encoding(name, p, step) for name, p in setup.parameters.items()}
    return {name: encoding for name, encoding in found.items() if encoding is not None}


def _accumulate(
    setup: Setup, indices: list[int], step: int, total: Sums, encodings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped sum of one logical batch, over microbatches of like length. Raises Diverged before any release."""
    losses, norms = [], []
    for micro in buckets(indices, setup.prepared.train_lengths, setup.max_tokens):
        batch = batch_of(setup, setup.prepared.train, micro, step)
        loss, norm = setup.engine.accumulate(batch, total, guard.clip_norm(setup), encodings)
        losses.append(loss)
        norms.append(norm)
    losses = torch.cat(losses) if losses else torch.zeros(0)
    norms = torch.cat(norms) if norms else torch.zeros(0, len(setup.engine.groups))
    if not (torch.isfinite(losses).all() and torch.isfinite(norms).all()):
        raise Diverged("A training loss or gradient is not finite; lower lr, or look for broken examples.")
    return losses, norms


def _book(setup: Setup, ledger: Ledger, step: int) -> None:
    """Charge release number `step` before its noise is drawn. Refuses one outside the certified plan."""
    if step >= setup.spec.steps or setup.epsilon_curve[step + 1] > setup.spec.epsilon:
        raise RuntimeError(f"Step {step} is outside the certified plan.")
    ledger.append(step, setup.sampler.sampling_probability, [setup.mechanism.noise.entry("gradient")])
    if setup.secure_noise and setup.checkpoint_path is not None:
        journal.note(journal.path_of(setup.checkpoint_path))


def _charge_lost(setup: Setup, state: State) -> None:
    """Book what an earlier process released after the checkpoint, with noise that cannot be drawn again: so many steps fewer."""
    if setup.secure_noise and setup.epsilon_curve is not None:
        made = journal.releases(journal.path_of(setup.checkpoint_path))
        while state.ledger.steps < made:
            entry = setup.mechanism.noise.entry("gradient")
            state.ledger.append(state.ledger.steps, setup.sampler.sampling_probability, [entry])
            state.lost += 1
        if state.lost:
            setup.note(f"{state.lost} releases of this run were lost with a process that was killed; they are charged.")
        if state.step == 0 and state.lost >= setup.spec.steps:
            raise CannotRun(
                "All releases of this run were lost with the processes that made them; start it anew: --no-resume."
            )


def _apply(setup: Setup, optimizer, update: updates.Updates, step: int) -> None:
    """Hand the update to the optimizer at this step's learning rate."""
    if not update:
        return
    if not updates.finite(update):
        raise Diverged("An update is not finite; lower lr or the clip norm.")
    for group in optimizer.param_groups:
        group["lr"] = setup.spec.lr * group.get("lr_factor", 1.0) * setup.spec.lr_factor(step)
    updates.apply(optimizer, setup.parameters, update)
