"""The one training loop: batches, questions, updates, evaluation. Where questions are answered, answer.py says."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from dpft.harness import devices, probes
from dpft.harness.engine import parted
from dpft.harness.errors import CannotRun, Diverged, Interrupted
from dpft.harness.query import updates
from dpft.harness.records import chain
from dpft.harness.runs.releases import shares
from dpft.harness.train import agreeing, buffers, guard, hooks, journal, resuming
from dpft.harness.train.answer import Answers
from dpft.harness.train.batches import microbatches
from dpft.harness.train.evaluation import evaluate, finish, samples
from dpft.harness.train.later import AT_ONCE, Later
from dpft.harness.train.parts import MEMORY_STEPS, OutOfTime, Run, Setup
from dpft.harness.train.watching import StepWatcher

Observer = Callable[[int, dict[str, Any]], None]


def train(setup: Setup, run: Run, observe: Observer) -> None:
    """Take `run` from where it is to the last step and evaluate; `run` stays usable when an exception ends it.

    Raises Diverged for a non-finite loss, gradient or update; OutOfTime after the deadline.
    """
    spec, progress = setup.spec, run.progress
    setup.method.rule.start(spec, setup.mechanism.noise_multiplier, setup.engine.members, setup.prepared.model)
    optimizer = setup.method.optimizer(setup.parameters, setup.head, spec)
    hooks.check_optimizer(setup.method, optimizer, setup.parameters, spec.lr)
    if setup.task.chance is None and setup.prepared.chance is None:
        run.outcome.untrained = evaluate(setup, run, spec.eval_examples)[setup.task.metric]
    progress.chain = chain.start(spec, setup.prepared.data_fingerprint, setup.prepared.model_fingerprint)
    if setup.checkpoint_path is not None:
        resuming.restore(setup, run, optimizer)
        _charge_lost(setup, run)
    if "before" not in run.outcome.samples:
        run.outcome.samples["before"] = samples(setup)
    agreeing.at_start(setup, run)
    saved = time.monotonic()
    setup.prepared.model.train()
    if setup.engine.needs_per_example:
        buffers.refuse_statistics(setup.prepared.model, setup.engine.batched)
    begun = progress.step
    while progress.step + progress.lost < spec.steps:
        if agreeing.late(setup):
            resuming.keep(setup, run, optimizer)
            raise OutOfTime(f"The run passed its time limit at step {progress.step} of {spec.steps}.")
        drawn = setup.ranks.share(setup.sampler.sample(), setup.prepared.train_lengths)
        row = _measured_step(setup, run, optimizer, drawn, begun)
        progress.step += 1
        agreeing.after_step(setup, run, row)
        if progress.step % spec.eval_every == 0 or progress.step + progress.lost == spec.steps:
            row["metric"] = evaluate(setup, run, spec.eval_examples)[setup.task.metric]
        progress.curve.append(row)
        progress.chain = chain.extended(progress.chain, progress.ledger.booked(progress.step - 1), row)
        try:
            observe(progress.step, row)
        except Interrupted:
            resuming.keep(setup, run, optimizer)
            raise
        if time.monotonic() - saved > setup.checkpoint_seconds:
            resuming.keep(setup, run, optimizer)
            saved = time.monotonic()
    if progress.curve[-1]["metric"] is None:  # a loss of releases made an earlier step the last
        progress.curve[-1]["metric"] = evaluate(setup, run, spec.eval_examples)[setup.task.metric]
    finish(setup, run)


def _measured_step(setup: Setup, run: Run, optimizer, indices: list[int], begun: int) -> dict[str, Any]:
    """One step, with live bytes counted over the first steps of a kind (CPU) or the allocator's peak (a card)."""
    live, step = None, run.progress.step
    if any(0 <= step - start < MEMORY_STEPS for start in setup.starts) and setup.device.type == "cpu":
        live = probes.LiveBytes(setup.clock)
        live.label("parameters", map(parted.held, setup.prepared.model.parameters()))
        live.label("parameters", setup.prepared.model.buffers())
        live.label("optimizer_state", setup.method.state_dict().values())
        live.label("optimizer_state", [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)])
    if devices.is_card(setup.device) and step == 0:
        devices.of(setup.device).reset_peak_memory_stats(setup.device)
    with live or nullcontext():
        row = _step(setup, run, optimizer, indices, begun)
    if live is not None and sum(live.peak.values()) > sum(run.cost.peak_bytes.values()):
        run.cost.peak_bytes = live.peak
    guard.note_peak(setup, run)
    run.cost.step_seconds.append(setup.clock.take())
    run.cost.processor_seconds.append(setup.clock.processor)
    return row


def _step(setup: Setup, run: Run, optimizer, indices: list[int], begun: int) -> dict[str, Any]:
    """The method asks and says where the weights go; they go there."""
    spec, step, lost = setup.spec, run.progress.step, run.progress.lost
    watcher = StepWatcher(setup, run, indices, checked=step == begun or step in setup.starts)
    declared = shares(setup.method, step)
    answers = Answers(
        setup.core,
        declared,
        lambda: microbatches(setup, indices, step),
        lambda: _book(setup, run, declared) if setup.private else None,
        watcher,
    )
    setup.method.decoder.observing = watcher.evaluated
    with watcher.later.explained():
        with setup.clock("decode"):
            update = setup.method.step(answers, step)
        answers.charge()
        setup.mechanism.stepped(setup.core.asker, step + 1)
        hooks.check_update(setup.method, update, setup.parameters)
        watcher.decoded(update)
        with setup.clock("optimizer"):
            _apply(setup, optimizer, update, step, watcher.later)
    found = watcher.row()
    return {
        "step": step + 1,
        "epsilon": setup.plan.epsilon_curve[step + lost + 1] if setup.private else None,
        "loss": found.pop("loss"),
        "metric": None,
        "lr": spec.lr * spec.lr_factor(step),
        **found,
    }


def _book(setup: Setup, run: Run, declared: dict[str, float]) -> None:
    """Charge a step's releases before their noise is drawn. Refuses a step outside the certified plan."""
    step, curve = run.progress.step + run.progress.lost, setup.plan.epsilon_curve
    if step >= setup.spec.steps or curve[step + 1] > setup.spec.epsilon:
        raise RuntimeError(f"Step {step} is outside the certified plan.")
    entries, sampler = setup.mechanism.entries(declared), setup.sampler
    run.progress.ledger.append(step, sampler.sampling_probability, entries, sampler.sampling)
    if setup.secure_noise and setup.checkpoint_path is not None and setup.ranks.first:
        journal.note(journal.path_of(setup.checkpoint_path))
        setup.witness()


def _charge_lost(setup: Setup, run: Run) -> None:
    """Book what an earlier process released after the checkpoint, with noise that cannot be drawn again: so many steps fewer."""
    if setup.secure_noise and setup.private:
        progress = run.progress
        made = journal.releases(journal.path_of(setup.checkpoint_path))
        first = progress.ledger.steps
        while progress.ledger.steps < made:  # what the method asked in the steps that it took after the checkpoint
            step = progress.step + progress.ledger.steps - first
            entries = setup.mechanism.entries(shares(setup.method, step))
            sampler = setup.sampler
            progress.ledger.append(progress.ledger.steps, sampler.sampling_probability, entries, sampler.sampling)
            progress.lost += 1
        if progress.lost:
            setup.note(
                f"{progress.lost} releases of this run were lost with a process that was killed; they are charged."
            )
        if progress.step == 0 and progress.lost >= setup.spec.steps:
            raise CannotRun(
                "All releases of this run were lost with the processes that made them; start it anew: --no-resume."
            )


def _refuse_infinite(finite: torch.Tensor) -> None:
    if not finite:
        raise Diverged("An update is not finite; lower lr or the clip norm.")


def _apply(setup: Setup, optimizer, update: updates.Updates, step: int, later: Later = AT_ONCE) -> None:
    """Hand the update to the optimizer at this step's learning rate."""
    if not update:
        return
    later.ask(updates.finite(update), _refuse_infinite)
    for group in optimizer.param_groups:
        group["lr"] = setup.spec.lr * group.get("lr_factor", 1.0) * setup.spec.lr_factor(step)
    updates.apply(optimizer, setup.parameters, update)
