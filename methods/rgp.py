"""Reparametrized gradient perturbation: gradients are seen through two thin carriers of each weight (2106.09352)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.query.queries import Gradients
from dpft.harness.query.updates import LazyUpdates
from dpft.methods import projection
from dpft.methods.base import freeze_all_but
from dpft.methods.decoders.base import refuse_decoder
from dpft.methods.decoders.matrices import matrices_of
from dpft.methods.full import DPAdam

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.encoding import Stacked
    from dpft.harness.query.queries import Ask
    from dpft.harness.runs.spec import RunSpec


class RGP(DPAdam):
    """DP-Adam on matrices of the body and the head; of a matrix's gradient G only `G R` and `L^T G` are clipped and noised.

    L [m, r], R [n, r]: orthonormal, anew in every step, by one power iteration from random directions on how far the weight has
    come, W_t - W_0, which follows from releases (in the first step: on the weight itself); with carriers=weights always on the
    weight, as the authors' code for BERT does. The update is `(G R) R^T + L (L^T G) - L L^T (G R) R^T`, G's projection on the
    matrices whose columns L spans or whose rows R spans, and goes to Adam in the weight's shape.

    The block L^T G R is in both halves. block=twice clips it in both, as the paper does; its noisy copy in `G R` cancels.
    block=once asks for (I - L L^T) G R in place of G R: the same update, the same noise, and what is clipped has the norm of the
    projection.

    Trained are the matrices of the body (one whose smaller side is no more than `rank`: as it is) and the head; embeddings,
    norms and biases are frozen, as in the authors' code, where the rank is 1 for BERT and 16 for a ResNet. It clips at 10 with
    the head's gradients divided by 10, and takes an lr of 3e-4 at 2000 examples a step; here the head counts as it is. Its BERT
    adds the third term of the update; and it divides by the lengths of directions, which may be zero (W_t - W_0 of a lower rank).
    Memory: a copy of the matrices (not with carriers=weights) and full moments; per example r (m + n) numbers a matrix.

    Prediction: below dp-adam at a large epsilon, where little noise is saved, and nearer to it the smaller epsilon is.
    """

    name = "rgp"
    summary = "dp-adam on matrices and head, gradients seen through two thin carriers of each matrix's history"
    reference = "arXiv:2106.09352"
    one_space = False
    claim = "SST-2 94.2 at eps 8, RoBERTa-large (github.com/dayu11/Differentially-Private-Deep-Learning, language)"
    options: ClassVar = {**DPAdam.options, "rank": 1, "carriers": "history", "block": "twice"}
    choices: ClassVar = {"carriers": ("history", "weights"), "block": ("twice", "once")}
    ranges: ClassVar = {"rank": (1, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._before: dict[str, torch.Tensor] = {}  # W_0, from the first step on

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        refuse_decoder(self.decoder, "The carriers of rgp change in every step, which decoders do not know")

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        import torch

        parameters, head = dict(model.named_parameters()), set(model.head_parameters)
        body = [name for name in matrices_of(model, parameters) if name not in head]
        freeze_all_but(model, {*body, *head})
        self._seed = int(torch.randint(2**62, (), generator=generator))
        rank = self.settings["rank"]
        self._matrices = {n: parameters[n] for n in body if min(parameters[n].flatten(1).shape) > rank}
        return model

    def step(self, ask: Ask, step: int) -> LazyUpdates:
        if self.settings["carriers"] == "history" and not self._before:
            self._before = {name: p.detach().clone() for name, p in self._matrices.items()}
        asked, once = {}, {}
        for number, (name, p) in enumerate(self._matrices.items()):
            generator = projection.generator(p.device, self._seed, number, step)
            asked[name], once[name] = self._encodings(
                *carriers(self._source(name, p), self.settings["rank"], generator)
            )
        (noisy,) = ask(gradient=Gradients(encodings=asked))
        shapes = {name: p.shape for name, p in self._matrices.items()}
        return LazyUpdates(
            noisy.mean(), lambda name, part: once[name].lift(part, shapes[name]) if name in once else part
        )

    def _source(self, name: str, p: torch.Tensor) -> torch.Tensor:
        """What the carriers of a weight are found on, [m, n]."""
        weight = p.detach()
        if self.settings["carriers"] == "history":
            before = self._before[name] = self._before[name].to(p.device)  # from a checkpoint
            weight = weight.where((weight == before).all(), weight - before)
        return weight.flatten(1).float()

    def _encodings(self, left: torch.Tensor, right: torch.Tensor) -> tuple[Stacked, Stacked]:
        """(what is asked, that whose transpose is the update): they differ where the block is clipped twice."""
        from dpft.harness.query.encoding import Complement, Encoding, Stacked

        columns = Encoding(left=left)
        once = Stacked(parts=(Encoding(left=Complement(left), right=right), columns))
        return once if self.settings["block"] == "once" else Stacked(parts=(Encoding(right=right), columns)), once

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | {f"before|{name}": tensor for name, tensor in self._before.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._before = {key.removeprefix("before|"): t for key, t in state.items() if key.startswith("before|")}
        super().load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith("before|")})


def carriers(source: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(L [m, rank], R [n, rank]), orthonormal, by one power iteration on `source` [m, n]; a step of the generator."""
    import torch

    start = torch.randn(source.shape[1], rank, generator=generator, device=generator.device)
    left = torch.linalg.qr(source @ start).Q
    return left, torch.linalg.qr(source.mT @ left).Q
