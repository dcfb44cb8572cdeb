"""DP-GRAPE: per-example gradients are projected at random before they are clipped (2506.15588)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.query.queries import Gradients
from dpft.methods import projection
from dpft.methods.subspace import Subspace

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.encoding import Encoding
    from dpft.harness.query.queries import Ask
    from dpft.harness.query.updates import LazyUpdates


class DPGRAPE(Subspace):
    """DP-Adam in random subspaces: projected per-example gradients are clipped, noised and fed to Adam, its direction lifted.

    The smaller side of every matrix of the body is projected to `rank` coordinates (one that has no more stays as it is);
    vectors and the head train as in dp-adam, and so do embedding tables unless `embeddings` is `projected` (their width). One
    norm is clipped over all of it. Noise and moments have the projected shape. Every `refresh` steps projections are drawn
    anew from the run's seed (only the seed is kept); `reset`: and Adam starts anew. Weight decay is decoupled, as in AdamW. With
    optimizer=sgd the lifted mean is handed to SGD. projection: gaussian, rows (sampled), srht (Hadamard), or identity (the first
    coordinates, a control). projection_scale: unbiased, or the authors' `code`, which is shorter by sqrt(rank): so are the norms
    that are clipped, and the updates.
    """

    name = "dp-grape"
    summary = "dp-adam on randomly projected gradients, noise and moments in the subspace"
    reference = "arXiv:2506.15588"
    one_space = False
    claim = "over 70% less memory than DP-Adam at similar accuracy, RoBERTa-large (arXiv:2506.15588, abstract)"
    options: ClassVar = {
        **Subspace.options,
        "projection": "gaussian",
        "projection_scale": "unbiased",
        "embeddings": "raw",
    }
    choices: ClassVar = {
        "projection": projection.KINDS,
        "projection_scale": projection.SCALES,
        "embeddings": ("raw", "projected"),
    }

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        import torch
        from torch import nn

        model = super().prepare(model, generator)
        self._seed = int(torch.randint(2**62, (), generator=generator))
        self._numbers = {name: number for number, name in enumerate(self.shapes)}
        self._drawn: dict[str, tuple[int, Encoding]] = {}
        if self.settings["embeddings"] == "projected":
            head = set(model.head_parameters)
            tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
            names = [n for n, p in model.named_parameters() if id(p) in tables and n in self.shapes and n not in head]
            self.sides |= {name: 1 for name in names if self.narrows(name, 1)}
        return model

    def narrows(self, name: str, side: int | None = None) -> bool:
        """The identity goes the whole way even where it leaves nothing out, so that it can be compared with dp-adam."""
        return self.settings["projection"] == "identity" or super().narrows(name, side)

    def step(self, ask: Ask, step: int) -> LazyUpdates:
        subspaces = {
            name: self._subspace(name, step, p.device) for name, p in self.weights.items() if name in self.sides
        }
        (noisy,) = ask(gradient=Gradients(encodings=subspaces))
        self._drawn = {}  # the next step draws them again
        return self.lifted(self.decoder.decode(noisy, step), subspaces, step)

    def _subspace(self, name: str, step: int, device: torch.device) -> Encoding:
        """The projection of a parameter in step `step`: drawn once for its release and its update, from what the seed says."""
        refreshed = step // self.settings["refresh"]
        if self._drawn.get(name, (None,))[0] != refreshed:
            self._drawn[name] = (
                refreshed,
                projection.draw(
                    self.settings["projection"],
                    self.shapes[name],
                    self.sides[name],
                    self.settings["rank"],
                    self.settings["projection_scale"],
                    projection.generator(device, self._seed, self._numbers[name], refreshed),
                ),
            )
        return self._drawn[name][1]
