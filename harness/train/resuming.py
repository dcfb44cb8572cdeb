"""A run that was cut short and goes on: what its checkpoint holds."""

from __future__ import annotations

from dataclasses import fields

import torch

from dpft.harness.engine.base import Sums
from dpft.harness.privacy import Ledger
from dpft.harness.train import buffers, checkpoint
from dpft.harness.train.parts import Run, Setup


def keep(setup: Setup, run: Run, optimizer) -> None:
    """Write a checkpoint where one is wanted; a run is worth more than its checkpoint, so a full disk is no failure."""
    if setup.checkpoint_path is not None:
        try:
            _save(setup, run, optimizer)
        except OSError as error:
            setup.note(f"No checkpoint can be written ({error.strerror or error}); the run goes on without.")


def _save(setup: Setup, run: Run, optimizer) -> None:
    tensors = {f"parameter|{name}": p for name, p in setup.parameters.items()}
    tensors |= {f"optimizer|{k}": t for k, t in checkpoint.optimizer_tensors(optimizer, setup.parameters).items()}
    tensors |= {f"method|{k}": t for k, t in setup.method.state_dict().items()}
    tensors |= {f"rule|{k}": t for k, t in setup.method.rule.state_dict().items()}
    tensors |= {f"buffer|{k}": t for k, t in buffers.tensors(setup.prepared.model).items()}
    if not setup.secure_noise:
        tensors["sampler"] = setup.sampler.generator.get_state()
        tensors["noise"] = setup.mechanism.state()
    plain = {section: dict(vars(held)) for section, held in vars(run).items()}
    plain["progress"]["ledger"] = run.progress.ledger.events
    plain["made_of"] = _made_of(setup)
    checkpoint.save(setup.checkpoint_path, setup.spec.run_id, tensors, plain)


def _made_of(setup: Setup) -> list[str]:
    return [setup.prepared.data_fingerprint, setup.prepared.model_fingerprint]


def restore(setup: Setup, run: Run, optimizer) -> None:
    """Put a checkpoint of this run back into its parts and `run`; one that is not of this run, data or noise is passed over."""
    found = checkpoint.load(setup.checkpoint_path, setup.spec.run_id)
    if found is None:
        return
    tensors, plain = found
    if plain.pop("made_of", None) != _made_of(setup):
        return  # the steps so far saw other data, or started from other weights
    if setup.secure_noise != ("noise" not in tensors):
        return  # the steps so far had noise of the other kind: what the record says of it must hold for all of them
    if "progress" not in plain:
        return  # written by an older version, whose steps this one cannot vouch for
    groups: dict[str, Sums] = {"parameter": {}, "optimizer": {}, "method": {}, "rule": {}, "buffer": {}}
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
        setup.sampler.generator.set_state(tensors["sampler"])
        setup.mechanism.set_state(tensors["noise"])
    plain["progress"]["ledger"] = Ledger.from_events(plain["progress"]["ledger"])
    for section in fields(run):
        for key, value in plain[section.name].items():
            setattr(getattr(run, section.name), key, value)
    setup.note(f"    continued from step {run.progress.step} of {setup.spec.steps}", trouble=False)
