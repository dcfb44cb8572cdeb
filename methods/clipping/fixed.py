"""Rules whose bound is the run's clip norm from first step to last; harness/engine/clipping.py has their functions."""

from __future__ import annotations

from dpft.methods.clipping.base import ClippingRule


class Abadi(ClippingRule):
    """min(1, C/norm): what is longer than C is cut to it."""

    name = "abadi"
    summary = "gradients longer than C are scaled down to C"
    reference = "arXiv:1607.00133"
    function = "abadi"


class AutoS(ClippingRule):
    """C/(norm + 0.01): every gradient is normalised, so C and the learning rate are one knob."""

    name = "auto-s"
    summary = "every gradient is scaled to almost C, short ones too"
    reference = "arXiv:2206.07136"
    function = "auto-s"


class PSAC(ClippingRule):
    """C/(norm + r/(norm + r)), r = 0.01: as auto-s, with the smallest gradients weighted less."""

    name = "psac"
    summary = "as auto-s, the smallest gradients weighted less"
    reference = "arXiv:2212.00328"
    function = "psac"
