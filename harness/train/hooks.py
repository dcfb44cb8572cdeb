"""What the hooks of a method and a task give back, held to the contract: each misfit a sentence, with class, place and remedy.

Classes are held to it when they are registered (harness/plugins/contract.py), questions when they are asked
(harness/query/fitting.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from dpft.harness.errors import BadInput
from dpft.harness.plugins.contract import called
from dpft.harness.query import fitting
from dpft.harness.query.queries import Gradients
from dpft.harness.query.updates import LazyUpdates
from dpft.tasks.base import Prepared


def check_prepared(task: Any, made: Any) -> None:
    """What `Task.prepare` returned. Raises BadInput."""
    who = f"`prepare` of task {called(task)}"
    if not isinstance(made, Prepared):
        raise BadInput(f"{who} returned {fitting.kind_of(made)}; return Prepared(...).")
    if not isinstance(made.model, nn.Module):
        raise BadInput(
            f"{who} returned a model that is {fitting.kind_of(made.model)}; give Prepared a torch.nn.Module."
        )
    for split in ("train", "validation"):
        examples, lengths = len(getattr(made, split)), len(getattr(made, f"{split}_lengths"))
        if examples != lengths:
            raise BadInput(
                f"{who} gave {examples} examples of {split} and {lengths} {split}_lengths; give one for each."
            )
    for what in ("data_fingerprint", "model_fingerprint"):
        if not re.fullmatch("[0-9a-f]{64}", str(getattr(made, what))):
            raise BadInput(
                f"{who} gave the {what} {getattr(made, what)!r}; give 64 hex digits, as hashlib.sha256 does."
            )
    head = getattr(made.model, "head_parameters", None)
    if head is None or isinstance(head, str):
        raise BadInput(
            f"{who} returned a model without `head_parameters`; set it to the names of the head's parameters, () for none."
        )
    _check_head(who, made.model, head)


def check_trainable(method: Any, model: Any, head: Collection[str]) -> None:
    """What `Method.prepare` returned. head: names of the head's parameters before. Raises BadInput."""
    who = f"`prepare` of method {called(method)}"
    if not isinstance(model, nn.Module):
        raise BadInput(f"{who} returned {fitting.kind_of(model)}; return the model.")
    _check_head(who, model, head)


def _check_head(who: str, model: nn.Module, head: Collection[str]) -> None:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(head):
        if name not in names:
            raise BadInput(
                f"{who} returned a model without the parameter {name}, which `head_parameters` names; keep the head's names."
            )


def check_reason(method: Any, reason: Any) -> None:
    """What `Method.skip` returned. Raises BadInput."""
    if reason is not None and not (isinstance(reason, str) and reason):
        raise BadInput(f"`skip` of method {called(method)} returned {reason!r}; return a sentence, or None to run.")


def check_optimizer(method: Any, optimizer: Any, parameters: Mapping[str, nn.Parameter], lr: float) -> None:
    """What `Method.optimizer` returned: all that trains, each once, at the run's lr. Raises BadInput."""
    who = f"`optimizer` of method {called(method)}"
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise BadInput(f"{who} returned {fitting.kind_of(optimizer)}; return a torch.optim.Optimizer.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in parameters.items():
        if id(p) not in held:
            raise BadInput(f"{who} leaves out {name}, which trains; add it to a group, or freeze it in `prepare`.")
    for number, group in enumerate(optimizer.param_groups):
        factor = group.get("lr_factor", 1.0)
        own = float(group.get("lr", lr))
        if own != lr:
            raise BadInput(
                f"{who} gives group {number} lr={own:g}, which the run's lr {lr:g} would replace in every step; set "
                f"lr_factor={own / lr:g} in the group instead."
            )
        if not (isinstance(factor, (int, float)) and math.isfinite(factor) and factor >= 0):
            raise BadInput(f"{who} gives group {number} lr_factor={factor!r}; give a number that is not negative.")


def check_update(method: Any, update: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """What `Method.step` returned: names, shapes, devices; values are looked at where they are applied. Raises BadInput."""
    who = f"`step` of method {called(method)}"
    if not isinstance(update, Mapping):
        raise BadInput(
            f"{who} returned {fitting.kind_of(update)}; return the update of each parameter that moves by its name, and {{}} "
            "where none does."
        )
    for name in update:
        if problem := fitting.stranger(name, parameters, "an update is of"):
            raise BadInput(f"{who}: {problem}")
        if not isinstance(update, LazyUpdates) and (problem := fitting.misfit(update[name], parameters[name])):
            raise BadInput(f"{who}: the update of {name} {problem}")


def check_amended(rule: Any, made: Any) -> None:
    """What `ClippingRule.amend` returned. Raises BadInput."""
    pair = isinstance(made, tuple) and len(made) == 2
    if not (pair and isinstance(made[0], Gradients) and isinstance(made[1], Mapping)):
        raise BadInput(
            f"`amend` of clipping rule {called(rule)} returned {fitting.kind_of(made)}; return the question for gradients and a "
            "dictionary of further questions."
        )


def check_predictions(task: Any, predictions: Any, references: Any, count: int) -> None:
    """What `Task.predict` returned of `count` examples. Raises BadInput."""
    for what, values in (("predictions", predictions), ("references", references)):
        if not hasattr(values, "__len__") or len(values) != count:
            seen = len(values) if hasattr(values, "__len__") else fitting.kind_of(values)
            raise BadInput(
                f"`predict` of task {called(task)} returned {seen} {what} for {count} examples; return one for each."
            )


def check_metrics(task: Any, values: Any) -> None:
    """What the metric of a task gave. Raises BadInput."""
    if not isinstance(values, Mapping) or task.metric not in values:
        seen = ", ".join(map(str, values)) if isinstance(values, Mapping) else fitting.kind_of(values)
        raise BadInput(
            f"`make_metric` of task {called(task)} makes a metric that gives {seen or 'nothing'}, not {task.metric!r}, which "
            "`metric` names; correct one of them."
        )
