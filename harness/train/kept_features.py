"""The features that a frozen encoder has for an example, computed once for all steps, evaluations and runs of a process.

Where the head alone trains, and is one layer at the model's end, what comes before it is a public function of one example. It is
computed of each example by itself, so it does not depend on batches, and what trains afterwards is the layer alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpft.harness import padding
from dpft.harness.errors import CannotRun
from dpft.harness.runs.spec import RunSpec

if TYPE_CHECKING:
    from dpft.tasks.base import Prepared

Batch = dict[str, torch.Tensor]
FEATURES, LABELS = "features", "labels"
ENCODERS, MOST_BYTES = 2, 2**31  # whose features are held at once; of each
_HELD: OrderedDict[tuple, dict[tuple, torch.Tensor]] = OrderedDict()


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


def cut(prepared: Prepared, spec: RunSpec, device: torch.device) -> Prepared:
    """`prepared` with the layer that trains as its model, and batches of {"features": [batch, ...], "labels": [batch]}.

    Features are in the numbers of the model's parameters, whatever the run's precision is: evaluation is, too.
    Raises CannotRun where what trains is not one layer, alone, at the model's end.
    """
    model = prepared.model
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    found = _Cut(model.to(device).eval(), trained.pop(), prepared.collate, device) if len(trained) == 1 else None
    if found is None or not found.holds(prepared.validation[0]):
        raise CannotRun(
            f"features=kept needs a head that is one layer, the model's last, which {spec.model} with head={spec.head} has not; "
            "take features=anew."
        )
    place = (str(device), torch.get_num_threads())
    key = (prepared.model_fingerprint, spec.model, spec.head, spec.batch_norm, found.name, *place)
    held = _HELD.setdefault(key, {})
    _HELD.move_to_end(key)
    while len(_HELD) > ENCODERS:
        _HELD.popitem(last=False)
    return replace(prepared, model=Top(model, found.name, found.layer), collate=_Collator(found, held))


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
    """Encoded examples -> a batch of features. held: by the example's content, for whoever has the same encoder."""

    def __init__(self, of: _Cut, held: dict[tuple, torch.Tensor]):
        self.of, self.held = of, held

    def __call__(self, examples: Sequence[Any]) -> Batch:
        labels = self.of.collate(examples)[LABELS]
        return {FEATURES: torch.stack([self._one(example) for example in examples]), LABELS: labels}

    def _one(self, example: Any) -> torch.Tensor:
        key = tuple((name, _bytes(value)) for name, value in sorted(example.items()) if name != LABELS)
        if (found := self.held.get(key)) is None:
            self.of.model.eval()
            found = self.of.features(example)
            if len(self.held) * found.nbytes < MOST_BYTES:
                self.held[key] = found
        return found


def _bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    return value.tobytes() if hasattr(value, "tobytes") else value
