"""What a run may claim: epsilon with two independent cross-checks, and whether rows may share a ranked table."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from dpft.harness.errors import CannotRun
from dpft.harness.privacy import mixtures, pure, sampled, tail, units
from dpft.harness.privacy.accountant import SLACK, Composition, check_numbers, guarded, tolerance
from dpft.harness.privacy.ledger import Ledger
from dpft.harness.privacy.spent import covering, epsilon, fisher_epsilon, kinds_of, mixture_check

# what must be equal for two rows to be ranked together
SAME = ("num_examples", "sampling_probability", "steps_planned", "delta", "adjacency", "sampling", "target")


def certify(events: Sequence[dict[str, Any]], delta: float, target: float, noise_stream: int = 1) -> dict[str, Any]:
    """The certificate of a ledger's events, ready for JSON.

    Keys: `epsilon` [lower, estimate, upper] or None, `cross_checks` {"pld", "opacus_prv"} (each may be None),
    `tolerance` {"eps_error", "delta_error"}, `within_budget` (upper <= target; an accounting failure is outside)
    and `error` (the failure in one sentence, or None). noise_stream: how the noise was drawn; from 2 on epsilon is that of
    delta less what the noise's tail lacks, which `tail_delta` says. Raises BadInput for a malformed ledger only.
    """
    ledger = Ledger.from_events(list(events))
    eps_error, delta_error = tolerance(target, delta)
    checks: dict[str, float | None] = {"pld": None, "opacus_prv": None}
    values, error = None, None
    try:
        if delta == 0 and noise_stream == 1:
            raise CannotRun(f"Cannot certify delta 0: {pure.ENDS}")
        left = tail.checked(ledger.events, delta, noise_stream)
        values = list(epsilon(events, left, target))
        checks = cross_checks(ledger, left, target)
        error = disagreement(checks, values, eps_error)
    except CannotRun as problem:
        error = str(problem)
    return {
        "epsilon": values,
        "cross_checks": checks,
        "tolerance": {"eps_error": eps_error, "delta_error": delta_error},
        **({} if noise_stream == 1 else {"tail_delta": tail.missing(ledger.events, delta, noise_stream)}),
        "within_budget": values is not None and error is None and values[2] <= target,
        "error": error,
    }


def cross_checks(ledger: Ledger, delta: float, target: float, opacus: bool = True) -> dict[str, float | None]:
    """{"pld", "opacus_prv"}, and "fisher" where not all noise is Gaussian; each None where it cannot be had.

    pld: a second accountant (for noise of random scale our own FFT; for batches that are no Poisson samples dp-accounting's own
    event); fisher: what no certificate may be under.
    """
    if delta == 0:
        return {"pld": pure.by_distributions(ledger, target), "opacus_prv": None}
    if not ledger.sampling.poisson:
        own = sampled.composition(ledger)
        return {"pld": sampled.second(ledger.sampling, own, delta, target), "opacus_prv": None}
    kinds = covering(ledger)
    if kinds is not None:
        checks = {"pld": pld_epsilon(kinds, delta, target), "opacus_prv": None}
        if opacus:
            checks["opacus_prv"] = opacus_epsilon(kinds, delta, target)
    else:
        checks = {"pld": mixture_check(kinds_of(ledger), delta, target), "opacus_prv": None}
    if not all(event["mechanism"] == "gaussian" for event in ledger.events):
        checks["fisher"] = fisher_epsilon(ledger, delta, target)
    return checks


def disagreement(checks: dict[str, float | None], values: Sequence[float], eps_error: float) -> str | None:
    """One sentence when a second accountant contradicts [lower, estimate, upper] by more than `eps_error`, else None.

    Where `lower` is a bound by Fisher information, the second accountant is held against the estimate instead.
    """
    pld, fisher = checks["pld"], checks.get("fisher")
    if fisher is not None and fisher > values[2] + eps_error:
        return (
            f"Epsilon {values[2]:.6g} is below {fisher:.6g}, which noise of this Fisher information cannot beat; "
            "do not rely on this run."
        )
    lower = values[1] if "fisher" in checks else values[0]
    if pld is None or lower - eps_error <= pld <= values[2] + eps_error:
        return None
    return (
        f"The two accountants disagree: PLD gives epsilon {pld:.6g}, outside PRV's [{lower:.6g}, {values[2]:.6g}] "
        f"by more than {eps_error:g}; do not rely on this run."
    )


@functools.lru_cache(maxsize=512)
def pld_epsilon(kinds: Composition, delta: float, target: float) -> float | None:
    """Epsilon of a composition by privacy loss distributions (dp-accounting; Doroshenko et al. 2207.04380), or None.

    Add/remove neighbours, the larger direction. The error grows like interval^2 * T: two tolerances over sqrt(T) keeps
    it ten or more times below the tolerance at a second or so.
    """
    check_numbers(kinds, delta, target)
    if not kinds:
        return 0.0
    eps_error = tolerance(target, delta)[0]
    interval = mixtures.interval(eps_error, sum(steps for _, _, steps in kinds))
    try:
        with guarded(kinds, delta):
            from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
            from dp_accounting.pld import PLDAccountant

            accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
            for q, sigma, steps in kinds:
                accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), int(steps)))
            value = float(accountant.get_epsilon(delta))
    except CannotRun:
        return None
    return value if math.isfinite(value) else None


@functools.lru_cache(maxsize=512)
def opacus_epsilon(kinds: Composition, delta: float, target: float) -> float | None:
    """Upper epsilon of a composition by Opacus's PRV accountant at the same tolerances; None where it cannot be had.

    Opacus imports torch, so nothing that must work without torch may call this.
    """
    check_numbers(kinds, delta, target)
    if not kinds:
        return 0.0
    eps_error, delta_error = tolerance(target, delta)
    try:
        with guarded(kinds, delta):
            from opacus.accountants import PRVAccountant

            accountant = PRVAccountant()
            accountant.history = [(sigma, q, int(steps)) for q, sigma, steps in kinds]
            value = float(accountant.get_epsilon(delta, eps_error=eps_error, delta_error=delta_error))
    except CannotRun:
        return None
    return max(0.0, value) if math.isfinite(value) else None


def matched(
    privacies: Sequence[dict[str, Any] | None], names: Sequence[str] | None = None, free: Sequence[str] = ()
) -> str | None:
    """None when the rows with these `privacy` sections may be ranked together, else one sentence saying why not.

    Same unit, N, q, planned steps, delta, neighbours, sampling and target in all (of users: what `units.compared` says); in each
    all planned steps run, one target met: `target * (1 - .025) <= estimate` and `upper <= target`. names: what the rows are
    called, default "Row 1", ... free: keys that may differ (a budget can be matched with steps free).
    """
    names = names or [f"Row {row}" for row in range(1, len(privacies) + 1)]
    for name, privacy in zip(names, privacies, strict=True):
        try:
            reason = "is not private" if privacy is None else _unmet(privacy)
        except (KeyError, TypeError, ValueError, IndexError) as problem:
            reason = f"has an incomplete privacy section ({type(problem).__name__}: {problem})"
        if reason:
            return f"{name} {reason}."
    if not privacies:
        return None
    first, *others = [units.compared(privacy, SAME, free) for privacy in privacies]
    for key in first:
        for name, other in zip(names[1:], others, strict=True):
            if key not in other or not units.same(key, first[key], other[key], SLACK):
                return f"{names[0]} and {name} differ in {key}: {first[key]!r} against {other.get(key)!r}."
    return None


def _unmet(privacy: dict[str, Any]) -> str | None:
    """Why one row alone cannot be ranked, as the end of a sentence."""
    missing = [key for key in (*SAME, "steps_run", "epsilon") if key not in privacy]
    if missing:
        return f"lacks {', '.join(missing)} in its privacy section"
    if privacy["epsilon"] is None:
        return "has no certified epsilon"
    if privacy.get("error"):
        return f"is not certified: {str(privacy['error']).rstrip('.')}"
    if privacy["steps_run"] != privacy["steps_planned"]:
        return f"ran {privacy['steps_run']} of its {privacy['steps_planned']} planned steps"
    if privacy.get("steps_lost"):
        return f"lost {privacy['steps_lost']} of its {privacy['steps_run']} releases when its process died"
    lower, estimate, upper = map(float, privacy["epsilon"])
    target = float(privacy["target"])
    if not lower <= estimate <= upper <= target:
        return f"exceeds its budget: upper epsilon {upper:.6g} at target {target:g}"
    if not target * (1 - SLACK) <= estimate:
        return f"leaves budget unused: estimated epsilon {estimate:.6g}, more than {SLACK:.1%} under target {target:g}"
    return None
