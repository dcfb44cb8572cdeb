"""Zeroth-order training: DPZero (2310.09639), DP-ZO (2401.04343), and with several directions DP-AggZO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Values
from dpft.harness.query.updates import LazyUpdates
from dpft.methods.base import Method, freeze_all_but
from dpft.methods.random_directions import Directions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.elsewhere import Elsewhere
    from dpft.harness.query.queries import Ask, Point, Seen
    from dpft.harness.runs.spec import RunSpec


class DPZO(Method):
    """No gradients: each example says how its loss changes along K public random directions z_k ~ N(0, I), new in every step.

    With `d_ik = (loss_i(w + phi z_k) - loss_i(w - phi z_k)) / (2 phi)`, in evaluation mode, the row `v_i = (d_i1 .. d_iK) / K` is
    clipped to clip_norm as one vector. K numbers are released, v; the update is `sum_k v_k z_k`, on average the gradient. Two
    forward passes a direction, in the memory of inference and of the largest tensor, whatever K.
    With directions=1, mechanism=laplace and noise_shape=coordinates the one number may have a pure epsilon: delta=0 (2401.04343).
    directions: K; 1 is DPZero. smoothing: phi; weights in half precision, and precision=bf16, round losses by more than it
    moves them. trains: all, or the head alone. A gradient of norm g makes a row of about g / sqrt(K): clip_norm goes with K.
    """

    name = "dp-zo"
    summary = "no gradients: differences of losses along K random directions, K numbers released"
    reference = "arXiv:2401.04343"
    claim = "1.86% lost to privacy at eps 1, OPT-66B, 1,000 examples of SQuAD (arXiv:2401.04343, abstract of version 1)"
    asks = (Values,)
    defaults: ClassVar = {"optimizer": "sgd", "lr": 1e-3, "clip_norm": 0.5}  # that of dp-sgd, over sqrt(16)
    options: ClassVar = {"directions": 16, "smoothing": 1e-3, "trains": "all", "head_lr_factor": 1.0}
    choices: ClassVar = {"trains": ("all", "head")}
    ranges: ClassVar = {"directions": (1, float("inf")), "smoothing": (1e-6, 1.0)}

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        if (spec.clipping, spec.clip_groups) != ("abadi", "flat"):
            raise BadInput(
                f"{self.name} asks for no gradients, and its row of numbers is clipped as one vector to clip_norm; leave out "
                "clipping and clip_groups."
            )
        if spec.decoder != "mean":
            raise BadInput(
                f"{self.name} releases {self.settings['directions']} numbers, no gradient; leave out decoder."
            )
        alone = self.settings["directions"] == 1 and (spec.mechanism, spec.noise_shape) == ("laplace", "coordinates")
        if spec.mechanism != "gaussian" and not alone:
            raise BadInput(
                f"{self.name} has Gaussian noise, and with directions=1 also mechanism=laplace with noise_shape=coordinates; "
                "take one of them."
            )

    @property
    def numbers(self) -> int:
        return self.settings["directions"]

    def skip(self, model: nn.Module) -> str | None:
        if self.settings["trains"] == "head" and not model.head_parameters:
            return f"{self.name} with trains=head needs a head and this model has none; set trains=all."
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        import torch

        if self.settings["trains"] == "head":
            freeze_all_but(model, set(model.head_parameters))
        self._model = model
        self._seed = int(torch.randint(2**62, (), generator=generator))
        return model

    def releases(self, step: int) -> dict[str, float]:
        return {"values": 1.0}

    def step(self, ask: Ask, step: int) -> LazyUpdates:
        count, phi = self.settings["directions"], self.settings["smoothing"]
        weights = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        directions = self._directions(step)
        points = [_point(directions, k, weights, side) for k in range(count) for side in (phi, -phi)]
        of = partial(differences, scale=2 * phi * count)
        (noisy,) = ask(values=Values(size=count, of=of, bound=self.spec.clip_norm, at=points))
        numbers = {name: number for number, name in enumerate(weights)}
        return LazyUpdates(
            dict.fromkeys(weights, noisy.values),
            lambda name, values: directions.summed(values, numbers[name], weights[name]),
            lambda name, values, p, scale: directions.add(values, numbers[name], p, p, scale),
        )

    def _directions(self, step: int) -> Directions:
        """Those of a step: of public things alone."""
        return Directions(self._seed, step)


def differences(seen: Seen, scale: float) -> torch.Tensor:
    """[b, K] of losses [b, 2K], there and back of each direction side by side."""
    losses = seen.losses.double()
    return (losses[:, 0::2] - losses[:, 1::2]) / scale


def _point(directions: Directions, k: int, weights: dict[str, nn.Parameter], distance: float) -> Point:
    """Where the model computes with `distance * z_k` added to its weights."""

    def elsewhere() -> Elsewhere:
        from dpft.harness.query.elsewhere import Elsewhere

        moved: dict[int, Callable[[], torch.Tensor]] = {
            id(p): partial(directions.moved, k, number, p, distance) for number, p in enumerate(weights.values())
        }
        looked_up: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
            id(p): partial(directions.looked_up, k, number, p, distance)
            for number, p in enumerate(weights.values())
            if p.dim() == 2
        }
        return Elsewhere(moved, looked_up)

    return elsewhere
