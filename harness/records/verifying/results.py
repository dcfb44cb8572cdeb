"""What a run says it reached and cost, against its spec, its task, its last row and its data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dpft.harness.privacy.shape import is_number
from dpft.harness.records.verifying import known, spending
from dpft.harness.records.verifying.asked import Asked
from dpft.harness.records.verifying.curves import Rows

SHARES = ("accuracy",)  # metrics that are a number of examples over all examples
UNLIKELY = 1e-9  # how improbable the last row may be, as a sample of what the final value is over


def findings(record: dict[str, Any], asked: Asked) -> Iterator[str]:
    """Of a run that is done; the curve apart."""
    spec, result, cost = asked.spec, record["result"], record["cost"]
    if result["all_metrics"].get(result["metric"]) != result["final"]:
        yield f"final is {result['final']!r}, but all_metrics holds {result['all_metrics'].get(result['metric'])!r}."
    if asked.task is not None:
        facts = ("metric", "higher_is_better", "threshold", *(["chance"] if asked.task.chance is not None else []))
        for key in facts:
            if result[key] != getattr(asked.task, key):
                yield f"{key} of the result is {result[key]!r}, but task {spec.task} has {getattr(asked.task, key)!r}."
    if cost["example_gradients"] != spec.batch_size * spec.steps:
        yield f"example_gradients is {cost['example_gradients']}, but the spec asks for {spec.batch_size * spec.steps}."
    if cost["trainable_parameters"] > cost["total_parameters"]:
        yield f"{cost['trainable_parameters']} of {cost['total_parameters']} parameters cannot be trained."
    if cost["warmup_s"] > cost["train_s"] * (1 + 1e-9) or (cost["step_s"] or 0) > cost["train_s"]:
        yield "The first steps, or one step, took longer than all of them."
    yield from _spectra(record)


def against_curve(record: dict[str, Any], asked: Asked, rows: Rows) -> Iterator[str]:
    """The curve's epsilon; and final against the last row: over the same examples the same, over a sample of them near."""
    yield from spending.findings(record, rows)
    spec, result, last = asked.spec, record["result"], rows[-1]["metric"]
    size = known.validation_size(record)
    sample = spec.eval_examples
    if sample is None or (size is not None and sample >= size):
        if not math.isclose(result["final"], last, rel_tol=1e-4, abs_tol=1e-9):
            yield f"final is {result['final']!r}, but the last row of the curve, over the same examples, {last!r}."
        sample = None
    if result["metric"] not in SHARES:
        return
    for value, of in (
        (result["final"], size),
        *((row["metric"], sample or size) for row in rows if row["metric"] is not None),
    ):
        if not 0 <= value <= 1 or (of is not None and abs(value * of - round(value * of)) > 1e-4):
            yield f"An accuracy of {value!r} is not possible{f' over {of} examples' if of else ''}."
            return
    if None not in (size, sample):
        chance = _probability(size, round(result["final"] * size), sample, round(last * sample))
        if chance < UNLIKELY:
            yield (
                f"final is {result['final']!r} over {size} examples, but the last row {last!r} over {sample} of them: that "
                "does not go together."
            )


def _probability(size: int, good: int, sample: int, seen: int) -> float:
    """Of a sample of `size` examples, `good` of which are right: at most, or at least, `seen` right ones (twice the smaller)."""
    counts = [math.comb(good, k) * math.comb(size - good, sample - k) for k in range(sample + 1)]
    low, high, total = sum(counts[: seen + 1]), sum(counts[seen:]), math.comb(size, sample)
    return 2 * min(low, high) / total


def _spectra(record: dict[str, Any]) -> Iterator[str]:
    """The noise in the released matrices against sigma C / B."""
    privacy, spec = record["privacy"], record["spec"]
    if privacy is None or privacy["noise_multiplier"] is None or "spectra" not in record["diagnostics"]:
        return
    std = privacy["noise_multiplier"] * spec["clip_norm"] / spec["batch_size"]
    spectra = record["diagnostics"]["spectra"]
    for row in spectra if isinstance(spectra, list) else [None]:
        matrices = row.get("matrices") if isinstance(row, dict) else None
        if not isinstance(matrices, dict) or not all(isinstance(one, dict) for one in matrices.values()):
            yield "The spectra in the diagnostics are not matrices by step."
            return
        for name, one in matrices.items():
            found = one.get("noise_std")
            if not is_number(found) or not math.isclose(found, std, rel_tol=1e-3):
                yield f"The release of {name} had noise of standard deviation {found!r}, but sigma C / B is {std:.4g}."
                return
