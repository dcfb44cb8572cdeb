"""The sections of a record, each from what a run has done."""

from __future__ import annotations

import statistics
from typing import Any

from dpft.harness.privacy import certify, units
from dpft.harness.probes import spectra
from dpft.harness.runs import registry
from dpft.harness.runs.plan import PrivacyPlan
from dpft.harness.runs.spec import RunSpec
from dpft.harness.statistics.thresholds import RULE, crossing
from dpft.harness.train import by_user
from dpft.harness.train.parts import MEMORY_STEPS, Cost, Progress, Run, Setup
from dpft.harness.train.settings import Settings
from dpft.tasks.base import Task


def privacy(
    spec: RunSpec, privacy_plan: PrivacyPlan | None, progress: Progress, settings: Settings, setup: Setup | None
) -> dict[str, Any] | None:
    """Target, ledger and certificate; None for a run without privacy, or one that never had a plan."""
    if privacy_plan is None or spec.epsilon is None:
        return None
    certificate = certify(progress.ledger.events, privacy_plan.delta, spec.epsilon, spec.noise_stream)
    reached = _crossing(spec, progress, setup)
    return {
        "target": spec.epsilon,
        "delta": privacy_plan.delta,
        **_unit(spec, privacy_plan),
        "adjacency": units.ADJACENCY[spec.unit],
        "sampling": privacy_plan.sampling.kind,
        "num_examples": privacy_plan.num_examples,
        "sampling_probability": privacy_plan.sampling_probability,
        "expected_batch_size": spec.batch_size,
        "mechanism": privacy_plan.noise.mechanism,
        "noise_multiplier": privacy_plan.noise_multiplier,
        **({} if spec.noise_stream == 1 else {"noise_stream": spec.noise_stream}),
        "noise_seed": "os" if settings.secure_noise else "seed of the run",
        "releases_per_step": progress.ledger.releases_per_step,
        "steps_planned": spec.steps,
        "steps_run": progress.ledger.steps,
        **({"steps_lost": progress.lost} if progress.lost else {}),
        "ledger": progress.ledger.events,
        **certificate,
        "epsilon_at_threshold": None
        if reached is None or reached.step is None
        else progress.curve[reached.step - 1]["epsilon"],
    }


def _unit(spec: RunSpec, privacy_plan: PrivacyPlan) -> dict[str, Any]:
    """What the section says of users, where one is the unit."""
    who = registry.task(spec.task)(spec.task_options).users
    return units.section(spec.unit, spec.user_sampling, spec.group_size, privacy_plan.sizes.users, who)


def _crossing(spec: RunSpec, progress: Progress, setup: Setup | None):
    evaluated = [(row["step"], row["metric"]) for row in progress.curve if row["metric"] is not None]
    if not evaluated:
        return None
    steps, values = zip(*evaluated, strict=True)
    task = registry.task(spec.task)
    return crossing(steps, values, _known("threshold", task, setup), task.higher_is_better)


def _known(fact: str, task: type[Task], setup: Setup) -> float | None:
    """`chance` or `threshold`: the task's, or what its data say."""
    return getattr(task, fact) if getattr(task, fact) is not None else getattr(setup.prepared, fact)


def result(spec: RunSpec, run: Run, setup: Setup) -> dict[str, Any]:
    """The metric at the end and on the way, of a run that is done."""
    task, reached, outcome = registry.task(spec.task), _crossing(spec, run.progress, setup), run.outcome
    chance = _known("chance", task, setup)
    rows = [row for row in run.progress.curve if row["metric"] is not None]
    pick = max if task.higher_is_better else min
    return {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "chance": chance if chance is not None else outcome.untrained,
        **({"chance_is": "the model before training"} if chance is None else {}),
        "final": outcome.final,
        "all_metrics": outcome.metrics,
        **({"definitions": outcome.definitions} if outcome.definitions else {}),
        **({"samples": outcome.samples} if any(outcome.samples.values()) else {}),
        "best_step": pick(rows, key=lambda row: row["metric"])["step"],
        "threshold": _known("threshold", task, setup),
        "steps_to_threshold": reached.step,
        "censored": reached.censored,
        "threshold_rule": RULE,
    }


def cost(spec: RunSpec, setup: Setup | None, spent: Cost, seconds: float) -> dict[str, Any]:
    """Times, memory, sizes."""
    steps = [sum(phases.values()) for phases in spent.step_seconds]
    timed = spent.step_seconds[MEMORY_STEPS:]
    processor = [seconds for seconds in spent.processor_seconds[MEMORY_STEPS:] if seconds is not None]
    phases = {key for row in timed for key in row}
    return {
        "total_s": seconds,
        "train_s": sum(steps),
        "eval_s": spent.eval_seconds,
        "warmup_s": sum(steps[:MEMORY_STEPS]),
        "step_s": statistics.median(steps[MEMORY_STEPS:]) if timed else None,
        "step_cpu_s": statistics.mean(processor) if processor else None,  # of all kinds of steps together
        "phase_s": {key: sum(row.get(key, 0.0) for row in timed) / len(timed) for key in sorted(phases)},
        "peak_bytes": dict(sorted(spent.peak_bytes.items())),
        "example_gradients": spec.batch_size * spec.steps,
        "trainable_parameters": _trains(setup, spent),
        "total_parameters": None if setup is None else sum(p.numel() for p in setup.prepared.model.parameters()),
    }


def _trains(setup: Setup | None, spent: Cost) -> int | None:
    """How many numbers train in the end: all that the last step could move."""
    if setup is None:
        return None
    return sum(p.numel() for p in setup.parameters.values()) if spent.trains is None else spent.trains


def diagnostics(run: Run) -> dict[str, Any]:
    """What was computed from clean gradients, for looking at: no part of it is private."""

    def mean(key: str) -> float | None:
        values = [row[key] for row in run.progress.curve if row[key] is not None]
        return sum(values) / len(values) if values else None

    found = run.diagnostics
    return {
        "private": False,
        "alignment": {"noisy": mean("alignment_noisy"), "decoded": mean("alignment_decoded"), "snr": mean("snr")},
        "alignment_by_parameter": spectra.shortened(found.alignment_by_parameter),
        "decoder_by_parameter": spectra.shortened(found.decoder_by_parameter),
        "spectra": found.spectra,
        "clipped_fraction": mean("clipped_fraction"),
        **({"selection": spectra.shortened(found.selection)} if found.selection else {}),
    }


def fingerprints(setup: Setup | None, files: str | None) -> dict[str, Any]:
    """What the run was made of."""
    prepared = setup.prepared if setup is not None else None
    return {
        "data_fingerprint": prepared.data_fingerprint if prepared else None,
        "model_fingerprint": prepared.model_fingerprint if prepared else None,
        "train_examples": sum(map(by_user.rows_of, prepared.train)) if prepared else None,
        "validation_examples": len(prepared.validation) if prepared else None,
        "model_files": files if prepared else None,  # of a local folder or file: told apart without loading it
        **({"public_examples": len(prepared.public)} if prepared and prepared.public else {}),
    }
