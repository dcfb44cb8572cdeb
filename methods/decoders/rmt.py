"""Spectral denoising of releases by random matrix theory (Dadsetan & Rudzicz, 2510.01137), its variants and ablations."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.methods.decoders import spectral
from dpft.methods.decoders.base import Decoder
from dpft.methods.decoders.denoise import Plan, denoise
from dpft.methods.decoders.matrices import check_scope, matrix_names, views
from dpft.methods.decoders.moments import EPSILON, Moment, mean_noise_factor

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.noisy_sum import NoisySum


class RMT(Decoder):
    """Singular values that the noise alone explains are dropped, the others shrunk; vectors and embeddings pass through.

    input: `release`, or `ema`: the bias-corrected running mean (beta) of the releases is denoised; with adam or adamw it is then
    divided by the root of Adam's second moment of the raw releases (beta2; at least the noise's variance with `floor`).
    threshold: `kappa` times the bulk edge; `tracy-widom`: at `level` over the number of matrices; `gavish-donoho`.
    shrinker: see spectral.shrink; `power` is p, `rho` the share of partial, `top` the k of rank-k. rank-k and james-stein have
    no threshold. norm_correction: the result keeps its norm (none), or gets that of the signal (unbiased) or release (noisy).
    empty: `zero` or `raw` where nothing survives. gate: a matrix whose estimated cosine is higher raw passes through.
    scope: all matrices, those of the body, or a regular expression on parameter names.
    """

    name = "rmt"
    summary = "singular values shrunk by random matrix theory, at the known noise level"
    reference = "arXiv:2510.01137"
    options: ClassVar = {
        "input": "release",
        "beta": 0.9,
        "beta2": 0.999,
        "floor": False,
        "threshold": "tracy-widom",
        "kappa": 1.0,
        "level": 0.05,
        "shrinker": "frobenius",
        "power": 1.0,
        "rho": 0.5,
        "top": 8,
        "norm_correction": "none",
        "empty": "zero",
        "gate": False,
        "scope": "all",
    }
    choices: ClassVar = {
        "input": ("release", "ema"),
        "threshold": spectral.THRESHOLDS,
        "shrinker": spectral.SHRINKERS,
        "norm_correction": spectral.CORRECTIONS,
        "empty": ("zero", "raw"),
    }
    ranges: ClassVar = {
        "beta": (0.0, 1 - 1e-9),
        "beta2": (0.0, 1 - 1e-9),
        "kappa": (0.0, float("inf")),
        "level": (1e-10, 0.5),
        "power": (0.0, 16.0),
        "rho": (0.0, 1.0),
        "top": (1, float("inf")),
    }

    def __init__(self, options=None):
        super().__init__(options)
        self._first = Moment("first", self.settings["beta"])
        self._second = Moment("second", self.settings["beta2"], squared=True)

    @property
    def exact_without_noise(self) -> bool:
        return self.settings["input"] == "release" and self.settings["shrinker"] in spectral.TENDS_TO_IDENTITY

    @property
    def withholds(self) -> bool:
        return self.settings["empty"] == "zero"

    @property
    def carries(self) -> bool:
        return self.settings["input"] == "ema"

    def validate(self, spec) -> None:
        super().validate(spec)
        self.preconditions = self._is_adam(spec)
        check_scope(self.settings["scope"])
        if self.settings["gate"] and self.settings["shrinker"] not in spectral.CONTINUOUS:
            raise BadInput(
                f"gate needs a continuous shrinker, not {self.settings['shrinker']}: Stein's estimate does not hold where "
                f"singular values jump; choose one of {', '.join(spectral.CONTINUOUS)}."
            )

    def setup(self, model, parameters, head, spec) -> None:
        self._matrices = matrix_names(model, parameters, head, self.settings["scope"])
        self.preconditions = self._is_adam(spec)

    def _is_adam(self, spec) -> bool:
        return self.settings["input"] == "ema" and spec.optimizer != "sgd"

    def decode(self, noisy: NoisySum, step: int) -> dict[str, torch.Tensor]:
        updates, std = noisy.mean(), noisy.mean_noise_std
        if self.settings["input"] == "release":
            self._denoise(updates, std)
            return updates
        if self.preconditions:
            self._second.update(updates)
        self._first.update(updates)
        for name, update in updates.items():
            update.copy_(self._first.tensors[name]).div_(self._first.correction(step + 1))
        self._denoise(updates, std * mean_noise_factor(self.settings["beta"], step + 1))
        if self.preconditions:
            self.note(updates)
            least = std**2 if self.settings["floor"] else 0.0
            for name, update in updates.items():
                square = self._second.tensors[name] / self._second.correction(step + 1)
                update.div_(square.clamp_(min=least).sqrt_().add_(EPSILON))
        return updates

    def _denoise(self, updates: dict[str, torch.Tensor], std: float) -> None:
        """Matrices of equal shape go together, in place."""
        groups: dict[tuple[int, int], dict[str, torch.Tensor]] = defaultdict(dict)
        for name in updates:
            if name in self._matrices:
                for label, view in views(name, updates[name]).items():
                    groups[tuple(view.shape)][label] = view
        count = sum(map(len, groups.values()))
        self.observed = {}
        for (m, n), matrices in groups.items():
            plan = Plan(self._kappa(m, n, count), self.settings, self.observing)
            self.observed |= denoise(matrices, m, n, std, plan)

    def _kappa(self, m: int, n: int, count: int) -> float:
        """The threshold over the bulk edge, of one of `count` matrices."""
        if self.settings["shrinker"] in ("rank-k", "james-stein"):
            return 0.0
        if self.settings["threshold"] == "tracy-widom":
            return spectral.tracy_widom_kappa(m, n, self.settings["level"] / count)
        return self.settings["kappa"] if self.settings["threshold"] == "kappa" else spectral.gavish_donoho_kappa(m, n)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._first.state_dict() | self._second.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._first.load_state_dict(state)
        self._second.load_state_dict(state)
