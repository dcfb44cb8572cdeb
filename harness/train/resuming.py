"""A run that was cut short and goes on: what its checkpoint holds."""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dpft.harness.engine.base import Sums
from dpft.harness.privacy import Ledger
from dpft.harness.train import buffers, checkpoint
from dpft.harness.train.parts import Run, Setup

ROOT = Path(__file__).absolute().parents[2]
# folders whose code decides what a step does
COMPUTING = (*(f"harness/{room}" for room in ("engine", "privacy", "probes", "query", "train")), "methods", "tasks")


def keep(setup: Setup, run: Run, optimizer) -> None:
    """Write a checkpoint where one is wanted; a run is worth more than its checkpoint, so a full disk is no failure."""
    if setup.checkpoint_path is not None and setup.ranks.first:
        try:
            _save(setup, run, optimizer)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "out of memory"
            setup.note(f"No checkpoint can be written ({reason}); the run goes on without.")


def _save(setup: Setup, run: Run, optimizer) -> None:
    tensors = {f"parameter|{name}": p for name, p in setup.parameters.items()}
    tensors |= {f"optimizer|{k}": t for k, t in checkpoint.optimizer_tensors(optimizer, setup.parameters).items()}
    tensors |= {f"method|{k}": t for k, t in setup.method.state_dict().items()}
    tensors |= {f"rule|{k}": t for k, t in setup.method.rule.state_dict().items()}
    tensors |= {f"buffer|{k}": t for k, t in buffers.tensors(setup.prepared.model).items()}
    if not setup.secure_noise:
        tensors["sampler"] = setup.sampler.state()
        tensors["noise"] = setup.mechanism.state()
        tensors |= {f"earlier|{k}": t for k, t in setup.mechanism.kept().items()}
    plain = {section: dict(vars(held)) for section, held in vars(run).items()}
    plain["progress"]["ledger"] = run.progress.ledger.events
    plain["cost"]["earlier_seconds"] += time.perf_counter() - setup.begun
    plain["made_of"] = _made_of(setup)
    checkpoint.save(setup.checkpoint_path, setup.spec.run_id, tensors, plain)


def _made_of(setup: Setup) -> dict[str, Any]:
    """What the steps after a checkpoint must have in common with those before it."""
    parts = (setup.task, setup.method, setup.method.decoder, setup.method.rule)
    return {
        "data": setup.prepared.data_fingerprint,
        "model": setup.prepared.model_fingerprint,
        "code": code_of(tuple(type(part) for part in parts)),
        "kind of device": setup.device.type,
        "kind of noise": "secure" if setup.secure_noise else "seeded",
    }


@cache
def code_of(classes: tuple[type, ...]) -> str:
    """sha256 over the source of what computes: COMPUTING, and the plug-ins that define these classes or their bases."""
    files = {path for folder in COMPUTING for path in (ROOT / folder).rglob("*.py")}
    modules = {sys.modules.get(one.__module__) for kind in classes for one in kind.__mro__}
    files |= {Path(module.__file__) for module in modules if getattr(module, "__file__", None)}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def restore(setup: Setup, run: Run, optimizer) -> None:
    """Put a checkpoint of this run back into its parts and `run`; one that the run cannot go on from is named and passed over."""
    try:
        found = checkpoint.load(setup.checkpoint_path, setup.spec.run_id)
    except FileNotFoundError:
        return
    was = found[1].pop("made_of", None) if found is not None else None
    if not isinstance(was, dict):  # damaged, or written by an older version, whose steps this one cannot vouch for
        return _anew(setup, "is damaged or of another version")
    if other := [what for what, then in _made_of(setup).items() if was.get(what) != then]:
        return _anew(setup, f"was made with other {' and '.join(other)}")
    tensors, plain = found
    kinds = ("parameter", "optimizer", "method", "rule", "buffer", "earlier")
    groups: dict[str, Sums] = {kind: {} for kind in kinds}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("|")
        if rest:
            groups[kind][rest] = tensor
    with torch.no_grad():
        for name, p in setup.parameters.items():
            p.copy_(groups["parameter"][name])
    checkpoint.restore_optimizer(optimizer, setup.parameters, groups["optimizer"])
    setup.method.load_state_dict(groups["method"])
    setup.method.rule.load_state_dict(groups["rule"])
    buffers.restore(setup.prepared.model, groups["buffer"])
    if not setup.secure_noise:
        setup.sampler.set_state(tensors["sampler"])
        setup.mechanism.set_state(tensors["noise"])
        setup.mechanism.set_kept(groups["earlier"], setup.device)
    plain["progress"]["ledger"] = Ledger.from_events(plain["progress"]["ledger"])
    for section in fields(run):
        for key, value in plain[section.name].items():
            setattr(getattr(run, section.name), key, value)
    setup.note(f"    continued from step {run.progress.step} of {setup.spec.steps}", trouble=False)


def _anew(setup: Setup, why: str) -> None:
    setup.note(f"The checkpoint of {setup.spec.label()} {why}; the run starts anew.")
