"""Public examples for the methods and clipping rules that need them, and for no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dpft.harness.engine.base import Loss
from dpft.harness.query.public import Public
from dpft.methods.base import Method
from dpft.tasks.base import Data, Prepared, Task


def needed(method: Method) -> bool:
    """Whether the method or its clipping rule learns from public examples."""
    return method.needs_public or method.rule.needs_public


def loaded(method: Method, task: Task, data_dir: Path | None) -> Data:
    """The task's data, with public rows where they are needed. Raises CannotRun as `Task.load`."""
    data = task.load(data_dir)
    return replace(data, public=task.public_rows(data_dir)) if needed(method) else data


def hand_over(method: Method, prepared: Prepared, loss: Loss, device: torch.device) -> None:
    """Give method and clipping rule the public examples they need, before `prepare`."""
    if needed(method):
        method.public = method.rule.public = Public(prepared.public, prepared.collate, loss, device)
