"""Full fine-tuning: DP-SGD (Abadi et al., 1607.00133), DP-Adam (Li et al., 2110.05679) and the two controls."""

from typing import ClassVar

from dpft.harness.query.queries import Nothing
from dpft.methods.base import Method


class DPSGD(Method):
    """Per-example clipping, Gaussian noise, stochastic gradient descent, on every parameter."""

    name = "dp-sgd"
    summary = "full fine-tuning, clipped and noised gradients, SGD"
    reference = "arXiv:1607.00133"
    claim = "CIFAR-10 73% at eps 8, convolutions from CIFAR-100 (arXiv:1607.00133, figure 6)"
    defaults: ClassVar = {"optimizer": "sgd", "lr": 0.02, "clip_norm": 2.0, "momentum": 0.0}
    options: ClassVar = {"head_lr_factor": 1.0}


class DPAdam(Method):
    """DP-SGD's release fed to Adam, on every parameter."""

    name = "dp-adam"
    summary = "full fine-tuning, clipped and noised gradients, Adam"
    reference = "arXiv:2110.05679"
    claim = "SST-2 93.8 at eps 8, RoBERTa-large; E2E BLEU 63.2, GPT-2 (quoted in arXiv:2206.07136)"
    defaults: ClassVar = {"optimizer": "adam", "lr": 1e-4, "clip_norm": 2.0}
    options: ClassVar = {"head_lr_factor": 100.0}


class NonPrivate(Method):
    """The same loop and batches without clipping and without noise: what privacy costs is measured against it."""

    name = "non-private"
    summary = "control: no clipping, no noise, no privacy"
    private = False
    control = True
    defaults: ClassVar = {"optimizer": "adamw", "lr": 1e-4}
    options: ClassVar = {"head_lr_factor": 1.0}


class NoiseOnly(Method):
    """DP-Adam whose clipped sum is zero: the value a method reaches by noise alone."""

    name = "noise-only"
    summary = "control: dp-adam with the signal removed, noise and budget as there"
    control = True
    asks = (Nothing,)
    defaults: ClassVar = DPAdam.defaults
    options: ClassVar = DPAdam.options

    def step(self, ask, step):
        (noisy,) = ask(gradient=Nothing())
        return self.decoder.decode(noisy, step)
