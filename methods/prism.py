"""PRISM: LoRA whose clip and noise see the product of the factors, not the factors (2606.00944)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients
from dpft.methods.decoders.base import refuse_decoder
from dpft.methods.decoders.moments import Adam
from dpft.methods.lora import DPLoRA
from dpft.methods.tangent import Tangent, basis
from dpft.methods.tangent_adam import TangentAdam

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.queries import Ask
    from dpft.harness.runs.spec import RunSpec


class Prism(DPLoRA):
    """Low-rank adapters and head; an adapter's gradient is projected on the tangent space at its product s B A.

    With U, V orthonormal bases of B's columns and A's rows, `U^T G` and `(I - U U^T) G V` of every adapter and the head's
    gradient are clipped and noised in one ball (methods/tangent.py). Both are linear in LoRA's own gradients s B^T G and s G A^T,
    so G is never formed. Noise is isotropic in the tangent space; neither it nor the clip nor the step depends on alpha or on how
    the product is shared between the factors. The step goes to the nearest matrix of rank r, with balanced factors.

    optimizer=adam: the paper's, in tangent coordinates (methods/tangent_adam.py); `noise_floor`, in variances of the known noise,
    is the least that it divides by. optimizer=sgd: the noisy mean itself. start: `spectral`, the adapter holds the leading
    singular directions of its weight, which the frozen weight gives up (PiSSA, through PEFT); or `zero`, LoRA's. There
    B has no columns, so at first only (I - U U^T) G V = G V is asked for.

    Rank, floor and spectral start as in the authors' code; their clip norm is 1, their lr 2e-4 to 3e-4, and they adapt MLPs, too.
    Not as there: they divide by the realised batch, add no noise to an empty one, and project by a pseudo-inverse with a
    cutoff but scale noise by a damped root, so that along short directions of a factor there is less noise than is booked;
    one decomposition makes both here, and what is below its tolerance is not asked for at all.

    Prediction: the gain over dp-lora grows with the imbalance of LoRA's factors, as alpha moves it.
    """

    name = "prism"
    summary = "low-rank adapters and head; clip, noise and step on the product of the factors"
    reference = "arXiv:2606.00944"
    one_space = False
    claim = "mean of GLUE and Math-10K .690 at eps 6; LoRA+ .674 (arXiv:2606.00944, quoted by papernotes.org)"
    options: ClassVar = {**DPLoRA.options, "rank": 16, "start": "spectral", "noise_floor": 0.5}
    choices: ClassVar = {"start": ("spectral", "zero")}
    ranges: ClassVar = {"rank": (1, float("inf")), "alpha": (1, float("inf")), "noise_floor": (0.0, float("inf"))}

    def __init__(self, options=None, decoder=None):
        super().__init__(options, decoder)
        self._adam, self._tangent_adam = Adam(), TangentAdam(self.settings["noise_floor"])

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        refuse_decoder(self.decoder, "The coordinates of prism turn with every step, which decoders do not know")
        if spec.weight_decay:
            raise BadInput(
                "Weight decay would pull the adapters to zero, which hold a part of the pretrained weights; leave it out."
            )
        if spec.optimizer == "sgd" and spec.momentum:
            raise BadInput("prism under SGD carries no momentum; set momentum=0 or optimizer=adam.")

    def skip(self, model: nn.Module) -> str | None:
        reason = super().skip(model)
        if reason is not None:
            return reason
        targets, rank = set(self._targets(model)), self.settings["rank"]
        found = {name: m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in targets}
        for name, module in found.items():
            weight = getattr(module, "weight", None)
            if weight is None or weight.dim() != 2 or hasattr(module, "num_embeddings"):
                return f"prism adapts linear layers, which {name} is not; choose other `targets`."
            if rank > min(weight.shape):
                return f"{name} has no {rank} directions on each side; lower `rank` to {min(weight.shape)}."
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        model = super().prepare(model, generator)
        self._pairs, self._layers = (
            {},
            {},
        )  # by path: names of the factors and the scaling; the layers that hold the factors
        for path, module in model.named_modules():
            for adapter, scaling in getattr(module, "scaling", {}).items() if hasattr(module, "lora_A") else ():
                names = (f"{path}.lora_{side}.{adapter}.weight" for side in "AB")
                self._pairs[path] = (*names, scaling)
                self._layers[path] = (module.lora_A[adapter], module.lora_B[adapter])
        return model

    @property
    def variant(self) -> dict[str, str]:
        return {"init_lora_weights": "pissa_niter_16"} if self.settings["start"] == "spectral" else {}

    def optimizer(self, parameters, head, spec) -> torch.optim.Optimizer:
        self.preconditions = spec.optimizer != "sgd"
        return super().optimizer(parameters, head, spec)

    def step(self, ask: Ask, step: int) -> dict[str, torch.Tensor]:
        spaces, encodings = {}, {}
        factors = {path: [layer.weight.detach() for layer in pair] for path, pair in self._layers.items()}
        for path, (a, b, scaling) in self._pairs.items():
            spaces[path] = Tangent(basis(factors[path][1]), basis(factors[path][0].mT), scaling)
            encodings[a], encodings[b] = spaces[path].encodings()
        (noisy,) = ask(gradient=Gradients(encodings=encodings))
        release = noisy.mean()
        inside = {
            path: spaces[path].inside((release.pop(a), release.pop(b))) for path, (a, b, _) in self._pairs.items()
        }
        seen = {n: t.float() for path, x in inside.items() for n, t in zip(self._pairs[path], x, strict=False)}
        self.decoder.note({**release, **seen})
        if self.preconditions:
            self._adam.precondition(release, lambda name: 1 + step)
        lr = self.spec.lr * self.spec.lr_factor(step)  # of the bodies' group, as the loop sets it
        for path, (a, b, _) in self._pairs.items():
            x, space = inside[path], spaces[path]
            if self.preconditions:
                x = self._tangent_adam.direction(path, space, x, noisy.mean_noise_std, 1 + step)
            new = reversed(space.retracted(x, lr))
            for name, old, factor in zip((a, b), factors[path], new, strict=True):
                release[name] = ((old - factor) / lr).to(
                    old.dtype
                )  # plain SGD takes old - lr u, which is to be the factor
        return release

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            **{f"head|{key}": t for key, t in self._adam.state_dict().items()},
            **{f"tangent|{key}": t for key, t in self._tangent_adam.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for label, owner in (("head|", self._adam), ("tangent|", self._tangent_adam)):
            owner.load_state_dict({k.removeprefix(label): t for k, t in state.items() if k.startswith(label)})
