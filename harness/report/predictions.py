"""What was predicted of methods before they were run, and what their runs say: held, failed or undecided.

A prediction is a statement about a difference of means over seeds, and a margin. Its 95% interval (Student's t over paired
seeds) lies inside of what was predicted, outside of it, or on the border; then more seeds would be needed.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

import msgspec
from scipy import stats

from dpft.harness.border.documents import from_toml
from dpft.harness.border.values import Filled, Name, Positive
from dpft.harness.report.rows import Row
from dpft.harness.report.text import Part, Table
from dpft.harness.report.views import Group

FILE = files("dpft.tasks") / "predictions.toml"
LEVEL, FEWEST = 0.95, 3  # of intervals; seeds
MEASURES = ("metric", "alignment", "time", "memory")
# expectation -> (least, greatest) difference that it allows, in margins
EXPECTATIONS = {
    "better": (1.0, math.inf),
    "worse": (-math.inf, -1.0),
    "not worse": (-1.0, math.inf),
    "not better": (-math.inf, 1.0),
    "same": (-1.0, 1.0),
}
DEFAULTS = {"clipping": "abadi", "mechanism": "gaussian", "unit": "example"}


class Prediction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of tasks/predictions.toml.

    Attributes:
        says: the statement in words; source: where it is from.
        row: settings that pick the row it is about, `method` among them.
        against: the same of those it is compared with; of several, the one with the best mean.
        expect: one of EXPECTATIONS, of row minus the other; of time and memory of the logarithm of their ratio.
        margin: how much is nothing.
        task: whose runs it is about.
        measure: one of MEASURES; ratio: what is subtracted from a logarithm: 10 expects ten times as much.
    """

    says: Filled
    source: Filled
    row: dict[str, Any]
    against: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    expect: Literal[tuple(EXPECTATIONS)]
    margin: Positive
    task: Name = "sentences"
    measure: Literal[MEASURES] = "metric"
    ratio: Positive = 1.0


class _File(msgspec.Struct, forbid_unknown_fields=True):
    prediction: list[Prediction]


@dataclass(frozen=True)
class Answer:
    """verdict: held, failed, undecided, or not run; difference, low, high: its 95% interval; seeds: how many are shared."""

    verdict: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    against: str = ""


@cache
def predictions() -> tuple[Prediction, ...]:
    """All of the file, in its order. Raises BadInput, naming the entry, for one that cannot be understood."""
    return tuple(from_toml(FILE, _File, "The file of predictions", "mend it").prediction)


def answers(groups: list[Group]) -> list[Part]:
    """One table: each prediction whose rows are all in one of the groups, and its verdict."""
    cells = []
    for one in predictions():
        for group in groups:
            answer = answered(one, group)
            if answer is not None:
                cells.append({"predicted": one.says, "seen": _seen(one, answer), "": f"**{answer.verdict}**"})
                break
    if not cells:
        return ["No prediction is about these runs."]
    counts = {verdict: sum(c[""] == f"**{verdict}**" for c in cells) for verdict in ("held", "failed", "undecided")}
    return [
        f"Of {len(cells)} predictions {counts['held']} held, {counts['failed']} failed and {counts['undecided']} are undecided: "
        "the 95% interval of the mean difference over paired seeds (Student's t) lies inside of what was predicted, outside, or "
        "across its border.",
        Table(cells),
    ]


def answered(one: Prediction, group: Group) -> Answer | None:
    """None where the group is of another task, or a row is missing in it."""
    if group.spec["task"] != one.task:
        return None
    row = picked(one.row, group)
    others = [picked(settings, group) for settings in one.against]
    if row is None or not others or None in others:
        return None
    sign = 1 if row.higher_is_better else -1
    other = max(others, key=lambda r: sign * r.final) if one.measure == "metric" else others[0]
    mine, theirs = _values(row, one.measure), _values(other, one.measure)
    seeds = sorted(mine.keys() & theirs.keys())
    if one.measure in ("time", "memory"):
        pairs = [math.log(mine[s] / theirs[s]) - math.log(one.ratio) for s in seeds]
    else:
        pairs = [(sign if one.measure == "metric" else 1) * (mine[s] - theirs[s]) for s in seeds]
    return decided(one, pairs, group.names[group.rows.index(other)])


def decided(one: Prediction, pairs: list[float], against: str = "") -> Answer:
    """What paired differences say of a prediction; undecided with fewer than three of them.

    Accuracies are multiples of one example: two differences are equal by chance now and then, and their interval is a point.
    """
    if len(pairs) < FEWEST:
        return Answer("undecided", statistics.mean(pairs) if pairs else None, None, None, len(pairs), against)
    mean, half = statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
    half *= float(stats.t.ppf((1 + LEVEL) / 2, len(pairs) - 1))
    low, high = mean - half, mean + half
    least, greatest = (edge * one.margin if math.isfinite(edge) else edge for edge in EXPECTATIONS[one.expect])
    verdict = (
        "held" if least <= low and high <= greatest else "failed" if high < least or low > greatest else "undecided"
    )
    return Answer(verdict, mean, low, high, len(pairs), against)


def picked(settings: dict[str, Any], group: Group) -> Row | None:
    """The best row of a group that has these settings, of its spec or options; what DEFAULTS names as usual if not said."""
    wanted = {**DEFAULTS, **settings}
    for row in group.rows:
        has = {**row.spec, **row.spec["options"]}
        if all(has.get(key) == value for key, value in wanted.items()):
            return row
    return None


def _values(row: Row, measure: str) -> dict[int, float]:
    found = {}
    for record in row.records:
        value = {
            "metric": lambda r: r["result"]["final"],
            "alignment": lambda r: r["diagnostics"]["alignment"]["decoded"],
            "time": lambda r: r["cost"].get("step_cpu_s"),
            "memory": lambda r: sum(r["cost"]["peak_bytes"].values()),
        }[measure](record)
        if value is not None:
            found[record["spec"]["seed"]] = value
    return found


def _seen(one: Prediction, answer: Answer) -> str:
    what = {"metric": "", "alignment": "alignment ", "time": "time ", "memory": "memory "}[one.measure]
    if answer.difference is None:
        return "no seed is shared"
    if one.measure in ("time", "memory"):
        numbers = [
            math.exp(value) * one.ratio for value in (answer.difference, answer.low, answer.high) if value is not None
        ]
        text = f"{numbers[0]:.2f} times" + (f" ({numbers[1]:.2f} to {numbers[2]:.2f})" if len(numbers) > 1 else "")
    else:
        text = f"{answer.difference:+.3f}" + (
            f" ({answer.low:+.3f} to {answer.high:+.3f})" if answer.low is not None else ""
        )
    return f"{what}{text} beside {answer.against}, {answer.seeds} seed{'s' if answer.seeds != 1 else ''}"
