"""DP-SAPF: privatised gradients choose the matrices that get adapters (Gong et al., 2605.30312).

Prediction: no better than dp-lora on the attention projections by more than .5 points. Half the adapters have half the noise, a
gain of at most sqrt(2) in alignment, and the attention projections are a good choice that costs no steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.layers import is_linear
from dpft.harness.query.queries import Gradients
from dpft.methods.decoders.base import refuse_decoder
from dpft.methods.lora import DPLoRA
from dpft.methods.phases import Phases

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.queries import Ask
    from dpft.harness.query.updates import Updates
    from dpft.harness.runs.spec import RunSpec

OF_B = ".lora_B."


class SAPF(Phases, DPLoRA):
    """DP-LoRA whose adapters sit on all linear layers of the body; releases choose the `selected_fraction` of them that train.

    Warm-up (`warmup_fraction` of the steps, at least one): the head alone, because through a head of zeros no gradient reaches
    the body. Probe (`selection_fraction`, at least one): no weight moves, and every adapter's B alone is asked for, for A has
    no gradient while B = 0; behind a young head gradients are short (.8 on MiniLM where C is 2), so the bound is
    `probe_clip_factor` of the run's, unless a clipping rule moves it. Training: chosen adapters and head are asked for; the
    others are not, and have no noise. An adapter's score is the root mean square of the mean release of its B, that is, its norm
    over what the norm of the noise alone would be, `tau sqrt(d)`, up to the tau that all share: noise favours no size. B's
    gradient is that of the matrix, projected at random, `(alpha/r) G A^T`: of its n columns r, so that noise has r/n of the
    energy that it would have in a release of the matrix itself, as in the paper. Shares and warm-up are ours: the paper's image
    models have no new head.
    """

    name = "dp-sapf"
    summary = "low-rank adapters on the matrices that privatised gradients choose, and head"
    reference = "arXiv:2605.30312"
    claim = "synthetic CIFAR-10 74.6 at eps 10, unselected 41.0 (github.com/2019ChenGong/DP-SAPF, plot/ablation.py)"
    options: ClassVar = {
        **DPLoRA.options,
        "targets": "linear",
        "warmup_fraction": 0.1,
        "selection_fraction": 0.05,
        "selected_fraction": 0.5,
        "probe_clip_factor": 0.25,
    }
    ranges: ClassVar = {**Phases.phases, "selected_fraction": (1e-6, 1.0), "probe_clip_factor": (1e-6, 1e6)}
    choosing = "probe"
    chosen_parts = "adapters"
    withholds = True

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._sums: dict[str, torch.Tensor] = {}  # by adapter, of the probe's releases so far
        self.selected: tuple[str, ...] = ()

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        self.check_phases(spec)
        refuse_decoder(
            self.decoder,
            f"{self.name} has parameters whose first release comes late, which decoders that count steps do not know",
        )
        if spec.mechanism != "gaussian" and spec.noise_shape == "spherical":
            raise BadInput(
                f"{self.name} releases sums of several sizes, and spherical noise is certified for one; leave out "
                f"mechanism={spec.mechanism}."
            )

    def skip(self, model: nn.Module) -> str | None:
        if self.settings["targets"] == "linear" and not self._targets(model):
            return f"{self.name} finds no linear layer outside the head; set `targets` to module names."
        return super().skip(model) if model.head_parameters else f"{self.name} warms up a head and this model has none."

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        model = super().prepare(model, generator)
        self._head = frozenset(model.head_parameters)
        names = [name for name, p in model.named_parameters() if p.requires_grad and name not in self._head]
        self.adapters = {n.partition(OF_B)[0]: n for n in names if OF_B in n}  # the layer's name -> its B
        self._parts = {layer: [n for n in names if n.startswith(f"{layer}.lora_")] for layer in self.adapters}
        return model

    def _targets(self, model: nn.Module) -> list[str]:
        if self.settings["targets"] != "linear":
            return super()._targets(model)
        head = {name.rpartition(".")[0] for name in model.head_parameters}
        return [name for name, module in model.named_modules() if is_linear(module) and name not in head]

    def step(self, ask: Ask, step: int) -> Updates:
        kind = self.kind(step)
        if kind == self.choosing:
            bound = None if self.rule.adaptive else self.spec.clip_norm * self.settings["probe_clip_factor"]
            (noisy,) = ask(gradient=Gradients(only=frozenset(self.adapters.values()), bound=bound))
            self._add(self.decoder.decode(noisy, step))
            if self.kind(step + 1) == "training":
                self.selected, self._sums = self._best(), {}
            return {}
        chosen = self.selected if kind == "training" else ()
        only = self._head.union(*(self._parts[layer] for layer in chosen))
        (noisy,) = ask(gradient=Gradients(only=only))
        return {name: part for name, part in self.decoder.decode(noisy, step).items() if name in only}

    def _add(self, parts: dict[str, torch.Tensor]) -> None:
        for layer, name in self.adapters.items():
            kept = self._sums.get(layer)
            self._sums[layer] = parts[name] if kept is None else parts[name].add(kept.to(parts[name]))

    def _best(self) -> tuple[str, ...]:
        """The layers with the best scores."""
        scores = {layer: float(total.square().mean()) for layer, total in self._sums.items()}
        count = max(1, round(self.settings["selected_fraction"] * len(scores)))
        return tuple(sorted(scores, key=lambda layer: -scores[layer])[:count])

    def state_dict(self) -> dict[str, torch.Tensor]:
        import torch

        layers = list(self.adapters)
        own = {f"sum|{layer}": total for layer, total in self._sums.items()}
        return own | {"selected": torch.tensor([layers.index(layer) for layer in self.selected], dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        layers = list(self.adapters)
        self.selected = tuple(layers[i] for i in state["selected"].tolist())
        self._sums = {key.removeprefix("sum|"): t for key, t in state.items() if key.startswith("sum|")}
