"""The rows of a curve against the spec, and the numbers of a record that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from dpft.harness.privacy.shape import is_number
from dpft.harness.query.queries import Nothing, Values
from dpft.harness.records.verifying.asked import Asked
from dpft.harness.runs.spec import RunSpec
from dpft.harness.statistics.thresholds import crossing

COLUMNS = (
    "step",
    "epsilon",
    "loss",
    "metric",
    "lr",
    "clipped_fraction",
    "alignment_noisy",
    "alignment_decoded",
    "snr",
)
COSINES = ("alignment_noisy", "alignment_decoded")
OBSERVED = (*COSINES, "snr")  # at evaluations of private runs alone
MEANS = (
    ("alignment", "noisy", "alignment_noisy"),
    ("alignment", "decoded", "alignment_decoded"),
    ("alignment", "snr", "snr"),
)
REL = 1e-9

Rows = Sequence[dict[str, Any]]


def findings(record: dict[str, Any], asked: Asked, rows: Rows) -> Iterator[str]:
    """What is wrong with the curve of a run that is done, and with what the record says of it."""
    spec = asked.spec
    if len(rows) != taken(record, spec):
        yield f"The curve holds {len(rows)} rows, but the run took {taken(record, spec)} steps."
        return
    lacking = [name for name in COLUMNS if name not in rows[0]]
    if lacking:
        yield f"The curve lacks the columns {', '.join(lacking)}."
        return
    for place, row in enumerate(rows):
        problem = _row(spec, place, row, len(rows))
        if problem is not None:
            yield f"Row {place + 1} of the curve {problem}."
            return
    if asked.method is not None:
        yield from _emptiness(asked, rows)
    yield from _result(record["result"], rows)
    yield from _diagnostics(record["diagnostics"], rows)


def taken(record: dict[str, Any], spec: RunSpec) -> int:
    """The steps that a run that is done has trained: all that were asked for, less releases lost with killed processes."""
    return spec.steps - (record["privacy"] or {}).get("steps_lost", 0)


def evaluated(rows: Rows) -> list[dict[str, Any]]:
    """The rows that hold a metric."""
    return [row for row in rows if row["metric"] is not None]


def _row(spec: RunSpec, place: int, row: dict[str, Any], last: int) -> str | None:
    """What is wrong with one row, as the end of a sentence; last: the run's last step."""
    for name in COLUMNS:
        if row[name] is not None and not is_number(row[name]):
            return f"has {name} {row[name]!r}"
    step = place + 1
    if row["step"] != step:
        return f"is of step {row['step']}"
    lr = spec.lr * spec.lr_factor(place)
    if row["lr"] is None or not math.isclose(row["lr"], lr, rel_tol=REL, abs_tol=1e-300):
        return f"has lr {row['lr']!r}, but the spec's schedule gives {lr!r}"
    due = step % spec.eval_every == 0 or step == last
    if (row["metric"] is not None) != due:
        return f"has metric {row['metric']!r}, but the spec evaluates {'there' if due else 'elsewhere'}"
    if (row["epsilon"] is None) != (spec.epsilon is None):
        return f"has epsilon {row['epsilon']!r}, but the spec has {spec.epsilon!r}"
    if any(row[name] is not None for name in OBSERVED) and not (due and spec.epsilon is not None):
        return "has an alignment, which only an evaluated step of a private run has"
    if any(row[name] is not None and abs(row[name]) > 1 + 1e-4 for name in COSINES):
        return "has an alignment that is no cosine"
    if row["snr"] is not None and row["snr"] < 0:
        return f"has snr {row['snr']!r}"
    share = row["clipped_fraction"]
    if share is not None and not (0 <= share <= 1 and spec.epsilon is not None):
        return f"has clipped_fraction {share!r}"
    return None


def _emptiness(asked: Asked, rows: Rows) -> Iterator[str]:
    """Losses and clipped shares are there wherever a method looks at examples and the batch has any."""
    looks, private = asked.method.asks != (Nothing,), asked.spec.epsilon is not None
    numbers = Values in asked.method.asks
    for row in rows:
        loss, share = row["loss"] is not None, row["clipped_fraction"] is not None
        alone = share and not loss and not numbers  # only a question for numbers may need no losses
        if (loss and not looks) or (share and not private) or (loss and private and not share) or alone:
            yield f"Row {row['step']} of the curve has loss {row['loss']!r} and clipped_fraction {row['clipped_fraction']!r}."
            return
    if looks and all(row["loss"] is None for row in rows):
        yield "The curve has no loss."


def _result(result: dict[str, Any], rows: Rows) -> Iterator[str]:
    """Best step and steps to threshold, as the run computed them from its curve."""
    seen, up = evaluated(rows), result["higher_is_better"]
    best = (max if up else min)(seen, key=lambda row: row["metric"])["step"]
    if result["best_step"] != best:
        yield f"best_step is {result['best_step']}, but the curve is best at step {best}."
    rule = result.get("threshold_rule", 1)
    if type(rule) is not int or not 1 <= rule <= 2:
        yield f"threshold_rule is {rule!r}, which is not known."
        return
    steps, metrics = [row["step"] for row in seen], [row["metric"] for row in seen]
    reached = crossing(steps, metrics, result["threshold"], up, rule=rule)
    if (result["steps_to_threshold"], result["censored"]) != (reached.step, reached.censored):
        yield (
            f"steps_to_threshold is {result['steps_to_threshold']} (censored: {result['censored']}), but the curve gives "
            f"{reached.step} (censored: {reached.censored})."
        )


def _diagnostics(diagnostics: dict[str, Any], rows: Rows) -> Iterator[str]:
    """Means over the curve, and the steps that are looked into by parameter."""
    found = [(f"{key} {name}", diagnostics[key].get(name), column) for key, name, column in MEANS]
    for name, recorded, column in (*found, ("clipped_fraction", diagnostics["clipped_fraction"], "clipped_fraction")):
        values = [row[column] for row in rows if row[column] is not None]
        mean = sum(values) / len(values) if values else None
        if (mean is None) != (recorded is None) or (
            mean is not None and not math.isclose(mean, recorded, rel_tol=1e-9, abs_tol=1e-12)
        ):
            yield f"The diagnostics' {name} is {recorded!r}, but the mean over the curve is {mean!r}."
    if "alignment_by_parameter" not in diagnostics:  # it lies beside the curve, and was not read with it
        return
    # of a method that asks for no gradients only the update can be held against one
    looked = [row["step"] for row in rows if any(row[name] is not None for name in COSINES)]
    steps = [row["step"] for row in diagnostics["alignment_by_parameter"]]
    if steps != looked:
        yield f"The diagnostics look into steps {steps}, the curve into {looked}."
