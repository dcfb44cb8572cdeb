"""What the tests of noise mechanisms share."""

import torch

from dpft.harness.privacy import Ledger, noise_kinds
from dpft.harness.privacy.calibration import Noise
from dpft.harness.privacy.scale_law import parse

DELTA = 1e-5


def spherical(multiplier, dimension, law=None, mechanism=None):
    parameters = {"shape": "spherical", "dimension": dimension}
    if law is not None:
        found = parse(law)
        parameters["law"] = str(found.scaled(noise_kinds.spread(found, dimension) / multiplier))
    return Noise(mechanism or ("laplace" if law is None else "lmo"), multiplier, parameters)


def events_of(noise, q, steps):
    ledger = Ledger()
    ledger.append(0, q, [noise.entry("gradient")])
    return [{**ledger.events[0], "step_to": steps}]


def parts(a=30, b=10):
    return {"a": torch.zeros(a), "b": torch.zeros(b)}
