"""The state of a run in flight in one safetensors file: no pickles, written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dpft.harness.records.store import atomic

SCHEMA = 1


def save(path: Path, run_id: str, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write tensors and JSON state of run `run_id`. Raises OSError when the disk is full or the folder gone."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"schema": str(SCHEMA), "run_id": run_id, "state": json.dumps(state, allow_nan=False)}
    with atomic(path) as temporary:
        try:
            save_file(_alone(tensors), temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {temporary}: {error}") from error


def _alone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as safetensors takes them: contiguous, no two in one storage.

    A large model's state fits once, and not twice: only those are copied that are not so already (views of one storage, tied
    weights under two names, transposed ones), and those of a GPU to the host, never on the card.
    """
    seen, found = set(), {}
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        storage = host.untyped_storage().data_ptr() if host.numel() else None
        found[name] = host.clone() if storage in seen else host
        if storage is not None:
            seen.add(storage)
    return found


def load(path: Path, run_id: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What `save` wrote for `run_id`; None when it is damaged or foreign. Raises FileNotFoundError when there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != str(SCHEMA) or metadata.get("run_id") != run_id:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["state"])  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError):
        return None


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The optimizer's state as `<key>|<parameter>` -> tensor."""
    return {
        f"{key}|{name}": value
        for name, p in parameters.items()
        for key, value in optimizer.state[p].items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for joined, value in tensors.items():
        key, name = joined.split("|", 1)
        p = parameters[name]
        # torch keeps the step count on the CPU, but beside the parameter in fused optimizers
        optimizer.state[p][key] = value if key == "step" and not fused else value.to(p.device)
