"""Muon on releases: momentum whose singular values are all made one (DP-Muon, Kim & Fan, 2605.12994)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.methods.decoders.base import Decoder
from dpft.methods.decoders.matrices import check_scope, matrix_names, views
from dpft.methods.decoders.moments import Adam, Moment

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.noisy_sum import NoisySum

# Odd polynomials a X + b (X X^T) X + c (X X^T)^2 X: `fast` brings singular values from .003 near one in five rounds but leaves
# them within .7 .. 1.2 (Jordan et al. 2024); `taylor` (2605.12994, kappa = 2) converges, slowly for small values.
POLYNOMIALS = {"fast": (3.4445, -4.7750, 2.0315), "taylor": (15 / 8, -10 / 8, 3 / 8)}


class Muon(Decoder):
    """Matrices: the running mean of releases, orthogonalised by Newton-Schulz; everything else: Adam's direction.

    A matrix's update is scaled by .2 sqrt(max(m, n)), which gives its entries the size that Adam's have (2502.16982), so that one
    lr serves both. scope: by default the matrices of the body, as is usual for Muon; see matrix_names. Clipping is the run's
    (flat over all parameters, or by groups), not the paper's per matrix.
    """

    name = "muon"
    summary = "orthogonalised momentum for matrices, Adam for the rest"
    reference = "arXiv:2605.12994"
    options: ClassVar = {
        "beta": 0.95,
        "iterations": 5,
        "polynomial": "fast",
        "scope": "body",
        "adam_beta": 0.9,
        "adam_beta2": 0.999,
    }
    choices: ClassVar = {"polynomial": tuple(POLYNOMIALS)}
    ranges: ClassVar = {
        "beta": (0.0, 1 - 1e-9),
        "iterations": (1, 100),
        "adam_beta": (0.0, 1 - 1e-9),
        "adam_beta2": (0.0, 1 - 1e-9),
    }
    preconditions = True

    def __init__(self, options=None):
        super().__init__(options)
        self._momentum = Moment("momentum", self.settings["beta"])
        self._adam = Adam(self.settings["adam_beta"], self.settings["adam_beta2"])

    def validate(self, spec) -> None:
        super().validate(spec)
        check_scope(self.settings["scope"])
        if spec.optimizer == "sgd":
            raise BadInput("The decoder muon applies Adam beside the matrices; set optimizer to adam or adamw.")

    def setup(self, model, parameters, head, spec) -> None:
        self._matrices = matrix_names(model, parameters, head, self.settings["scope"])

    def decode(self, noisy: NoisySum, step: int) -> dict[str, torch.Tensor]:
        updates = noisy.mean()
        parts = {name: views(name, update) for name, update in updates.items() if name in self._matrices}
        matrices = {name: updates[name] for name, found in parts.items() if found}
        rest = {name: update for name, update in updates.items() if name not in matrices}
        self._momentum.update(matrices)
        for name, update in matrices.items():
            update.copy_(self._momentum.tensors[name])
            for view in parts[name].values():
                polynomial = POLYNOMIALS[self.settings["polynomial"]]
                scale = 0.2 * max(view.shape) ** 0.5
                view.copy_(orthogonalised(view, self.settings["iterations"], polynomial)).mul_(scale)
        self._adam.precondition(rest, lambda name: step + 1)
        return updates

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._momentum.state_dict() | self._adam.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._momentum.load_state_dict(state)
        self._adam.load_state_dict(state)


def orthogonalised(matrix: torch.Tensor, iterations: int, polynomial: tuple[float, float, float]) -> torch.Tensor:
    """`matrix` [m, n] with its singular values driven to one by Newton-Schulz iterations; zero stays zero."""
    a, b, c = polynomial
    x = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).float()
    x = x / x.norm().clamp(min=1e-30)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT
