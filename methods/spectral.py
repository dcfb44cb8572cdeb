"""Full fine-tuning with spectrally denoised releases (Dadsetan & Rudzicz, 2510.01137): presets of the decoder `rmt`."""

from typing import ClassVar

from dpft.methods.full import DPAdam


class RMT(DPAdam):
    """Tracy-Widom threshold, the shrinker that is optimal in squared error, no correction: nothing to tune."""

    name = "rmt"
    summary = "dp-adam on spectrally denoised releases, threshold from the noise level"
    reference = "arXiv:2510.01137"
    defaults: ClassVar = {**DPAdam.defaults, "decoder": "rmt"}


class RMTPaper(RMT):
    """The three steps as published: kappa times the bulk edge, shrink, the norm of the release again.

    The text fixes neither kappa, nor the loss of the shrinker, nor the target of the norm: each is an option.
    """

    name = "rmt-paper"
    summary = "spectral denoising as published: kappa times the edge, shrink, norm restored"
    decoder_options: ClassVar = {"threshold": "kappa", "kappa": 1.0, "norm_correction": "noisy", "empty": "raw"}


class RMTMomentum(RMT):
    """Filter first, then denoise: the running mean of releases has less noise, so more signal stands out of it."""

    name = "rmt-momentum"
    summary = "spectral denoising of Adam's first moment, its second from raw releases"
    decoder_options: ClassVar = {"input": "ema"}


class RMTGated(RMT):
    """Each matrix is denoised or left raw, whichever Stein's estimate from the release says is better aligned."""

    name = "rmt-gated"
    summary = "spectral denoising where an estimate from the release says that it helps"
    decoder_options: ClassVar = {"gate": True}


class ProfilePartial(RMT):
    """Singular values part of the way from noisy to restored: (1 - rho) y + rho eta(y)."""

    name = "profile-partial"
    summary = "singular values restored in part"
    decoder_options: ClassVar = {"shrinker": "partial", "rho": 0.5}
