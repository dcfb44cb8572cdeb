"""Known ways to get differential privacy wrong: what is planted, and what the audit must say of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dpft.harness.audit import plants


@dataclass(frozen=True)
class Bug:
    """plant: a context in which the code has the bug; rings: the violation that must be found; changes: of the spec;
    method: in which it is planted."""

    name: str
    about: str
    rings: str
    plant: Callable[[], contextlib.AbstractContextManager]
    changes: dict[str, Any] = field(default_factory=dict)
    method: str = "dp-adam"


SMALL, FAR, REPEATED = "noise too small", "sensitivity exceeds the clip norm", "noise is repeated"
RATE, POISSON, LEAK = (
    "sampling rate is not the certified one",
    "sampling is not Poisson",
    "weights do not follow from the releases",
)
BUGS = (
    Bug("noise-over-batch", "sigma C / B is added to the sum", SMALL, plants.noise_over_batch),
    Bug("noise-root-two", "noise of half the variance", SMALL, plants.half_the_variance),
    Bug("microbatch-noise", "noise by microbatch, the last one forgotten", SMALL, plants.noise_per_microbatch),
    Bug("second-release", "two noisy sums of one batch, booked once", SMALL, plants.second_release),
    Bug(
        "half-booked", "every other step is left out of the ledger", "releases that are not booked", plants.half_booked
    ),
    Bug("vectors-without-noise", "biases and norms are released as they are", SMALL, plants.weights_only),
    Bug("noise-every-step", "the same noise in every step", REPEATED, lambda: plants.reseeded(False)),
    Bug("noise-every-tensor", "the same noise in every tensor", REPEATED, lambda: plants.reseeded(True)),
    Bug("no-clip", "nothing is clipped", FAR, plants.no_clip),
    Bug("clip-after-sum", "the sum of a microbatch is clipped", FAR, plants.clip_after_sum),
    Bug("layer-clip", "every layer is clipped to C", FAR, plants.layer_clip, {"clip_groups": "layer"}),
    Bug("bf16-norms", "norms are rounded to bfloat16", FAR, plants.half_precision_norms),
    Bug(
        "realised-size",
        "divided by the realised batch size",
        "noise depends on the step or the batch",
        plants.realised_size,
    ),
    Bug("double-rate", "q is twice what is booked", RATE, plants.doubled_rate),
    Bug("shuffled", "shuffled epochs, booked as Poisson", POISSON, plants.shuffled),
    Bug("fixed-size", "batches of fixed size, booked as Poisson", POISSON, plants.fixed_size),
    Bug("clean-mask", "a mask chosen from clean gradients", LEAK, plants.mask),
    Bug("clean-decoder", "a decoder that sees clean gradients", LEAK, plants.clean_decoder),
    Bug(
        "clean-projection",
        "a projection chosen from clean gradients (dp-grape)",
        LEAK,
        plants.clean_projection,
        {"refresh": 1},
        "dp-grape",
    ),
)
