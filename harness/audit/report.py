"""Audits as text: one audit, one black-box audit, and the table of planted bugs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpft.harness.audit.audit import Audit
    from dpft.harness.audit.bounds import Bound
    from dpft.harness.audit.one_run import OneRun
    from dpft.harness.audit.repeated import Repeated

MARKERS = ("<!-- dpft audit: begin -->", "<!-- dpft audit: end -->")


def of_audit(found: Audit) -> str:
    """Certificate, bound, every check, verdict."""
    from tabulate import tabulate

    from dpft.harness.audit.alarms import LEVEL
    from dpft.harness.audit.bounds import CONFIDENCE

    asked = found.question
    lines = [
        f"{asked.method}: {found.verdict}",
        f"certificate        epsilon <= {found.certificate:.3f} at delta {asked.delta:g}"
        f" (sigma {found.noise_multiplier:.4f}, q {asked.sampling_rate:g}, {asked.steps} steps)",
        f"audited            epsilon {_shown(found.bound)} with {CONFIDENCE:.0%} confidence"
        f" (from q >= {found.bound.sampling_rate:.4f}, sigma <= {found.bound.noise_multiplier:.4f})",
        f"within reach       {_shown(found.reachable)}: what {asked.canaries} canaries and {asked.steps} steps show of a "
        "correct method when every average is exactly as expected",
        f"sensitivity        {found.sensitivity.worst:.6f} C at most, over {found.sensitivity.pairs} pairs of neighbouring "
        f"batches without noise{_by_phases(found)}",
        f"contributions      {found.sensitivity.off:.2g} C at most from what it should be (of norm {found.sensitivity.of:.3g} C)",
        f"replay             {_replay(found)}",
        f"booked             {_booking(found)}",
        f"p-values           alarms under {LEVEL:g}/{len(found.checks)}: {', '.join(found.alarms) or 'none'}",
        "",
    ]
    rows = [[c.name, f"{c.observed:.4g}", f"{c.expected:.4g}", f"{c.p_value:.2g}"] for c in found.checks]
    table = tabulate(rows, headers=["check", "observed", "expected", "p"], tablefmt="simple", disable_numparse=True)
    return "\n".join(lines) + table


def _by_phases(found: Audit) -> str:
    return f" in {found.phases} phases" if found.phases > 1 else ""


def _replay(found: Audit) -> str:
    again = found.replay
    if again.departed is not None:
        return f"the {again.held} {_when(found)} do not follow from the releases"
    end = " and of the run's end" if again.ended else ""
    return f"weights and buffers of {again.steps} steps{end} follow from the releases alone, bit for bit"


def _when(found: Audit) -> str:
    departed = found.replay.departed
    return "at the run's end" if departed > found.booking.taken else f"after step {departed}"


def _booking(found: Audit) -> str:
    counts = found.booking
    if not counts.violations:
        each = counts.releases / max(1, counts.taken)
        return f"{counts.taken} steps as planned, a batch and {each:.3g} release{'s' * (each > 1)} each"
    return "; ".join(_faults(found))


def _faults(found: Audit) -> list[str]:
    """What does not agree, with its numbers."""
    counts, missing = found.booking, found.booking.releases - found.booking.releases_booked
    return [
        *[f"{missing} releases not booked"] * (missing > 0),
        *[f"of {name} more than is booked" for name in counts.missing],
        *[f"step {(counts.undeclared or 0) + 1} booked otherwise than declared"] * (counts.undeclared is not None),
        *[f"{counts.batches} batches drawn, {counts.booked} booked"] * (counts.batches != counts.booked),
        *[f"{counts.taken} of {counts.planned} steps taken"] * (counts.taken != counts.planned),
        *["ledger differs from the plan"] * (counts.unplanned or counts.booked != counts.planned),
        *[f"an example twice (step {(counts.twice or 0) + 1})"] * (counts.twice is not None),
        *[f"others trained than sampled (step {(counts.strangers or 0) + 1})"] * (counts.strangers is not None),
    ]


def _shown(bound: Bound) -> str:
    return f"> {bound.epsilon:.2f}" if bound.capped else f">= {bound.epsilon:.2f}"


def of_one_run(found: OneRun) -> str:
    """Certificate, both bounds, what was guessed, verdict."""
    from tabulate import tabulate

    asked = found.question
    tradeoff = "not for this noise" if found.tradeoff is None else f"{found.tradeoff:.3f}"
    lines = [
        f"{asked.method}, one run, black box: {found.verdict}",
        f"certificate    epsilon <= {found.certificate:.3f} at delta {asked.delta:g}",
        f"audited        epsilon >= {found.epsilon_delta:.3f} (2305.08846), {tradeoff} (2410.22235), with 95% confidence each",
        f"ceiling        {found.ceiling:.3f}: 2305.08846 with all {asked.canaries} canaries guessed, all right",
        "",
    ]
    rows = [
        [g.guesses, g.right, f"{g.epsilon_delta:.3f}", "" if g.tradeoff is None else f"{g.tradeoff:.3f}"]
        for g in found.tried
    ]
    headers = ["guesses", "right", "2305.08846", "2410.22235"]
    return "\n".join(lines) + tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def of_repeated(found: Repeated, methods: Sequence[str]) -> str:
    """Audits accused, the interval of their rate, and how the p-values of every check are spread."""
    from tabulate import tabulate

    from dpft.harness.audit.alarms import LEVEL
    from dpft.harness.audit.repeated import CONFIDENCE, LOW

    lines = [
        f"{found.audits} audits of {', '.join(methods)}, each with a seed of its own: "
        f"{'as stated' if found.as_stated else 'NOT AS STATED'}",
        f"accused            {len(found.accused)}: rate {found.low:.2%} to {found.high:.2%} ({CONFIDENCE:.0%}, Clopper-Pearson); "
        f"stated: at most {LEVEL:.1%}",
        *(f"                   {method}, seed {seed}: {verdict}" for method, seed, verdict in found.accused),
        "",
    ]
    rows = [
        [c.name, c.alarms, c.low, f"{LOW * found.audits:.3g}", f"{c.least:.2g}", f"{c.valid:.2g}"] for c in found.checks
    ]
    headers = ["check", "alarms", f"p < {LOW:g}", "at most expected", "least p", "valid p-values: p"]
    return "\n".join(lines) + tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def planted(rows: Sequence[tuple[str, Audit]], versions: dict[str, str]) -> str:
    """The table of planted bugs. rows: (what was planted, the audit of it), the first without a bug."""
    from tabulate import tabulate

    from dpft.harness.audit.alarms import LEVEL

    first = rows[0][1]
    asked = first.question
    table = [
        [about, f"{a.certificate:.2f}", _cell(a), _rang(a), "consistent" if not a.violations else "**violation**"]
        for about, a in rows
    ]
    headers = ["planted", "certificate", "audited bound", "what rang", "verdict"]
    head = (
        f"- dp-adam where no other method is named; {asked.canaries} canaries, "
        f"q = {asked.sampling_rate:g}, {asked.steps} steps, delta {asked.delta:g}, "
        f"seed {asked.seed}; torch {versions['torch']}. Bounds at 95%; "
        f"expected of a correct method: {first.reachable.epsilon:.2f}.\n"
        f"- `p`: under the threshold of a family of checks at {LEVEL:.1%}; `> x`: the accountant goes no further."
    )
    return f"{head}\n\n{tabulate(table, headers=headers, tablefmt='github', disable_numparse=True)}"


def _cell(found: Audit) -> str:
    return f"> {found.bound.epsilon:.1f}" if found.bound.capped else f"{found.bound.epsilon:.2f}"


def _rang(found: Audit) -> str:
    from dpft.harness.audit import batch_checks
    from dpft.harness.audit.audit import sensitivity_violations

    rang = ["bound"] if "bound exceeds certificate" in found.violations else []
    rang += [f"{c.name} (p {_p(c.p_value)})" for c in found.checks if c.name in found.alarms]
    moved = sensitivity_violations(found.sensitivity, found.replay)
    if batch_checks.FAR in moved:
        rang.append(f"sensitivity {found.sensitivity.worst:.4g} C")
    elif moved:
        rang.append(f"contribution {found.sensitivity.off:.2g} C off" if found.sensitivity.pairs else moved[0])
    if found.replay.departed is not None:
        rang.append(f"replay ({found.replay.held} {_when(found)})")
    rang += _faults(found)
    return ", ".join(rang) or "nothing"


def _p(value: float) -> str:
    return "0" if value < 1e-99 else f"{value:.0e}"


def progress_line(quiet: bool) -> Callable[[str, int, int], None]:
    """Progress on stderr: a line at every quarter."""
    import click

    told: set[tuple[str, int]] = set()

    def progress(what: str, done: int, of: int) -> None:
        quarter = 4 * done // max(1, of)
        if not quiet and (what, quarter) not in told:
            told.add((what, quarter))
            click.echo(f"    {what}: {done}/{of}", err=True)

    return progress
