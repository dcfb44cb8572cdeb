"""DP-GaLore: Adam in the leading singular subspace of a release, the ablation of DP-GRAPE (2506.15588; GaLore: 2403.03507)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients
from dpft.methods.subspace import Subspace

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.encoding import Encoding
    from dpft.harness.query.queries import Ask
    from dpft.harness.query.updates import LazyUpdates
    from dpft.harness.runs.spec import RunSpec


class DPGaLore(Subspace):
    """DP-Adam whose releases, clipped and noised as in dp-adam, are projected on their own leading singular vectors.

    Every `refresh` steps, the first among them, the `rank` leading singular vectors of the smaller side are taken of that step's
    release, so they are post-processing. Only Adam's moments shrink: sums and noise have the full shape. lift_scale multiplies
    the lifted updates of the matrices (GaLore's alpha): their entries are sqrt(rank/side) times Adam's.
    """

    name = "dp-galore"
    summary = "dp-adam with moments in the leading singular subspace of a past release"
    reference = "arXiv:2506.15588"
    one_space = False
    options: ClassVar = {**Subspace.options, "lift_scale": 1.0}
    ranges: ClassVar = {**Subspace.ranges, "lift_scale": (1e-12, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._bases: dict[str, torch.Tensor] = {}

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        if self.decoder.preconditions:
            raise BadInput(
                f"dp-galore runs Adam in its subspace, and the decoder {self.decoder.name} is one in the full space; use "
                "decoder=mean, or dp-grape, where it works in the subspace."
            )

    def step(self, ask: Ask, step: int) -> LazyUpdates:
        (noisy,) = ask(gradient=Gradients())
        if step % self.settings["refresh"] == 0:
            release = noisy.mean()
            self._bases = {name: self._leading(release[name], side) for name, side in self.sides.items()}
        parts = self.decoder.decode(noisy, step)
        subspaces = {name: self._subspace(name, parts[name].device) for name in self.sides}
        for name, subspace in subspaces.items():
            parts[name] = subspace.dense(parts[name][None])[0]
        updates = self.lifted(parts, subspaces, step)
        for name in subspaces:
            updates.parts[name].mul_(self.settings["lift_scale"])
        return updates

    def _leading(self, release: torch.Tensor, side: int) -> torch.Tensor:
        """[side, rank]: eigenvectors of the Gram matrix, which is as small as the side."""
        import torch

        flat = release.flatten(1)
        gram = flat.mT @ flat if side else flat @ flat.mT
        return torch.linalg.eigh(gram).eigenvectors[:, -self.settings["rank"] :].contiguous()

    def _subspace(self, name: str, device: torch.device) -> Encoding:
        from dpft.harness.query.encoding import Encoding

        basis = self._bases[name] = self._bases[name].to(device)  # from a checkpoint
        return Encoding(right=basis) if self.sides[name] else Encoding(left=basis)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | {f"basis|{name}": basis for name, basis in self._bases.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._bases = {key.removeprefix("basis|"): t for key, t in state.items() if key.startswith("basis|")}
        super().load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith("basis|")})
