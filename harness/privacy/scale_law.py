"""Laws of a random inverse noise scale u, b = 1/u: sums of Gamma, exponential and uniform terms (LMO, PLRV).

One text is the law everywhere: in a run's settings, in the ledger, in the sampler and in the accountant. Its parameters
are gamma(shape, scale), exponential(rate), uniform(low, high) and constant(value): the published code of LMO-DP gives its
exponential term a rate in the accountant and the same number as a scale in the sampler.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

ARGUMENTS = {"gamma": 2, "exponential": 1, "uniform": 2, "constant": 1}
TERM = re.compile(r"(?:([^*()+]+)\*)?([a-z]+)\(([^()]*)\)")
FORM = (
    "a sum of WEIGHT*gamma(SHAPE,SCALE), WEIGHT*exponential(RATE), WEIGHT*uniform(LOW,HIGH) and WEIGHT*constant(VALUE)"
)
LARGEST = 1e9


@dataclass(frozen=True)
class Term:
    """weight times a Gamma, exponential, uniform or constant variable; `values` in the order of ARGUMENTS' forms."""

    weight: float
    kind: str
    values: tuple[float, ...]

    @property
    def shape(self) -> float:
        """The power with which the density vanishes at 0, plus one; inf where it is 0 near 0."""
        if self.kind == "gamma":
            return self.values[0]
        if self.kind == "exponential":
            return 1.0
        return math.inf if self.values[0] > 0 else 1.0

    @property
    def moments(self) -> tuple[float, float]:
        """(mean, variance)."""
        first, last = self.values[0], self.values[-1]
        if self.kind == "gamma":
            mean, variance = first * last, first * last**2
        elif self.kind == "exponential":
            mean, variance = 1 / first, first**-2
        else:
            mean, variance = (first + last) / 2, (last - first) ** 2 / 12
        return self.weight * mean, self.weight**2 * variance

    def log_mgf(self, t: float) -> float:
        """log E[exp(t weight X)]; inf at and beyond the edge of the domain, whatever the formula would say there."""
        t = t * self.weight
        if self.kind == "gamma":
            shape, scale = self.values
            return math.inf if t * scale >= 1 else -shape * math.log1p(-t * scale)
        if self.kind == "exponential":
            return math.inf if t >= self.values[0] else -math.log1p(-t / self.values[0])
        if self.kind == "constant":
            return t * self.values[0]
        low, high = self.values
        width = t * (high - low)
        if abs(width) < 1e-9:
            return t * (low + high) / 2
        if width > 0:
            return t * high + math.log(-math.expm1(-width) / width)
        return t * low + math.log(math.expm1(width) / width)

    def __str__(self) -> str:
        return f"{self.weight!r}*{self.kind}({','.join(map(repr, self.values))})"


@dataclass(frozen=True)
class ScaleLaw:
    """The law of u = sum of independent terms, in units of 1/(clip norm)."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.terms))

    def scaled(self, factor: float) -> ScaleLaw:
        """The law of factor * u."""
        return ScaleLaw(tuple(Term(term.weight * factor, term.kind, term.values) for term in self.terms))

    @property
    def mean(self) -> float:
        return math.fsum(term.moments[0] for term in self.terms)

    @property
    def mean_square(self) -> float:
        """E[u^2]."""
        return self.mean**2 + math.fsum(term.moments[1] for term in self.terms)

    def mgf(self, t: float) -> float:
        """E[exp(t u)]; inf outside its domain (and where it is larger than a float)."""
        value = math.fsum(term.log_mgf(t) for term in self.terms)
        return math.inf if value > 700 else math.exp(value)

    @functools.cached_property
    def inverse_mean_square(self) -> float:
        """E[u^-2], the mean square of the scale: the integral of t M(-t) over t > 0 (inf where it diverges)."""
        if sum(term.shape for term in self.terms) <= 2:
            return math.inf
        return _integral(lambda t: t * self.mgf(-t), 1 / self.mean)

    @functools.cached_property
    def coordinate_information(self) -> float:
        """Fisher information of one coordinate of i.i.d. noise f(x) = E[u exp(-u|x|)] / 2: integral of M''^2 / M' at -x.

        u is drawn anew for each coordinate and hidden, which is the smallest information such noise can have.
        """

        def integrand(x: float) -> float:
            value, first, second = self.mgf(-x), *self._log_derivatives(-x)
            return value * (second + first**2) ** 2 / first if value > 0 and first > 0 else 0.0

        return _integral(integrand, 1 / self.mean)

    @functools.cached_property
    def coordinate_variance(self) -> float:
        """Variance of one coordinate of that noise: 2 E[u^-2]."""
        return 2 * self.inverse_mean_square

    def _log_derivatives(self, t: float) -> tuple[float, float]:
        """First and second derivative of log M at t <= 0."""
        first = second = 0.0
        for term in self.terms:
            a, last = term.weight, term.values[-1]
            if term.kind == "gamma":
                scale = a * last / (1 - t * a * last)
                first, second = first + term.values[0] * scale, second + term.values[0] * scale**2
            elif term.kind == "exponential":
                scale = a / (term.values[0] - a * t)
                first, second = first + scale, second + scale**2
            else:
                low, width = a * term.values[0], a * (last - term.values[0])
                y = width * t
                if abs(y) < 1e-3:  # the series of the two closed forms below, which cancel here
                    first, second = first + low + width * (0.5 + y / 12), second + width**2 * (1 / 12 - y * y / 240)
                elif y < -700:
                    first, second = first + low - 1 / t, second + 1 / t**2
                else:
                    tail = math.exp(y) / -math.expm1(y)  # 1 / (exp(-y) - 1)
                    first += low - width * tail - 1 / t
                    second += 1 / t**2 - width**2 * tail * (1 + tail)
        return first, second


def parse(text: Any) -> ScaleLaw:
    """The law that `text` says, for example `0.4*gamma(2,1)+0.1*exponential(5)+0.3*uniform(0,1)`. Raises ValueError."""
    if not isinstance(text, str) or len(text) > 500:
        raise ValueError(f"the law of the inverse scale must be {FORM}, not {text!r}")
    terms = []
    for part in text.replace(" ", "").split(")+"):
        part = part if part.endswith(")") else part + ")"
        match = TERM.fullmatch(part)
        if match is None or match[2] not in ARGUMENTS:
            raise ValueError(f"the law {text!r} is not {FORM}")
        terms.append(_term(match[1] or "1", match[2], match[3].split(","), text))
    law = ScaleLaw(tuple(terms))
    if not 1e-9 < law.mean < LARGEST:
        raise ValueError(f"the law {text!r} has no positive mean between 1e-9 and 1e9")
    return law


def _term(weight: str, kind: str, values: list[str], text: str) -> Term:
    try:
        term = Term(float(weight), kind, tuple(map(float, values)))
    except ValueError:
        raise ValueError(f"the law {text!r} holds something that is not a number") from None
    if len(term.values) != ARGUMENTS[kind]:
        raise ValueError(f"{kind} takes {ARGUMENTS[kind]} numbers, {text!r} gives {len(term.values)}")
    positive = (term.weight, *(term.values if kind != "uniform" else term.values[1:]))
    if not all(1e-9 < value < LARGEST for value in positive):
        raise ValueError(f"weights and parameters of the law {text!r} must be between 1e-9 and 1e9")
    if kind == "uniform" and not 0 <= term.values[0] < term.values[1]:
        raise ValueError(f"uniform(low, high) needs 0 <= low < high, {text!r} does not have it")
    return term


def scalar_rdp(law: ScaleLaw, order: float, shift: float = 1.0) -> float:
    """Renyi divergence of order > 1 of scalar Laplace noise with revealed scale 1/u (2405.18776, Theorem of Section 4).

    log[(a M((a-1) s) + (a-1) M(-a s)) / (2a-1)] / (a-1) for a shift s; inf outside the domain of M. It holds for one
    coordinate: a vector with L2 norm s is not covered by it.
    """
    up, down = law.mgf((order - 1) * shift), law.mgf(-order * shift)
    if not math.isfinite(up):
        return math.inf
    return math.log((order * up + (order - 1) * down) / (2 * order - 1)) / (order - 1)


def _integral(function: Any, scale: float) -> float:
    """The integral of a positive function over (0, inf), in the logarithm of its argument around `scale`."""
    from scipy.integrate import quad

    def transformed(v: float) -> float:
        return function(scale * math.exp(v)) * scale * math.exp(v)

    pieces = [(-40.0, -8.0), (-8.0, -2.0), (-2.0, 0.0), (0.0, 2.0), (2.0, 6.0), (6.0, 14.0), (14.0, 60.0)]
    return math.fsum(quad(transformed, low, high, epsrel=1e-11, epsabs=0.0, limit=200)[0] for low, high in pieces)
