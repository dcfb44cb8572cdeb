"""How the gate's outcomes are told: a markdown table for a job summary, and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dpft.harness.regression.gate import MAIN, Outcome, Rule
from dpft.harness.report.rows import Row, name_of
from dpft.harness.report.text import told

HEADERS = ("method", "task", "model", "ε", "seeds", "baseline", "now", "difference", "p", "steps", "verdict")


def markdown(outcomes: Sequence[Outcome], rule: Rule) -> str:
    """One row per configuration, and below it the rule and its rate of false alarms."""
    from tabulate import tabulate

    table = [_row(name, one) for name, one in zip(_names(outcomes), outcomes, strict=True)]
    return tabulate(table, headers=HEADERS, tablefmt="github", disable_numparse=True) + "\n\n" + _notes(outcomes, rule)


def _names(outcomes: Sequence[Outcome]) -> list[str]:
    """Each method, with the settings that tell its rows apart; task, model and epsilon have columns of their own."""
    shown = {"task": None, "task_version": None, "model": None, "head": None, "epsilon": None}
    rows = [Row({**one.spec, "seed": None, **shown}, []) for one in outcomes]
    return [name_of(row, rows) for row in rows]


def _row(name: str, one: Outcome) -> tuple[str, ...]:
    main = one.measures.get(MAIN)
    figures = ("-",) * 5
    if main is not None:
        gap = f"{one.now - one.before:+.4f}"
        if one.interval is not None:
            gap += f" [{one.interval.low:+.4f}, {one.interval.high:+.4f}]"
        p = f"{main.p:.3g}" + ("" if main.confirmation is None else f", then {main.confirmation:.3g}")
        steps = " -> ".join(map(_steps, one.steps))
        figures = (f"{one.before:.4f}", f"{one.now:.4f}", gap, p, steps)
    extra = [
        f"{key} x{math.exp(sum(m.losses.values()) / len(m.losses)):.3f}"
        for key, m in one.measures.items()
        if key != MAIN
    ]
    why = told("; ".join([one.reason] * bool(one.reason) + extra))
    verdict = f"{one.verdict}: {why}" if why else one.verdict
    epsilon = "-" if one.spec["epsilon"] is None else f"{one.spec['epsilon']:g}"
    return name, one.spec["task"], told(one.spec["model"]), epsilon, str(len(one.seeds)), *figures, verdict


def _steps(step: float | None) -> str:
    return "–" if step is None else "never" if math.isinf(step) else f"{step:g}"


def _notes(outcomes: Sequence[Outcome], rule: Rule) -> str:
    gates = [
        f"{what} by more than {share:.0%}"
        for what, share in (("step time", rule.time), ("peak memory", rule.memory))
        if share is not None
    ]
    also = f"; {' or '.join(gates)} likewise" if gates else ""
    return (
        f"- Regression: on paired seeds the metric is worse by more than {rule.margin:.0%} of the way from chance to the best "
        f"of its setting, on average, and a one-sided exact "
        f"sign-flip test rejects at {rule.level:g}{also}; with {2 * rule.fewest} seeds or more it must happen on both "
        "halves of them.\n"
        f"- Probability of a false alarm in this table: at most {min(1.0, sum(one.rate for one in outcomes)):.2g} "
        "(of the metric, by changes that alter nothing but chance; the same code on the same platform repeats bit for bit).\n"
        "- steps: median to the task's threshold, baseline -> now, – where the evaluations cannot tell; shown, not judged."
    )


def document(outcomes: Sequence[Outcome], rule: Rule, code: int) -> dict[str, Any]:
    """All of it as one JSON document; steps are a number, `never` or, where it is not known, null."""
    return {
        "exit_code": code,
        "rule": {**vars(rule), "fewest_seeds": rule.fewest},
        "false_alarm_rate": min(1.0, sum(one.rate for one in outcomes)),
        "configurations": [_entry(one) for one in outcomes],
    }


def _entry(one: Outcome) -> dict[str, Any]:
    return {
        **vars(one),
        "interval": None if one.interval is None else vars(one.interval),
        "steps": None if one.steps is None else [_told(step) for step in one.steps],
        "measures": {key: vars(measure) for key, measure in one.measures.items()},
    }


def _told(step: float | None) -> float | str | None:
    return "never" if step is not None and math.isinf(step) else step
