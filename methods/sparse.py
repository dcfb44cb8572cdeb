"""Training a few rows of every matrix: what these methods share, and two that choose the rows without looking at data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients
from dpft.harness.query.updates import LazyUpdates
from dpft.methods.base import freeze_all_but
from dpft.methods.decoders.base import refuse_decoder
from dpft.methods.decoders.matrices import matrices_of
from dpft.methods.decoders.moments import Adam
from dpft.methods.full import DPAdam

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.encoding import Encoding
    from dpft.harness.query.queries import Ask
    from dpft.harness.query.updates import Updates
    from dpft.harness.runs.spec import RunSpec


class SparseRows(DPAdam):
    """A share of the rows of every matrix of the body trains, with vectors (norms, biases) and the head; a base class, no method.

    A row is an output neuron of a Linear layer or a filter of a convolution. Embedding tables and tokens stay frozen.
    trainable_fraction: of the rows of each matrix, at least one. What is clipped, noised and kept by Adam (or as momentum) are
    the rows that train and nothing else; the others keep their bits, so there is no weight decay.
    """

    defaults: ClassVar = {**DPAdam.defaults, "lr": 1e-3}
    options: ClassVar = {**DPAdam.options, "head_lr_factor": 10.0, "trainable_fraction": 0.2}
    ranges: ClassVar = {"trainable_fraction": (1e-6, 1.0)}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self.chosen: dict[str, torch.Tensor] = {}  # matrix -> its rows that train
        self._rule, self._momentum = "sgd", 0.0
        self._adam, self._velocity = Adam(), {}

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        refuse_decoder(self.decoder, f"{self.name} trains rows from plain releases")
        if spec.weight_decay:
            raise BadInput(f"{self.name} leaves the rows that it freezes as they are; set weight_decay = 0.")

    def skip(self, model: nn.Module) -> str | None:
        return None if self._body(model) else f"{self.name} needs matrices outside the head; use last-layer."

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        head = set(model.head_parameters)
        self.matrices = {name: p.shape for name, p in model.named_parameters() if name in self._body(model)}
        vectors = {name for name, p in model.named_parameters() if p.dim() == 1}
        freeze_all_but(model, head | vectors | set(self.matrices))
        self.weights = {name: p for name, p in model.named_parameters() if name in self.matrices}
        self.others = frozenset(head | vectors)
        self.chosen = self.choose(model, generator)
        return model

    def choose(self, model: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The rows of every matrix that train, ascending; empty where releases are to choose them."""
        return {}

    def count(self, name: str) -> int:
        """How many rows of a matrix train."""
        return max(1, round(self.settings["trainable_fraction"] * self.matrices[name][0]))

    def best(self, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The rows with the largest scores [rows] of every matrix, ascending."""
        return {name: score.topk(self.count(name)).indices.sort().values for name, score in scores.items()}

    def step(self, ask: Ask, step: int) -> Updates:
        rows = self.rows()
        (noisy,) = ask(gradient=Gradients(encodings=rows))
        return self.directions(self.decoder.decode(noisy, step), rows, step + 1)

    def rows(self) -> dict[str, Encoding]:
        """The rows that train, of every matrix."""
        from dpft.harness.query.encoding import Encoding

        for name, parameter in self.weights.items():
            self.chosen[name] = self.chosen[name].to(parameter.device)
        return {name: Encoding(left=self.chosen[name]) for name in self.matrices}

    def directions(self, parts: dict[str, torch.Tensor], rows: dict[str, Encoding], seen: int) -> LazyUpdates:
        """The updates: Adam's (or momentum's) directions of what was released, put back among zeros. seen: releases so far."""
        if self._rule != "sgd":
            self._adam.precondition(parts, lambda name: seen)
        elif self._momentum:
            for name, part in parts.items():
                kept = self._velocity.get(name)
                kept = self._velocity[name] = part.clone() if kept is None else kept.mul_(self._momentum).add_(part)
                part.copy_(kept)
        shapes = self.matrices
        return LazyUpdates(parts, lambda name, p: rows[name].lift(p, shapes[name]) if name in rows else p)

    def optimizer(self, parameters, head, spec) -> torch.optim.Optimizer:
        self._rule, self._momentum, self.preconditions = spec.optimizer, spec.momentum, True
        return super().optimizer(parameters, head, spec)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._adam.state_dict() | {f"velocity|{name}": tensor for name, tensor in self._velocity.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._adam.load_state_dict(state)
        self._velocity = {key.removeprefix("velocity|"): t for key, t in state.items() if key.startswith("velocity|")}

    @staticmethod
    def _body(model: nn.Module) -> set[str]:
        return set(matrices_of(model, dict(model.named_parameters()))) - set(model.head_parameters)


class MagnitudeRows(SparseRows):
    """The rows whose pretrained weights are largest in sum of magnitudes train, from the first step on."""

    name = "magnitude-rows"
    summary = "sparse: rows with the largest pretrained weights, norms, biases and head"
    reference = "arXiv:2503.12822"

    def choose(self, model, generator):
        weights = dict(model.named_parameters())
        return self.best({name: weights[name].detach().flatten(1).abs().sum(1) for name in self.matrices})


class RandomRows(SparseRows):
    """Rows drawn at random train, from the first step on."""

    name = "random-rows"
    summary = "sparse: rows drawn at random, norms, biases and head"
    reference = "arXiv:2503.12822"

    def choose(self, model, generator):
        import torch

        return self.best({n: torch.rand(shape[0], generator=generator) for n, shape in self.matrices.items()})
