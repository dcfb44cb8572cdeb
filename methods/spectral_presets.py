"""Full fine-tuning with spectrally denoised releases (Dadsetan & Rudzicz, 2510.01137): presets of the decoder `rmt`."""

from typing import ClassVar

from dpft.methods.full import DPAdam


class RMT(DPAdam):
    """Tracy-Widom threshold, the shrinker that is optimal in squared error: nothing to tune.

    What is kept has the norm of the release again, and a matrix of which nothing stands out passes raw. Version 1 did neither:
    most matrices are below the threshold at usual budgets, it stood still on these and learnt less (RESULTS.md).
    """

    name = "rmt"
    version = 2
    summary = "dp-adam on spectrally denoised releases, threshold from the noise level"
    reference = "arXiv:2510.01137"
    defaults: ClassVar = {**DPAdam.defaults, "decoder": "rmt"}
    decoder_options: ClassVar = {"norm_correction": "noisy", "empty": "raw"}


class RMTPaper(RMT):
    """The three steps as published: kappa times the bulk edge, shrink, the norm of the release again.

    The text fixes neither kappa, nor the loss of the shrinker, nor the target of the norm: each is an option.
    """

    name = "rmt-paper"
    version = 1
    summary = "spectral denoising as published: kappa times the edge, shrink, norm restored"
    decoder_options: ClassVar = {"threshold": "kappa", "kappa": 1.0, "norm_correction": "noisy", "empty": "raw"}


class RMTMomentum(RMT):
    """Filter first, then denoise: the running mean of releases has less noise, so more signal stands out of it."""

    name = "rmt-momentum"
    version = 1
    summary = "spectral denoising of Adam's first moment, its second from raw releases"
    decoder_options: ClassVar = {"input": "ema"}


class RMTGated(RMT):
    """Each matrix is denoised or left raw, whichever Stein's estimate from the release says is better aligned."""

    name = "rmt-gated"
    summary = "spectral denoising where an estimate from the release says that it helps"
    decoder_options: ClassVar = {**RMT.decoder_options, "gate": True}


class ProfilePartial(RMT):
    """Singular values part of the way from noisy to restored: (1 - rho) y + rho eta(y)."""

    name = "profile-partial"
    summary = "singular values restored in part"
    decoder_options: ClassVar = {**RMT.decoder_options, "shrinker": "partial", "rho": 0.5}
