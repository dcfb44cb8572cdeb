"""Full fine-tuning with other decoders than dp-adam's: DOPPLER, DP-AdamBC and DP-Muon, as presets."""

from typing import ClassVar

from dpft.methods.full import DPAdam


class DPDoppler(DPAdam):
    """DP-Adam on low-pass filtered releases (Zhang et al., 2408.13460)."""

    name = "dp-doppler"
    summary = "dp-adam on low-pass filtered releases"
    reference = "arXiv:2408.13460"
    claim = "3 to 10% in test accuracy over no filter (arXiv:2408.13460, abstract)"
    defaults: ClassVar = {**DPAdam.defaults, "decoder": "doppler"}


class DPAdamBC(DPAdam):
    """DP-Adam without the noise's share of the second moment (Tang et al., 2312.14334)."""

    name = "dp-adambc"
    summary = "dp-adam, second moment corrected for the noise"
    reference = "arXiv:2312.14334"
    claim = "up to 3.5% over DP-Adam on images, text and graphs (arXiv:2312.14334, abstract)"
    defaults: ClassVar = {**DPAdam.defaults, "decoder": "adambc"}


class DPMuon(DPAdam):
    """Muon on the matrices of the body, Adam on the rest (Kim & Fan, 2605.12994)."""

    name = "dp-muon"
    summary = "orthogonalised momentum of releases, Adam beside it"
    reference = "arXiv:2605.12994"
    defaults: ClassVar = {**DPAdam.defaults, "decoder": "muon"}
