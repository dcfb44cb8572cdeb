"""What methods that train in subspaces of the weight matrices share: which matrices, Adam inside, the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.updates import LazyUpdates
from dpft.methods.decoders.matrices import matrices_of
from dpft.methods.decoders.moments import Adam
from dpft.methods.full import DPAdam

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.encoding import Encoding
    from dpft.harness.runs.spec import RunSpec


class Subspace(DPAdam):
    """DP-Adam whose Adam sees each matrix of the body in `rank` coordinates of its smaller side; base class, not a method.

    A matrix that has no more than `rank` stays as it is, as do vectors, embedding tables and the head. Subspaces change every
    `refresh` steps; `reset`: and Adam starts anew. Weight decay is decoupled, as in AdamW. With optimizer=sgd the lifted
    mean is handed to SGD, whose momentum has the full shape.
    """

    options: ClassVar = {**DPAdam.options, "rank": 16, "refresh": 100, "reset": False}
    ranges: ClassVar = {"rank": (1, float("inf")), "refresh": (1, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._adam = Adam()

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        if self.settings["reset"] and self.decoder.carries:
            raise BadInput(
                f"reset clears Adam's moments, not what the decoder {self.decoder.name} carries from before the refresh; set "
                "reset=false or decoder=mean."
            )

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.weights = parameters
        body = set(matrices_of(model, parameters)) - set(model.head_parameters)
        # name -> the side that is projected: 0, the rows, or 1, all the rest
        self.sides = {n: int(s[0] >= s[1:].numel()) for n, s in self.shapes.items() if n in body and self.narrows(n)}
        return model

    def narrows(self, name: str, side: int | None = None) -> bool:
        """Whether `rank` is less than there is of a parameter's side; None: of its smaller one."""
        sizes = (self.shapes[name][0], self.shapes[name][1:].numel())
        return (min(sizes) if side is None else sizes[side]) > self.settings["rank"]

    def optimizer(self, parameters, head, spec) -> torch.optim.Optimizer:
        self.preconditions = spec.optimizer != "sgd" and not self.decoder.preconditions
        return super().optimizer(parameters, head, spec)

    def lifted(self, parts: dict[str, torch.Tensor], subspaces: dict[str, Encoding], step: int) -> LazyUpdates:
        """The updates of a step: Adam's directions of `parts` (encoded where there is a subspace; changed in place), lifted."""
        seen, reset = step % self.settings["refresh"], self.settings["reset"]
        if self.preconditions:
            if reset and seen == 0:
                self._adam.forget(subspaces)
            self._adam.precondition(parts, lambda name: 1 + (seen if reset and name in subspaces else step))
        return LazyUpdates(
            parts, lambda name, part: subspaces[name].lift(part, self.shapes[name]) if name in subspaces else part
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | {f"subspace|{key}": tensor for key, tensor in self._adam.state_dict().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        own = {key.removeprefix("subspace|"): t for key, t in state.items() if key.startswith("subspace|")}
        self._adam.load_state_dict(own)
        super().load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith("subspace|")})
