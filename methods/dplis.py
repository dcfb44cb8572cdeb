"""DPlis: the loss is smoothed over random steps away from the weights (Wang et al., 2103.01496)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from dpft.methods import projection
from dpft.methods.full import DPAdam
from dpft.methods.smoothing import Smoothed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.methods.smoothing import Weights


class DPlis(Smoothed):
    """DP-Adam on the mean loss over `samples` random steps away from the weights (DPlis, 2103.01496).

    Example i's loss is `(1/K) sum_k f_i(w + e_k)`, e_k ~ N(0, radius^2 std^2); its gradient is clipped once and released with
    noise sigma C, whatever K is. std is what the noise of one release moves a weight by: `lr sigma C/B` under SGD, and lr
    under Adam, which makes steps of noise alone that long. The head counts with the body's lr: at its own its logits would
    be noise. The e_k are public, others in every step, the same for all examples.

    The authors' code: radius 20 and K = 10 for CIFAR-10 (here 4, for what it costs), and two things that are easy to carry
    over wrongly. Its lr multiplies sums, so that its std `lr sigma C` is `lr sigma C/B` of ours; and it clips the *sum* of
    the K gradients at C, so that K is also a smaller clip norm. Here it is the mean.
    K forward and backward passes per step, and K sets of weights and activations at once.

    Prediction: no gain over dp-adam at K times the cost.
    """

    name = "dplis"
    summary = "dp-adam on losses averaged over random steps away from the weights"
    reference = "arXiv:2103.01496"
    options: ClassVar = {**DPAdam.options, "samples": 4, "radius": 20.0}
    ranges: ClassVar = {"samples": (1, 1000), "radius": (0.0, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._noise_std = -1.0  # sigma C/B of the last release; below 0 before the first

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        import torch

        self._seed = int(torch.randint(1 << 62, (), generator=generator))
        return super().prepare(model, generator)

    def points(self, step: int) -> Iterator[Weights]:
        import torch

        std = self.std(step)
        for k in range(int(self.settings["samples"])):
            random: dict[torch.device, torch.Generator] = {}
            moved = {}
            for name, p in self._parameters.items():
                if p.device not in random:
                    random[p.device] = projection.generator(p.device, self._seed, step, k)
                draw = torch.randn(p.shape, generator=random[p.device], dtype=torch.float32, device=p.device)
                moved[name] = p + draw.mul_(std).to(p.dtype)
            yield moved

    def std(self, step: int) -> float:
        """Of one entry of a step away from the weights."""
        rate = self.spec.lr * self.spec.lr_factor(step)
        return self.settings["radius"] * rate * (self._noise_std if self.spec.optimizer == "sgd" else 1.0)

    def learn(self, noisy) -> None:
        self._noise_std = noisy.mean_noise_std if noisy.noise_multiplier else 0.0

    def _has_release(self) -> bool:
        return self._noise_std >= 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        import torch

        return super().state_dict() | {"noise_std": torch.tensor(self._noise_std, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._noise_std = float(state["noise_std"])
        super().load_state_dict({key: tensor for key, tensor in state.items() if key != "noise_std"})
