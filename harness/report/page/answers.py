"""What the page opens with: for each setting who leads, who is level, the cheapest of these, and on what evidence.

Marks of bold print (**) are the only markup of these sentences.
"""

from __future__ import annotations

from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.leaderboard import board as boards
from dpft.harness.leaderboard.state import baseline, standings
from dpft.harness.report import leaderboards, pairs
from dpft.harness.report.rows import Row, said
from dpft.harness.report.tables import spread
from dpft.harness.report.text import plain
from dpft.harness.report.views import Group, hardware

AT_MOST = 8  # names in a list of evidence


def of_group(group: Group, verdicts: pairs.Verdicts | None, called: dict[str, str]) -> dict[str, str | None]:
    """Of a study's group; called: name of a row -> its short name. cannot: why nothing can be told, None where something can."""
    found = {"budget": f"ε ≤ {group.private[0].spec['epsilon']:g}" if group.private else None}
    lead = pairs.leading(group)
    if group.reason is not None:
        return {**found, "cannot": f"Nothing is ranked: {plain(group.reason)}", "text": "", "evidence": None}
    if lead is None:
        return {**found, "cannot": "Nothing can be told: no method has a rank yet.", "text": "", "evidence": None}
    cannot = None if lead.cannot is None else f"Nothing can be told: {lead.cannot}."
    text, evidence = _sentence(group, lead, verdicts, called), _evidence(group, lead, verdicts, called)
    return {**found, "cannot": cannot, "text": text, "evidence": evidence}


def _sentence(group: Group, lead: pairs.Leading, verdicts: pairs.Verdicts | None, called: dict[str, str]) -> str:
    by_name = dict(zip(group.names, group.rows, strict=True))
    first = f"**{called[lead.first]}**"
    value = f"{group.result['metric']} {_value(by_name[lead.first])}"
    without = next((row for row in group.rows if not row.private), None)
    value += "" if without is None else f"; {without.method} {_value(without)}"
    if not lead.level and not lead.behind:
        return f"Only {first} has a rank ({value}); there is nothing to compare it with."
    level = {name: by_name[name] for name in [lead.first, *lead.level]}
    cheapest, price = _cheapest(level, verdicts)
    if lead.cannot:
        text = f"The best mean is that of {first} ({value}), "
        if cheapest == lead.first:
            return f"{text}which is also the cheapest of all ({price})."
        return f"{text}the cheapest of all is **{called[cheapest]}** ({price})."
    text = f"{first} leads ({value}); "
    if not lead.level:
        return f"{text}all {len(lead.behind)} others are worse."
    text += f"not shown to be worse: {', '.join(called[name] for name in lead.level)}; "
    if cheapest == lead.first:
        return f"{text}it is also the cheapest of these ({price})."
    return f"{text}the cheapest of these is **{called[cheapest]}** ({price})."


def _value(row: Row) -> str:
    return spread([r["result"]["final"] for r in row.records], digits=3)


def _cheapest(rows: dict[str, Row], verdicts: pairs.Verdicts | None) -> tuple[str, str]:
    """(name, its price): by the time of a step where all were timed on one kind of hardware, else by memory."""
    machines = {hardware(record) for row in rows.values() for record in row.records}
    what, cost = "memory", lambda row: row.peak_bytes
    for name, timed in (("step time", lambda row: row.step_cpu_s), ("step time", lambda row: row.step_s)):
        if len(machines) == 1 and None not in map(timed, rows.values()):
            what, cost = name, timed
            break
    best = min(rows, key=lambda name: cost(rows[name]))
    base = None if verdicts is None else verdicts.baseline
    if base is None or rows[best].method == base.method or not cost(base):
        return best, f"by {what}"
    return best, f"{cost(rows[best]) / cost(base):.2f} of the {what} of {base.method}"


def _evidence(group: Group, lead: pairs.Leading, verdicts: pairs.Verdicts | None, called: dict[str, str]) -> str:
    ranked = sum(rank is not None for rank in group.ranks)
    over = f"seed{'s' if len(group.seeds) > 1 else ''} {said(group.seeds)}"
    text = f"{ranked} method{'s' if ranked > 1 else ''}, {over}."
    if verdicts is None:
        return f"{text} No verdicts: no method shares two seeds with a baseline."
    alike = sum(row.method == verdicts.baseline.method for row in group.rows)
    if verdicts.base == lead.first and alike > 1 and not lead.cannot:
        # the best of several rows of one method became the baseline, and verdicts against it do not count that choice
        return f"{text} Worse than it: {_named([called[name] for name in lead.behind])}." if lead.behind else text
    found: dict[str, list[str]] = {}
    for name, one in verdicts.found.items():
        found.setdefault(one.verdict, []).append(called.get(name, plain(name)))
    against = called.get(verdicts.base, plain(verdicts.base))
    return f"{text} Against {against}: {'; '.join(_told(*one) for one in sorted(found.items()))}."


def _told(verdict: str, names: list[str]) -> str:
    """A verdict and whom it is of; names only where something was decided."""
    if verdict not in ("better", "worse"):
        return f"{verdict}: {len(names)} method{'s' if len(names) > 1 else ''}"
    return f"{verdict}: {_named(names)}"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - AT_MOST} more" if len(names) > AT_MOST else ""
    return f"{', '.join(names[:AT_MOST])}{more}"


def of_boards(records: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(answers of the contests that these records belong to, run id of a test -> what is decided of its arm).

    records: by run id. Boards that cannot be loaded here, as a file of theirs is missing, have no answers.
    """
    if all(record["spec"].get("split", "whole") == "whole" for record in records.values()):
        return [], {}
    found, verdicts = [], {}
    for name in boards.boards():
        try:
            board = boards.load(name)
            for contest in board.contests:
                look = standings(contest, board.rules, lambda spec: records.get(spec.run_id))
                if not any(one.finals or any(scores for _, scores in one.tuning.scores) for one in look):
                    continue
                text = leaderboards.answer(contest, board.rules, look)
                found.append(
                    {"title": f"Leaderboard {name}: {contest.title}", "lines": [{"budget": None, "text": text}]}
                )
                base = baseline(look, board.rules)
                for one in look:
                    told = leaderboards.said(one, base, board.rules).replace("**", "")
                    verdicts |= {record["run_id"]: told for record in one.records.values()}
        except BadInput:
            continue
    return found, verdicts
