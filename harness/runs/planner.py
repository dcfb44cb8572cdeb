"""What more data, a larger batch, more steps or more epsilon would buy or cost: from accounting alone, before anything trains.

The figure to look at is the noise-batch ratio sigma/B, the noise of the mean gradient in units of the clip norm: with it and
the number of steps one knows how good a private run can be (2501.18914).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy.strategy import deviation, prefix_deviation
from dpft.harness.runs.plan import plan
from dpft.harness.runs.resolve import check_bands
from dpft.harness.runs.spec import RunSpec, check_values

CHANGES: tuple[tuple[str, dict[str, float]], ...] = (
    ("as planned", {}),
    ("twice the examples", {"examples": 2}),
    ("half the examples", {"examples": 0.5}),
    ("twice the batch", {"batch_size": 2}),
    ("four times the batch", {"batch_size": 4}),
    ("half the batch", {"batch_size": 0.5}),
    ("twice the steps", {"steps": 2}),
    ("half the steps", {"steps": 0.5}),
    ("twice the batch, half the steps", {"batch_size": 2, "steps": 0.5}),
    ("twice the epsilon", {"epsilon": 2}),
    ("half the epsilon", {"epsilon": 0.5}),
)


def alternatives(
    spec: RunSpec, num_examples: int, dimension: Callable[[], int] | None = None, data_dir: Path | None = None
) -> list[dict[str, Any]]:
    """One row for every change: N, B, T, epsilon, sigma, noise per mean gradient and gradients to compute, over the plan's.

    dimension: as in `plan`. A change that cannot be has its reason in `problem` and no figures. Raises BadInput for a run
    without privacy.
    """
    if spec.epsilon is None:
        raise BadInput(f"{spec.method} is not private, so there is no noise to plan; name a private method.")
    rows: list[dict[str, Any]] = []
    for said, factors in CHANGES:
        n = round(num_examples * factors.get("examples", 1))
        other = replace(
            spec,
            batch_size=max(1, round(spec.batch_size * factors.get("batch_size", 1))),
            steps=max(1, round(spec.steps * factors.get("steps", 1))),
            epsilon=spec.epsilon * factors.get("epsilon", 1),
            warmup_steps=0,
        )
        row = {"change": said, "N": n, "B": other.batch_size, "T": other.steps, "epsilon": other.epsilon}
        try:
            made = plan(other, data_dir, dimension, n)
        except BadInput as reason:
            rows.append(row | _nothing(str(reason)))
            continue
        sigma = made.noise_multiplier
        figures = {"sigma": sigma, "sigma/B": sigma / other.batch_size, "gradients": other.batch_size * other.steps}
        first = rows[0] if rows and rows[0]["problem"] is None else None
        times = {
            "noise": figures["sigma/B"] / first["sigma/B"] if first else (1.0 if not rows else None),
            "work": figures["gradients"] / first["gradients"] if first else (1.0 if not rows else None),
        }
        rows.append(row | figures | times | {"problem": None})
    return rows


NOTES = {
    "--what-if": "Noise: of the mean gradient in units of the clip norm, over the plan's. Work: gradients to compute.",
    "--samplers": "Price: sigma over Poisson's. Noise of a step, and of the sum of all so far: root mean square, over Poisson's.",
}
SAMPLERS: tuple[tuple[str, dict[str, float]], ...] = (
    ("poisson", {}),
    ("truncated", {}),
    ("truncated", {"cut": 1.2}),
    ("truncated", {"cut": 1.1}),
    *(("cyclic", {"bands": bands}) for bands in (1, 2, 4, 8, 16)),
)


def samplers(spec: RunSpec, num_examples: int, data_dir: Path | None = None) -> list[dict[str, Any]]:
    """One row for every way to draw the batches of `spec` at its budget; `cut` in expected batches, none: the default.

    `price`: sigma over that of Poisson sampling. `step`: noise of one step in the root of its mean square over steps, and `sums`:
    that of the prefix sums of all steps (harness/privacy/strategy.py), both in units of the clip norm over those of Poisson
    sampling. A row that cannot be has its reason in `problem`. Raises BadInput for a run without privacy.
    """
    if spec.epsilon is None:
        raise BadInput(f"{spec.method} is not private, so samplers cost it nothing; name a private method.")
    rows: list[dict[str, Any]] = []
    for sampler, more in SAMPLERS:
        bands, cut = int(more.get("bands", 1)), more.get("cut")
        cap = None if cut is None else round(cut * spec.batch_size)
        other = replace(spec, sampler=sampler, bands=bands, truncated_batch_size=cap)
        row = {"sampler": sampler, "bands": bands, "cap": cap, "problem": None}
        try:
            check_values(other)
            check_bands(other)
            made = plan(other, data_dir, None, num_examples)
        except BadInput as reason:
            rows.append(row | dict.fromkeys(("sigma", "sigma/B", "price", "step", "sums")) | {"problem": str(reason)})
            continue
        row["cap"] = getattr(made.sampling, "truncated_batch_size", None)
        sigma, least = made.noise_multiplier, rows[0]["sigma"] if rows else made.noise_multiplier
        deviations = math.fsum(deviation(bands, step) ** 2 for step in range(spec.steps)) / spec.steps
        sums = prefix_deviation(bands, spec.steps) / prefix_deviation(1, spec.steps)
        figures = {"price": 1.0, "step": deviations**0.5, "sums": sums}
        row |= {"sigma": sigma, "sigma/B": sigma / spec.batch_size}
        rows.append(row | {key: None if least is None else value * sigma / least for key, value in figures.items()})
    return rows


def samplers_table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows for a reader."""
    return [
        {
            "sampler": row["sampler"] + (f", bands {row['bands']}" if row["sampler"] == "cyclic" else ""),
            "at most": _shown(row["cap"], "{:,}"),
            "σ": _shown(row["sigma"], "{:.3f}"),
            "σ/B": _shown(row["sigma/B"], "{:.2e}"),
            "price": _shown(row["price"], "× {:.4f}"),
            "noise of a step": _shown(row["step"], "× {:.2f}"),
            "noise of sums": _shown(row["sums"], "× {:.2f}"),
        }
        for row in rows
    ]


def _nothing(reason: str) -> dict[str, Any]:
    return {"sigma": None, "sigma/B": None, "gradients": None, "noise": None, "work": None, "problem": reason}


def table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows for a reader."""
    return [
        {
            "change": row["change"],
            "N": f"{row['N']:,}",
            "B": f"{row['B']:,}",
            "T": f"{row['T']:,}",
            "ε": f"{row['epsilon']:g}",
            "σ": _shown(row["sigma"], "{:.3f}"),
            "σ/B": _shown(row["sigma/B"], "{:.2e}"),
            "noise": _shown(row["noise"], "× {:.2f}"),
            "work": _shown(row["work"], "× {:.2g}"),
        }
        for row in rows
    ]


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
