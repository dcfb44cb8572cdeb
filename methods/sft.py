"""DP-SFT: a few numbers per example, its gradient's parts along the leading directions of a trajectory (2601.11113).

Prediction: with subspace=public no more than last-layer, because words and sentences agree on few directions; with
subspace=released less, because at the noise of these runs the leading directions of releases are those of noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients, Values
from dpft.methods import trajectory
from dpft.methods.base import freeze_all_but
from dpft.methods.decoders.moments import Adam
from dpft.methods.lora import DPLoRA

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.queries import Ask
    from dpft.harness.query.updates import Updates
    from dpft.harness.runs.spec import RunSpec


class DPSFT(DPLoRA):
    """P [d, k] has orthonormal columns; example i answers with `P^T g_i`, clipped to clip_norm as one vector; the update is P v.

    k: `directions`; d: of the head (`trains=head`), or of it and adapters as dp-lora has them (`adapters`): P takes k times that
    room. The numbers are `(loss_i(w + phi p_j) - loss_i(w - phi p_j)) / (2 phi)`, phi the `smoothing`: 2k forward passes, for an
    encoding acts on one parameter at a time and P mixes them. Adam has its moments in the k numbers, as elsewhere it would lead
    out of the subspace; lr goes along unit vectors, so it is larger than others'. subspace: `public`, leading singular vectors
    of the gradients of `trajectory_steps` steps on public batches, after which weights are put back; `released`, those of the
    releases of ordinary steps, the first `warmup_fraction` of the run's. Both trajectories are Adam's at `trajectory_lr_factor`
    times lr, of the head `head_lr_factor` times that. A private one without noise, as in the paper's code, is refused.
    """

    name = "dp-sft"
    summary = "k numbers per example: its gradient along directions of a public or released trajectory"
    reference = "arXiv:2601.11113"
    claim = "SST-2 at eps 4, RoBERTa-base: 90.1 by IMDB's subspace, 78.9 by a released one (arXiv:2601.11113)"
    asks = (Values,)
    needs_public = True
    defaults: ClassVar = {"optimizer": "adam", "lr": 0.1, "clip_norm": 1.0}
    options: ClassVar = {
        **DPLoRA.options,
        "directions": 8,
        "smoothing": 1e-2,
        "subspace": "public",
        "trains": "adapters",
        "warmup_fraction": 0.2,
        "trajectory_steps": 64,
        "trajectory_batch": 32,
        "trajectory_lr_factor": 3e-3,
    }
    choices: ClassVar = {"subspace": ("public", "released"), "trains": ("adapters", "head")}
    ranges: ClassVar = dict.fromkeys(("directions", "trajectory_steps", "trajectory_batch"), (1, float("inf"))) | {
        "smoothing": (1e-6, 1.0),
        "warmup_fraction": (0.0, 1.0),
    }

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self.needs_public = self.settings["subspace"] == "public"
        self.asks = (Values,) if self.needs_public else (Gradients, Values)
        self._path: dict[str, torch.Tensor] = {}  # releases so far, [steps, *shape]
        self._basis: dict[str, torch.Tensor] = {}
        self._adam = Adam()

    def validate(self, spec: RunSpec) -> None:
        if self.settings["subspace"] == "private":
            raise BadInput(
                f"{self.name} takes no subspace of a private trajectory without noise, whose directions tell of examples for "
                "free; set subspace to public or released."
            )
        super().validate(spec)
        if (spec.clipping, spec.clip_groups, spec.decoder) != ("abadi", "flat", "mean"):
            raise BadInput(f"{self.name} clips and releases rows of numbers; leave out clipping, clip_groups, decoder.")
        if spec.mechanism != "gaussian" or spec.weight_decay or spec.momentum:
            raise BadInput(f"{self.name} stays in its subspace; leave out mechanism, momentum, weight_decay.")
        if self._border(spec.steps) >= spec.steps:
            raise BadInput(f"{self.name} has no step left after its warm-up; raise steps, or lower warmup_fraction.")

    def skip(self, model: nn.Module) -> str | None:
        if self.settings["trains"] == "head":
            return None if model.head_parameters else f"{self.name} needs a head and this model has none; use dp-lora."
        return super().skip(model)

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        if self.settings["trains"] == "head":
            freeze_all_but(model, set(model.head_parameters))
        else:
            model = super().prepare(model, generator)
        self._head = frozenset(model.head_parameters)
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.needs_public:
            model = model.to(self.public.device)
            size = self.settings["trajectory_steps"], self.settings["trajectory_batch"]
            path = trajectory.on_public(model, self._weights, self.public, *size, self._ahead, self.spec.lr)
            self._basis, self._adam = trajectory.leading(path, self.settings["directions"]), Adam()
        return model

    def _ahead(self, parts: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """Adam's directions of a trajectory, in units of the run's learning rate; works in place."""
        self._adam.precondition(parts, lambda name: step + 1)
        factor, head = self.settings["trajectory_lr_factor"], self.settings["head_lr_factor"]
        return {name: part.mul_(factor * (head if name in self._head else 1.0)) for name, part in parts.items()}

    def _border(self, steps: int) -> int:
        """The first step that asks for numbers."""
        return 0 if self.needs_public else max(1, round(self.settings["warmup_fraction"] * steps))

    def kind(self, step: int) -> str:
        return "" if self.needs_public else "warm-up" if step < self._border(self.steps) else "training"

    def releases(self, step: int) -> dict[str, float]:
        return {"gradient" if step < self._border(self.steps) else "values": 1.0}

    def step(self, ask: Ask, step: int) -> Updates:
        border = self._border(self.steps)
        if step < border:
            (noisy,) = ask(gradient=Gradients())
            self._path = trajectory.extended(self._path, noisy.mean())
            update = self._ahead(noisy.mean(), step)
            if step + 1 == border:
                self._basis, self._path = trajectory.leading(self._path, self.settings["directions"]), {}
                self._adam = Adam()
            return update
        self._basis = {name: part.to(self._weights[name].device) for name, part in self._basis.items()}
        bound, phi = self.spec.clip_norm, self.settings["smoothing"]
        (noisy,) = ask(values=trajectory.numbers(self._basis, self._weights, phi, bound))
        inside = {"numbers": noisy.values.clone()}
        if self.spec.optimizer != "sgd":
            self._adam.precondition(inside, lambda name: step + 1 - border)
        return trajectory.lifted(self._basis, inside["numbers"])

    def optimizer(self, parameters, head, spec) -> torch.optim.Optimizer:
        self.preconditions = True
        return super().optimizer(parameters, frozenset(), spec)

    def state_dict(self) -> dict[str, torch.Tensor]:
        kept = {"path": self._path, "basis": self._basis}
        own = {f"{kind}|{name}": tensor for kind, tensors in kept.items() for name, tensor in tensors.items()}
        return own | self._adam.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._adam.load_state_dict(state)
        for kind, kept in (("path", self._path), ("basis", self._basis)):
            kept |= {key.removeprefix(f"{kind}|"): t for key, t in state.items() if key.startswith(f"{kind}|")}
