"""What a run says it reached and cost, against its spec, its task, its last row and its data."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy.shape import is_number
from dpft.harness.privacy.strategy import deviation
from dpft.harness.records.verifying import known, spending
from dpft.harness.records.verifying.asked import Asked
from dpft.harness.records.verifying.curves import Rows
from dpft.harness.runs import registry

SHARES = ("accuracy",)  # metrics that are a number of examples over all examples
FROM_DATA = ("threshold", "chance")  # None: the task leaves them to its data
UNLIKELY = 1e-9  # how improbable the last row may be, as a sample of what the final value is over


def findings(record: dict[str, Any], asked: Asked) -> Iterator[str]:
    """Of a run that is done; the curve apart."""
    spec, result, cost = asked.spec, record["result"], record["cost"]
    if result["all_metrics"].get(result["metric"]) != result["final"]:
        yield f"final is {result['final']!r}, but all_metrics holds {result['all_metrics'].get(result['metric'])!r}."
    if asked.task is not None:
        for key in ("metric", "higher_is_better", "threshold", "chance"):
            expected = getattr(asked.task, key)
            if result[key] != expected and not (expected is None and key in FROM_DATA):
                yield f"{key} of the result is {result[key]!r}, but task {spec.task} has {expected!r}."
    if cost["example_gradients"] != spec.batch_size * spec.steps:
        yield f"example_gradients is {cost['example_gradients']}, but the spec asks for {spec.batch_size * spec.steps}."
    if cost["trainable_parameters"] > cost["total_parameters"]:
        yield f"{cost['trainable_parameters']} of {cost['total_parameters']} parameters cannot be trained."
    if cost["warmup_s"] > cost["train_s"] * (1 + 1e-9) or (cost["step_s"] or 0) > cost["train_s"]:
        yield "The first steps, or one step, took longer than all of them."
    yield from _spectra(record, asked)


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


@functools.lru_cache(maxsize=2**16)
def _probability(size: int, good: int, sample: int, seen: int) -> float:
    """Of a sample of `size` examples, `good` of which are right: at most, or at least, `seen` right ones (twice the smaller)."""
    every, bad = _ways(size, sample), size - good
    shares = [
        math.exp(_ways(good, k) + _ways(bad, sample - k) - every)
        for k in range(max(0, sample - bad), min(good, sample) + 1)
    ]
    cut = seen - max(0, sample - bad)
    return 2 * min(math.fsum(shares[: max(0, cut + 1)]), math.fsum(shares[max(0, cut) :]))


def _ways(of: int, taken: int) -> float:
    """The logarithm of the number of ways to take some of a set."""
    return math.lgamma(of + 1) - math.lgamma(taken + 1) - math.lgamma(of - taken + 1)


def _spectra(record: dict[str, Any], asked: Asked) -> Iterator[str]:
    """The noise in the released matrices against sigma C / B: sigma of the gradient, C where it stays the run's."""
    privacy, spec = record["privacy"], record["spec"]
    if privacy is None or "spectra" not in record["diagnostics"] or _adaptive(asked):
        return
    spectra, scale = record["diagnostics"]["spectra"], spec["clip_norm"] / spec["batch_size"]
    for row in spectra if isinstance(spectra, list) else [None]:
        step, matrices = (row.get("step"), row.get("matrices")) if isinstance(row, dict) else (None, None)
        shaped = isinstance(matrices, dict) and all(isinstance(one, dict) for one in matrices.values())
        if not shaped or type(step) is not int:
            yield "The spectra in the diagnostics are not matrices by step."
            return
        wider = deviation(spec.get("bands", 1), step - 1)  # correlated noise
        known_std = [sigma * scale * wider for sigma in _gradient_noise(privacy, step)]
        for name, one in matrices.items():
            found = one.get("noise_std")
            if not is_number(found) or not any(math.isclose(found, std, rel_tol=1e-3) for std in known_std):
                said = " or ".join(f"{std:.4g}" for std in known_std) or "that of no gradient"
                yield f"The release of {name} had noise of standard deviation {found!r}, but sigma C / B is {said}."
                return


def _gradient_noise(privacy: dict[str, Any], step: int) -> list[float]:
    """Noise multipliers that the gradient of that step (from 1) may have had: of any step, where releases were lost."""
    found = {
        release["noise_multiplier"]
        for event in privacy["ledger"]
        if privacy.get("steps_lost") or event["step_from"] < step <= event["step_to"]
        for release in event["releases"]
        if release["name"] == "gradient"
    }
    return sorted(found)


def _adaptive(asked: Asked) -> bool:
    """Whether the clip norm follows releases, so that the spec does not say what it was."""
    try:
        return registry.instance(asked.spec).rule.adaptive
    except BadInput:
        return False
