"""What more data, a larger batch, more steps or more epsilon would buy or cost: from accounting alone, before anything trains.

The figure to look at is the noise-batch ratio sigma/B, the noise of the mean gradient in units of the clip norm: with it and
the number of steps one knows how good a private run can be (2501.18914).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.runs.plan import plan
from dpft.harness.runs.spec import RunSpec

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
