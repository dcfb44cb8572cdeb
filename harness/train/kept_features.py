"""The features that a frozen encoder has for an example, computed once for all steps, evaluations and runs.

Where the head alone trains, and is one layer at the model's end, what comes before it is a public function of one example. It is
computed of each example by itself, so it does not depend on batches, and what trains afterwards is the layer alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpft.harness import padding
from dpft.harness.errors import CannotRun
from dpft.harness.records import provenance
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import held_features, resuming
from dpft.tasks import encoded

if TYPE_CHECKING:
    from dpft.tasks.base import Prepared

Batch = dict[str, torch.Tensor]
FEATURES, LABELS = "features", "labels"


class Top(nn.Module):
    """What is left of a model when its features are given: `layer` under the name that it had there."""

    views = 1

    def __init__(self, model: nn.Module, name: str, layer: nn.Module):
        super().__init__()
        self.config, self.encoder_type = getattr(model, "config", None), getattr(model, "encoder_type", None)
        self.head_parameters, self.name = model.head_parameters, name
        *rooms, last = name.split(".")
        place = self
        for room in rooms:
            place.add_module(room, nn.Module())
            place = getattr(place, room)
        place.add_module(last, layer)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(features)


def cut(prepared: Prepared, spec: RunSpec, device: torch.device, on_disk: bool) -> Prepared:
    """`prepared` with the layer that trains as its model, and batches of {"features": [batch, ...], "labels": [batch]}.

    Features are in the numbers of the model's parameters, whatever the run's precision is: evaluation is, too. on_disk: whether
    the cache folder may hold them, as it may hold encoded rows.
    Raises CannotRun where what trains is not one layer, alone, at the model's end.
    """
    model = prepared.model
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    found = _Cut(model.eval(), trained.pop(), prepared.collate, device) if len(trained) == 1 else None
    if found is None or not found.holds(prepared.validation[0]):
        raise CannotRun(
            f"features=kept needs a head that is one layer, the model's last, which {spec.model} with head={spec.head} has not; "
            "take features=anew."
        )
    held = held_features.of(_name(prepared, spec, found.name, device), encoded.may_lie_on_disk(on_disk))
    return replace(prepared, model=Top(model, found.name, found.layer), collate=_Collator(found, held))


def save() -> None:
    """What has been computed goes to disk, where it may be."""
    held_features.save()


def _name(prepared: Prepared, spec: RunSpec, layer: str, device: torch.device) -> str:
    """64 hex digits of what features depend on besides the example: weights, code, and whatever rounds."""
    code = resuming.code_of((type(prepared.model),))
    made = [prepared.model_fingerprint, spec.task, spec.head, spec.batch_norm, layer, code]
    where = [torch.cuda.get_device_name(device) if device.type == "cuda" else provenance.cpu(), torch.get_num_threads()]
    where += [version(package) for package in ("torch", "transformers")]
    return hashlib.sha256(json.dumps([made, where]).encode()).hexdigest()


class _Cut:
    """A model cut before one of its layers."""

    def __init__(self, model: nn.Module, name: str, collate: Callable[[Sequence[Any]], Batch], device: torch.device):
        self.model, self.name, self.collate, self.device = model, name, collate, device
        self.layer = model.get_submodule(name)

    @torch.no_grad()
    def passed(self, example: Any) -> tuple[list[tuple], torch.Tensor]:
        """(what went into the layer and came out, each time it was called; the model's scores) of one example."""
        calls: list[tuple] = []
        hook = self.layer.register_forward_hook(lambda layer, given, output: calls.append((*given, output)))
        batch = padding.sent(self.collate([example]), self.device)
        try:
            with padding.known(batch):
                scores = self.model(**{key: value for key, value in batch.items() if key != LABELS})
        finally:
            hook.remove()
        return calls, scores

    def holds(self, example: Any) -> bool:
        """Whether the model's scores are what the layer makes of one tensor, once."""
        if not isinstance(self.layer, nn.Linear):
            return False
        calls, scores = self.passed(example)
        return len(calls) == 1 and len(calls[0]) == 2 and len(calls[0][0]) == 1 and torch.equal(calls[0][1], scores)

    def features(self, example: Any) -> torch.Tensor:
        return self.passed(example)[0][0][0][0].cpu()


class _Collator:
    """Encoded examples -> a batch of features."""

    def __init__(self, of: _Cut, held: held_features.Held):
        self.of, self.held = of, held

    def __call__(self, examples: Sequence[Any]) -> Batch:
        labels = self.of.collate(examples)[LABELS]
        return {FEATURES: torch.stack([self._one(example) for example in examples]), LABELS: labels}

    def _one(self, example: Any) -> torch.Tensor:
        key = held_features.digest(example, LABELS)
        if (found := self.held.get(key)) is None:
            found = self.of.features(example)
            self.held.put(key, found)
        return found
