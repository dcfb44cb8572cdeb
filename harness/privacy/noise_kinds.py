"""The noise mechanisms that can be certified, what each one's parameters must be, and which Gaussian accounts for it.

All noise is added to a sum whose L2 sensitivity is the clip norm C; `noise_multiplier` is always the standard deviation of
one coordinate in units of C.

- gaussian.
- spherical (laplace, lmo, plrv): density exp(-u ||z|| / C), one u a step. laplace: u constant; plrv (2509.06264): u one
  Gamma; lmo (2405.18776): u a sum of Gamma, exponential and uniform terms. Given u it is a Gaussian whose variance is
  itself random, (C S)^2 with S^2 = 2 Gamma((d+1)/2) / u^2 (the Gaussian mixture of exp(-||z||)); u and with it S do not
  depend on data. Accounted by revealing S (harness/privacy/mixtures.py).
- i.i.d. Laplace coordinates under L2 clipping (`shape` coordinates). With F the distribution function of Laplace(b),
  Phi^-1(F(y)) has slope f/phi(Phi^-1(F)) <= sqrt(pi/2)/b: in the tails it is a Mills ratio over b, largest at 0. So
  shifting a coordinate by x is at most as visible as shifting a Gaussian of std b sqrt(2/pi) by x (the density is
  log-concave, so threshold tests are the best), and trade-off functions of independent coordinates multiply (Dong et al.,
  1905.02383, Theorem 3.2): the vector is covered by that Gaussian, for every direction. One-dimensional Laplace
  accounting, which calls this 1/b-DP, is false here and is not offered. Of one number it is true: such a release says so by
  `dimension` 1, and has a pure epsilon (harness/privacy/pure.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from dpft.harness.privacy.scale_law import ScaleLaw, Term, parse

MECHANISMS = ("gaussian", "laplace", "lmo", "plrv")
SHAPES = ("spherical", "coordinates")
FAMILIES = {"lmo": ("gamma", "exponential", "uniform"), "plrv": ("gamma",)}
LAPLACE_TO_GAUSSIAN = math.sqrt(math.pi)  # std of the Laplace over std of the Gaussian that covers it
MAX_DIMENSION = 10**13
LAW_TOLERANCE = 1e-6
ONE_NUMBER = {"shape": "coordinates", "dimension": 1}  # the parameters of a release with a pure epsilon


def check(mechanism: Any, noise_multiplier: float, parameters: Any) -> dict[str, Any]:
    """`parameters` of a release as a plain dict, when they are complete and agree with the noise multiplier.

    Raises ValueError for an unknown mechanism, missing or unknown keys, a law outside the mechanism's family, and a noise
    multiplier that is not the standard deviation which the law has.
    """
    if mechanism not in MECHANISMS:
        raise ValueError(f"mechanism {mechanism!r} cannot be accounted; only {', '.join(MECHANISMS)} can")
    if not isinstance(parameters, Mapping):
        raise ValueError(f"the parameters of mechanism {mechanism} must be an object, not {parameters!r}")
    parameters = dict(parameters)
    if mechanism == "gaussian":
        return _keys(mechanism, parameters, ())
    if mechanism == "laplace" and parameters.get("shape") == "coordinates":
        if parameters.get("dimension", 1) != 1 or type(parameters.get("dimension", 1)) is not int:
            raise ValueError(f"Laplace coordinates have no dimension, or it is 1, not {parameters['dimension']!r}")
        return _keys(mechanism, parameters, ("shape", "dimension") if "dimension" in parameters else ("shape",))
    _keys(mechanism, parameters, ("shape", "dimension") if mechanism == "laplace" else ("shape", "dimension", "law"))
    if parameters["shape"] != "spherical":
        raise ValueError(f"mechanism {mechanism} with shape {parameters['shape']!r} cannot be accounted")
    dimension = parameters["dimension"]
    if type(dimension) is not int or not 1 <= dimension <= MAX_DIMENSION:
        raise ValueError(f"dimension must be a whole number of at least 1, not {dimension!r}")
    if mechanism != "laplace":
        found = spread(family_law(mechanism, parameters["law"]), dimension)
        if not math.isclose(found, noise_multiplier, rel_tol=LAW_TOLERANCE):
            raise ValueError(f"its noise_multiplier is {noise_multiplier:g}, but its law gives {found:g}")
    return parameters


def of_one_number(mechanism: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a release has a pure epsilon (harness/privacy/pure.py)."""
    return mechanism == "laplace" and dict(parameters) == ONE_NUMBER


def _keys(mechanism: str, parameters: dict[str, Any], expected: tuple[str, ...]) -> dict[str, Any]:
    if set(parameters) != set(expected):
        raise ValueError(
            f"mechanism {mechanism} must have exactly the parameters {sorted(expected)}, found {sorted(map(str, parameters))}"
        )
    return parameters


@functools.lru_cache(maxsize=512)
def family_law(mechanism: str, text: str) -> ScaleLaw:
    """The law `text` of mechanism lmo or plrv. Raises ValueError outside its family or where the noise has no variance."""
    law = parse(text)
    if mechanism == "plrv" and len(law.terms) != 1:
        raise ValueError(f"the law of plrv is one gamma term, not {text!r}")
    for term in law.terms:
        if term.kind not in FAMILIES[mechanism]:
            raise ValueError(
                f"the law of {mechanism} is made of {' and '.join(FAMILIES[mechanism])}, not of {term.kind}"
            )
    if not math.isfinite(law.inverse_mean_square):
        raise ValueError(f"noise with the law {text!r} has infinite variance; give u less mass near 0")
    return law


def spread(law: ScaleLaw, dimension: int) -> float:
    """Standard deviation of one coordinate of spherical noise in units of C: sqrt((d+1) E[u^-2])."""
    return math.sqrt((dimension + 1) * law.inverse_mean_square)


def law_of(mechanism: str, noise_multiplier: float, parameters: Mapping[str, Any]) -> ScaleLaw:
    """The law of u of spherical noise."""
    if mechanism == "laplace":
        inverse = math.sqrt(parameters["dimension"] + 1) / noise_multiplier
        return ScaleLaw((Term(1.0, "constant", (inverse,)),))
    return family_law(mechanism, parameters["law"])


def covering_gaussian(mechanism: str, noise_multiplier: float, parameters: Mapping[str, Any]) -> float | None:
    """The noise multiplier of a Gaussian at least as visible, for every shift; None: account by mixtures instead."""
    if mechanism == "gaussian":
        return noise_multiplier
    if parameters["shape"] == "coordinates":
        return noise_multiplier / LAPLACE_TO_GAUSSIAN
    return None


def fisher_gaussian(mechanism: str, noise_multiplier: float, parameters: Mapping[str, Any]) -> float | None:
    """The noise multiplier 1/(C sqrt I) of the Gaussian with the same Fisher information I in the most visible direction.

    Many small steps, or a shift spread over many coordinates, cannot be told from that Gaussian, so no accountant may
    report less than it costs. Spherical: I >= E[u^2] (d-3) / (d (d-2)) with u hidden, since the estimate (d-1)/||z|| of u
    has relative variance 1/(d-2); None under four dimensions. Laplace coordinates: 1/b^2, half the variance's inverse.
    """
    if mechanism == "gaussian":
        return noise_multiplier
    if parameters["shape"] == "coordinates":
        return noise_multiplier / math.sqrt(2)
    d = parameters["dimension"]
    if d <= 3:
        return None
    return math.sqrt(d * (d - 2) / (d - 3) / law_of(mechanism, noise_multiplier, parameters).mean_square)
