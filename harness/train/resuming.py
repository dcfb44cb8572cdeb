"""A run that was cut short and goes on: what its checkpoint holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dpft.harness.engine.base import Sums
from dpft.harness.privacy import Ledger
from dpft.harness.train import buffers, checkpoint

if TYPE_CHECKING:
    from dpft.harness.train.loop import Setup, State


def keep(setup: Setup, state: State, optimizer) -> None:
    """Write a checkpoint where one is wanted; a run is worth more than its checkpoint, so a full disk is no failure."""
    if setup.checkpoint_path is not None:
        try:
            _save(setup, state, optimizer)
        except OSError as error:
            setup.note(f"No checkpoint can be written ({error.strerror or error}); the run goes on without.")


def _save(setup: Setup, state: State, optimizer) -> None:
    tensors = {f"parameter|{name}": p for name, p in setup.parameters.items()}
    tensors |= {f"optimizer|{k}": t for k, t in checkpoint.optimizer_tensors(optimizer, setup.parameters).items()}
    tensors |= {f"method|{k}": t for k, t in setup.method.state_dict().items()}
    tensors |= {f"buffer|{k}": t for k, t in buffers.tensors(setup.prepared.model).items()}
    if not setup.secure_noise:
        tensors["sampler"] = setup.sampler.generator.get_state()
        tensors["noise"] = setup.mechanism.state()
    plain = {key: value for key, value in vars(state).items() if key != "ledger"}
    plain |= {"ledger": state.ledger.events, "made_of": _made_of(setup)}
    checkpoint.save(setup.checkpoint_path, setup.spec.run_id, tensors, plain)


def _made_of(setup: Setup) -> list[str]:
    return [setup.prepared.data_fingerprint, setup.prepared.model_fingerprint]


def restore(setup: Setup, state: State, optimizer) -> None:
    """Put a checkpoint of this run back into its parts and `state`; one that is not of this run, data or noise is passed over."""
    found = checkpoint.load(setup.checkpoint_path, setup.spec.run_id)
    if found is None:
        return
    tensors, plain = found
    if plain.pop("made_of", None) != _made_of(setup):
        return  # the steps so far saw other data, or started from other weights
    if setup.secure_noise != ("noise" not in tensors):
        return  # the steps so far had noise of the other kind: what the record says of it must hold for all of them
    if "chain" not in plain:
        return  # written before there was a chain: of the steps so far it could say nothing
    groups: dict[str, Sums] = {"parameter": {}, "optimizer": {}, "method": {}, "buffer": {}}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("|")
        if rest:
            groups[kind][rest] = tensor
    with torch.no_grad():
        for name, p in setup.parameters.items():
            p.copy_(groups["parameter"][name])
    checkpoint.restore_optimizer(optimizer, setup.parameters, groups["optimizer"])
    setup.method.load_state_dict(groups["method"])
    buffers.restore(setup.prepared.model, groups["buffer"])
    if not setup.secure_noise:
        setup.sampler.generator.set_state(tensors["sampler"])
        setup.mechanism.set_state(tensors["noise"])
    for key, value in plain.items():
        setattr(state, key, Ledger.from_events(value) if key == "ledger" else value)
    setup.note(f"    continued from step {state.step} of {setup.spec.steps}", trouble=False)
