"""What noise costs that is drawn coordinate by coordinate and accounted as a scalar, as the published code of LMO-DP does.

Its accountant (github.com/rayhanul/lmo-dp, experiments/check_privacy_and_statistics.py) puts the moment-generating function
of u into the scalar Renyi formula at orders 2 to 128 without asking whether it exists there, and its sampler draws every
coordinate's scale by itself, with numpy's `exponential(lambda)`, whose mean is lambda, where the accountant has mean
1/lambda. Nothing here certifies anything.
"""

from __future__ import annotations

import math
from typing import Any

from dpft.harness.errors import CannotRun
from dpft.harness.privacy.accountant import prv_epsilon
from dpft.harness.privacy.scale_law import ScaleLaw, Term, scalar_rdp

ORDERS = range(2, 129)


def study(claimed: ScaleLaw, sampled: ScaleLaw, q: float, steps: int, delta: float) -> list[dict[str, Any]]:
    """Rows (quantity, epsilon or None where no finite one holds, note), from what is claimed to what must leak at least.

    claimed: the law that the accountant has; sampled: that of the sampler.
    """
    rows = [
        (
            "scalar Renyi formula, MGF taken outside its domain, 1 step",
            formal_epsilon(claimed, delta, 1),
            "as published",
        ),
        (
            "scalar Renyi formula, inf outside the domain, 1 step",
            renyi_epsilon(claimed, delta, 1),
            "holds in one dimension",
        ),
        ("the same for what is sampled, 1 step", renyi_epsilon(sampled, delta, 1), "holds in one dimension"),
    ]
    for name, law in (("accounted", claimed), ("sampled", sampled)):
        sigma = 1 / math.sqrt(law.coordinate_information)
        for count, rate in ((1, 1.0), (steps, q)):
            where = "1 step, q = 1" if rate == 1.0 else f"{steps} steps, q = {q:.4g}"
            try:
                bound = prv_epsilon(((rate, sigma, count),), delta, 20.0)[0]
                note = f"information of a Gaussian with sigma {sigma:.3f}"
            except CannotRun as problem:
                bound, note = None, str(problem)
            rows.append((f"lower bound, law as {name}, many coordinates, {where}", bound, note))
    return [dict(zip(("quantity", "epsilon", "note"), row, strict=True)) for row in rows]


def swapped(law: ScaleLaw) -> ScaleLaw:
    """The law that is drawn when each exponential's rate is used as its scale."""
    terms = (
        Term(term.weight, term.kind, (1 / term.values[0],)) if term.kind == "exponential" else term
        for term in law.terms
    )
    return ScaleLaw(tuple(terms))


def renyi_epsilon(law: ScaleLaw, delta: float, steps: int) -> float:
    """Epsilon of scalar noise by the Renyi formula; inf where the MGF exists at no order."""
    return min(_convert(order, steps * scalar_rdp(law, order), delta) for order in (1.1, 1.25, 1.5, 1.75, *ORDERS))


def formal_epsilon(law: ScaleLaw, delta: float, steps: int) -> float:
    """The same at whole orders with the closed forms of the MGF wherever they give a positive number, as published."""
    found = math.inf
    for order in ORDERS:
        up, down = _formal_mgf(law, order - 1), _formal_mgf(law, -order)
        mean = (order * up + (order - 1) * down) / (2 * order - 1)
        if mean > 1:
            found = min(found, _convert(order, steps * math.log(mean) / (order - 1), delta))
    return found


def _formal_mgf(law: ScaleLaw, t: float) -> float:
    value = 1.0
    for term in law.terms:
        inside = term.weight * t * term.values[-1]
        if term.kind == "gamma":
            power = math.inf if inside == 1 else (1 - inside + 0j) ** -term.values[0]
            value *= power.real if abs(power.imag) < 1e-12 * abs(power) else math.nan
        elif term.kind == "exponential":
            value *= (
                term.values[0] / (term.values[0] - term.weight * t) if term.values[0] != term.weight * t else math.inf
            )
        else:
            value *= math.exp(min(700.0, term.log_mgf(t)))
    return value


def _convert(order: float, divergence: float, delta: float) -> float:
    """Epsilon at delta of a Renyi divergence (Canonne, Kamath & Steinke, 2004.00010, Proposition 12)."""
    return max(0.0, divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
