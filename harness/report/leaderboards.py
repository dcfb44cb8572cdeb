"""A leaderboard for a reader: per contest the answer in a sentence, then a row for each arm."""

from __future__ import annotations

import itertools
import math
import statistics

from dpft.harness.leaderboard.board import Board, Contest, Rules
from dpft.harness.leaderboard.state import Look, Standing, baseline, judged, leading, plain, standings
from dpft.harness.report.figures import Figures
from dpft.harness.report.glance import Point, scatter
from dpft.harness.report.text import Part, Table
from dpft.harness.runs import registry
from dpft.harness.statistics.sequential import LEVEL

MANY = 6  # names in a sentence


def parts(board: Board, look: Look) -> list[Part]:
    """All contests; those without a finished test say so."""
    found: list[Part] = []
    for contest in board.contests:
        found += [f"### {contest.title}", *_contest(contest, board.rules, look)]
    tasks = (registry.task(contest.arms[0].settings["task"]) for contest in board.contests)
    return [*found, _reading(board.rules, not all(task.higher_is_better for task in tasks))]


def answers(board: Board, look: Look, pictures: Figures | None = None) -> list[Part]:
    """Which method to use, a sentence for every contest; a picture of the first."""
    lines: list[str] = []
    links: list[Part] = []
    for contest in board.contests:
        found = standings(contest, board.rules, look)
        seeds = max((len(one.finals) for one in found), default=0)
        lines.append(
            f"- **{contest.title}**: {answer(contest, board.rules, found)}"
            + (f" Up to {seeds} seeds." if seeds else "")
        )
        if pictures is not None and not links and len(judged(found)) > 1:
            title, draw = _picture(contest, found, baseline(found, board.rules))
            links.append(f"![{title}]({pictures.draw(f'{board.name}.svg', draw, size=(6.4, 3.6), neutral=True)})")
    return ["\n".join(lines), *links]


def _picture(contest: Contest, found: list[Standing], base: Standing | None):
    """(title, a function that draws): the metric on the test half against memory, with standard errors over seeds."""
    scale = _memory(base) if base is not None and base.finals else 2**20
    unit = f"peak memory of a step, over that of {base.arm.name}" if scale != 2**20 else "peak memory of a step, MiB"
    points = []
    for one in found:
        if one.finals:
            values = [_shown(value, one) for value in one.finals.values()]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            mean = statistics.fmean(values)
            points.append(Point(one.arm.name, _memory(one) / scale, mean, not one.arm.control, one is base, error))
    record = next(r for one in judged(found) for r in one.records.values() if r["result"])["result"]
    title = f"{contest.title}: {record['metric']}, test half"
    return title, scatter(points, unit, f"{record['metric']}, test half", record["higher_is_better"])


def answer(contest: Contest, rules: Rules, found: list[Standing]) -> str:
    """Which method to use, in a sentence: who leads, who is not shown to be worse, the cheapest of these and its settings."""
    if len(judged(found)) < 2:
        return "No two methods have been tested yet."
    first, level_with, _ = leading(found, rules)
    text = f"**{first.arm.name}** leads ({_share(first.mean, first)}"
    without = plain(found)
    text += f"; non-private {_share(without.mean, without)})" if without is not None else ")"
    if level_with:
        text += f"; not shown to be worse: {_some([one.arm.name for one in level_with])}"
        cheapest = min([first, *level_with], key=step_time)
        text += f"; the cheapest of these is **{cheapest.arm.name}**"
    else:
        cheapest = first
        text += "; all others are worse"
    open_ = [one for one in found if one.verdict is not None and one.verdict.verdict == "undecided"]
    verdicts = sum(one.verdict is not None for one in found)
    text += f" ({_settings(cheapest)}). Against {rules.baseline} {verdicts - len(open_)} of {verdicts} verdicts are in."
    return text


def _some(names: list[str]) -> str:
    return ", ".join(names if len(names) <= MANY else [*names[: MANY - 1], f"{len(names) - MANY + 1} more"])


def _contest(contest: Contest, rules: Rules, look: Look) -> list[Part]:
    found = standings(contest, rules, look)
    failed = [f"- {one.arm.name}: {why}" for one in found if (why := _failure(one))]
    lost: list[Part] = ["Failed:\n\n" + "\n".join(failed)] if failed else []
    if not any(one.finals for one in found):
        tried = sum(len(scores) for one in found for _, scores in one.tuning.scores)
        return [f"Nothing has been tested yet; {tried} runs of tuning are there.", *lost]
    base = baseline(found, rules)
    ranked = sorted((one for one in found if one.finals), key=lambda one: (one.arm.control, -one.mean))
    cells = [_row(one, base, rules) for one in ranked]
    missing = [one.arm.name for one in found if not one.finals and not _failure(one)]
    parts: list[Part] = [answer(contest, rules, found), Table(cells), _caption(contest, ranked[0])]
    if missing:
        parts.append(f"Not tested yet: {', '.join(missing)}.")
    return parts + lost


def _failure(one: Standing) -> str | None:
    """Why an arm, or some of its tests, ended without a result."""
    reasons = [r["error"] for r in one.records.values() if r["status"] != "done"]
    if one.tuning.failed is None and reasons:
        return f"{len(reasons)} of {len(one.records)} tests: {reasons[0]}"
    return one.tuning.failed


def _row(one: Standing, base: Standing | None, rules: Rules) -> dict[str, str]:
    metric = next(iter(one.records.values()))
    name = metric["result"]["metric"] if metric["result"] else "metric"
    return {
        "method": one.arm.name,
        f"{name}, test half": _spread(one),
        "seeds": str(len(one.finals)),
        "against the baseline": said(one, base, rules),
        "settings": _settings(one),
        "tuning gained": _gain(one),
        "time": _ratio(one, base, step_time),
        "memory": _ratio(one, base, _memory),
    }


def said(one: Standing, base: Standing | None, rules: Rules) -> str:
    """What is decided of an arm against the baseline, in a few words."""
    if one is base:
        return "the baseline"
    if one.verdict is None:
        return "control" if one.arm.control else "–"
    found = one.verdict
    if found.verdict == "undecided":
        more = "more seeds than anyone will run" if found.more is None else f"about {found.more} more"
        return f"{found.difference:+.3f}, undecided ({more})"
    word = f"the same within {rules.margin:g}" if found.verdict == "the same" else f"**{found.verdict}**"
    return f"{found.difference:+.3f}, {word} ({found.low:+.3f} to {found.high:+.3f})"


def _spread(one: Standing) -> str:
    values = [_shown(value, one) for value in one.finals.values()]
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _shown(value: float, one: Standing) -> float:
    """The metric as it is: inside, larger is always better."""
    record = next(r for r in one.records.values() if r["result"])
    return value if record["result"]["higher_is_better"] else -value


def _share(value: float, one: Standing) -> str:
    return f"{_shown(value, one):.3f}"


def _settings(one: Standing) -> str:
    spec = one.spec
    return ", ".join(f"{key} {value:g}" for key, value in {"lr": spec.lr, **one.tuning.chosen}.items())


def _gain(one: Standing) -> str:
    """First seed of tuning: best of all trials over the defaults, and the expected best of two trials (1909.03004)."""
    firsts = [scores[0] for _, scores in one.tuning.scores if scores]
    if len(firsts) < 2:
        return "–"
    two = statistics.fmean(max(pair) for pair in itertools.combinations(firsts, 2))
    return f"{max(firsts) - firsts[0]:+.3f} (of two trials {two - statistics.fmean(firsts):+.3f} over one)"


def step_time(one: Standing) -> float:
    known = [c for r in one.records.values() if (c := r["cost"].get("step_cpu_s") or r["cost"].get("step_s"))]
    return statistics.median(known) if known else math.inf


def _memory(one: Standing) -> float:
    return statistics.median(sum(r["cost"]["peak_bytes"].values()) for r in one.records.values())


def _ratio(one: Standing, base: Standing | None, cost) -> str:
    if base is None or not base.finals:
        return "–"
    mine, theirs = cost(one), cost(base)
    return f"{mine / theirs:.2f}" if theirs and math.isfinite(mine) and math.isfinite(theirs) else "–"


def _caption(contest: Contest, one: Standing) -> str:
    spec = one.spec
    record = next(r for r in one.records.values() if r["status"] == "done")
    budget = ""
    if privacy := record["privacy"]:
        budget = f"ε ≤ {privacy['target']:g}, δ = {privacy['delta']:.3g}; N = {privacy['num_examples']:,}, "
    return f"{spec.model}; {budget}B = {spec.batch_size:,}, T = {spec.steps:,}. Time and memory of a step over the baseline's."


def _reading(rules: Rules, lower: bool) -> str:
    """lower: whether a metric of the board is better where it is lower."""
    fewest, most = rules.seeds
    chosen = (
        f"Settings of each method are the best of {rules.trials} trials (its defaults, and points of one low-discrepancy "
        "sequence in a space of equal width) on the tune half of the validation data, by halving over "
        f"{rules.tuning_seeds} seeds. "
        "Verdicts are on the test half with other seeds"
        if rules.trials > 1
        else "Settings are those that the board names; none was chosen on these data. Verdicts are on the test half"
    )
    seeds = f"{fewest} to {most}, added while one is open" if most > fewest else f"{most} seeds"
    signs = " Differences are gains: by how much the metric is lower." if lower else ""
    return (
        f"How to read it. {chosen}, {seeds}. They hold whenever one stops: the t test as an e-process over paired seeds "
        f"(2310.03722), {1 - LEVEL:.0%} for all verdicts of a table together (Bonferroni). `the same`: the whole interval lies "
        f"within {rules.margin:g}.{signs} Worse than the leader is what its own seeds beside the leader's show, "
        f"{1 - LEVEL:.0%} for all such pairs together, or what both intervals against the baseline do."
        + (" Choices made by tuning are not covered by ε." if rules.trials > 1 else "")
    )
