"""Running means of releases and of their squares, as Adam keeps them, for decoders that filter or precondition."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]
EPSILON = 1e-8  # Adam's


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


class Adam:
    """Adam's direction, from moments of its own in whatever shape the releases have (Kingma & Ba, 1412.6980)."""

    def __init__(self, beta: float = 0.9, beta2: float = 0.999):
        self._moments = (Moment("adam_first", beta), Moment("adam_second", beta2, squared=True))

    def precondition(self, releases: Tensors, steps: Callable[[str], int]) -> None:
        """Turn releases into directions, in place. steps(name): how many of them its moments have seen, with this one."""
        first, second = self._moments
        for moment in self._moments:
            moment.update(releases)
        for name, release in releases.items():
            root = (second.tensors[name] / second.correction(steps(name))).sqrt_().add_(EPSILON)
            release.copy_(first.tensors[name]).div_(first.correction(steps(name))).div_(root)

    def forget(self, names: Iterable[str]) -> None:
        """Let the moments of these parameters start anew."""
        for name in names:
            for moment in self._moments:
                moment.tensors.pop(name, None)

    def state_dict(self) -> Tensors:
        return self._moments[0].state_dict() | self._moments[1].state_dict()

    def load_state_dict(self, state: Tensors) -> None:
        for moment in self._moments:
            moment.load_state_dict(state)


def mean_noise_factor(beta: float, steps: int) -> float:
    """Noise of the bias-corrected running mean over that of one release, after `steps` of them: .229 at .9 in the limit."""
    if beta == 0:
        return 1.0
    variance = (1 - beta) ** 2 * (1 - beta ** (2 * steps)) / ((1 - beta**2) * (1 - beta**steps) ** 2)
    return variance**0.5
