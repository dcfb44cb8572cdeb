"""Running means of releases and of their squares, as Adam keeps them, for decoders that filter or precondition."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


class Moment:
    """`m <- beta m + (1 - beta) x`, elementwise, of x or of x^2; one tensor per parameter, made at the first update."""

    def __init__(self, label: str, beta: float, squared: bool = False):
        self.label, self.beta, self.squared = label, beta, squared
        self.tensors: Tensors = {}

    def update(self, releases: Tensors) -> None:
        """Take in one step's releases; they are left as they are."""
        import torch

        for name, release in releases.items():
            kept = self.tensors.get(name)
            if kept is None:
                kept = self.tensors[name] = torch.zeros_like(release)
            elif kept.device != release.device:  # from a checkpoint
                kept = self.tensors[name] = kept.to(release.device)
            if self.squared:
                kept.mul_(self.beta).addcmul_(release, release, value=1 - self.beta)
            else:
                kept.lerp_(release, 1 - self.beta)

    def correction(self, steps: int) -> float:
        """1 - beta^steps: what the tensors are to be divided by after `steps` updates to be means."""
        return 1 - self.beta**steps

    def state_dict(self) -> Tensors:
        return {f"{self.label}|{name}": tensor for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: Tensors) -> None:
        start = f"{self.label}|"
        self.tensors = {key[len(start) :]: tensor for key, tensor in state.items() if key.startswith(start)}


def mean_noise_factor(beta: float, steps: int) -> float:
    """Noise of the bias-corrected running mean over that of one release, after `steps` of them: .229 at .9 in the limit."""
    if beta == 0:
        return 1.0
    variance = (1 - beta) ** 2 * (1 - beta ** (2 * steps)) / ((1 - beta**2) * (1 - beta**steps) ** 2)
    return variance**0.5
