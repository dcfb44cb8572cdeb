"""Scale-then-privatize: clip and noise in the coordinates that Adam steps in (Ganesh, McMahan, Thakurta, 2507.01129)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.query.queries import Gradients
from dpft.methods.decoders.base import refuse_decoder
from dpft.methods.decoders.moments import EPSILON, Moment
from dpft.methods.full import DPAdam

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.noisy_sum import NoisySum
    from dpft.harness.query.queries import Ask
    from dpft.harness.runs.spec import RunSpec

BETA, BETA2 = 0.9, 0.999
MOST = 1e3  # D is at most this
TINY = 1e-30  # so that a second moment of zeros has a root


class ScaleThenPrivatize(DPAdam):
    """DP-Adam that multiplies each example's gradient by D before the clip, and the release by 1/D (2507.01129, Algorithm 8).

    D = a / sqrt(v + (prior/n) s^2), entry by entry, with v Adam's second moment of the releases *before* this step (each
    after its division by D; bias-corrected), and a such that the mean of 1/D^2 is 1. Then noise of the same total energy
    falls where gradients are large, and C keeps its meaning: an example whose squares are to each other as the second
    moments are keeps its norm. The first step has D = 1. D is a function of releases; the norm that is clipped is that of D
    times the gradient.

    v is noisy, and noise that is divided by D feeds it again: an entry whose first release was small by chance would get less
    noise and stay small. So v counts `prior` releases of noise alone, of standard deviation s = sigma C/B, beside the n =
    (1 - .999^t)/.001 that it has seen. The paper has a constant eps instead, to be tuned; jax_privacy's default of 1e-8 is
    Adam's and lets single draws of noise decide. It finds that v should not be rid of its noise; here it is not.

    Adam's moments and its steps are the method's own; with optimizer=sgd the release over D goes to SGD and only v is kept.
    D costs memory of the size of what trains, and a gradient whose entries have weights does not factor: T d p operations an
    example for its norm. Tables are weighted by the rows that were looked up.

    Prediction: better than dp-adam where v has a shape. Where noise is far above the signal v is flat but for the signal's
    share alpha of the noise's energy, and D departs from 1 only once prior/n is below alpha: no difference in a short run.
    """

    name = "scale-then-privatize"
    summary = "dp-adam that clips and noises gradients over the root of the released second moment"
    reference = "arXiv:2507.01129"
    one_space = False
    options: ClassVar = {**DPAdam.options, "prior": 10.0}
    ranges: ClassVar = {"prior": (1e-6, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._first, self._second = Moment("first", BETA), Moment("second", BETA2, squared=True)
        self._std = 0.0  # s of the last release

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        refuse_decoder(
            self.decoder, "scale-then-privatize has noise of another size in every entry, which decoders do not expect"
        )

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return model

    def optimizer(self, parameters, head, spec) -> torch.optim.Optimizer:
        self.preconditions = spec.optimizer != "sgd"
        return super().optimizer(parameters, head, spec)

    def step(self, ask: Ask, step: int) -> dict[str, torch.Tensor]:
        from dpft.harness.query.encoding import Encoding

        weights = self.weights(step)
        (noisy,) = ask(gradient=Gradients(encodings={name: Encoding(weights=w) for name, w in weights.items()}))
        return self._learnt(noisy, weights, step + 1)

    def weights(self, steps: int) -> dict[str, torch.Tensor]:
        """D of each parameter after so many steps; none before the first."""
        if not self._second.tensors:
            return {}
        seen = self._second.correction(steps) / (1 - BETA2)
        noise = self.settings["prior"] / seen * self._std**2 + TINY
        found = {
            name: (self._second.tensors[name].to(p.device) / self._second.correction(steps)).add_(noise)
            for name, p in self._parameters.items()
        }
        mean = sum(u.sum() for u in found.values()) / sum(u.numel() for u in found.values())
        for u in found.values():
            u.div_(mean).clamp_(min=MOST**-2).rsqrt_()
        return found

    def _learnt(self, noisy: NoisySum, weights: dict[str, torch.Tensor], steps: int) -> dict[str, torch.Tensor]:
        updates = noisy.mean()
        for name, w in weights.items():
            updates[name].div_(w)
        self._second.update(updates)
        self._std = noisy.mean_noise_std if noisy.noise_multiplier else 0.0
        if not self.preconditions:
            return updates
        self._first.update(updates)
        if self.decoder.observing:  # in the coordinates of the clipped sum it is held against
            first = self._first.tensors
            self.decoder.note({name: m * weights[name] if name in weights else m for name, m in first.items()})
        for name, update in updates.items():
            root = (self._second.tensors[name] / self._second.correction(steps)).sqrt_().add_(EPSILON)
            update.copy_(self._first.tensors[name]).div_(self._first.correction(steps)).div_(root)
        return updates

    def state_dict(self) -> dict[str, torch.Tensor]:
        import torch

        kept = self._first.state_dict() | self._second.state_dict()
        return kept | {"std": torch.tensor(self._std, dtype=torch.float64)} if kept else {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._first.load_state_dict(state)
        self._second.load_state_dict(state)
        self._std = float(state.get("std", 0.0))
