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
    plain = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    with atomic(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {temporary}: {error}") from error


def load(path: Path, run_id: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What `save` wrote for `run_id`; None when there is none, or a damaged or foreign one (the run starts again)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != str(SCHEMA) or metadata.get("run_id") != run_id:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["state"])  # noqa: SIM118
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
