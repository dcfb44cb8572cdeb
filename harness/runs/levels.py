"""What protecting users costs in noise, by accounting alone: examples or users sampled, for several group sizes.

The figure to compare is the noise of the mean gradient at one epsilon and one expected number of examples a step. The gradient of
a user's mean loss over n examples that pull in directions of their own is shorter than one example's by sqrt(n), so whole users
are clipped to C / sqrt(n); where a user's examples pull alike, that is too low, and users look better here than they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.runs import registry, users
from dpft.harness.runs.plan import plan
from dpft.harness.runs.spec import RunSpec

GROUP_SIZES = (1, 2, 4, 8)


def compared(
    spec: RunSpec, num_examples: int, data_dir: Path | None = None, group_sizes: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """One row for each group size: users, examples that count, and for `els` and `uls` sigma, B and noise (std of a coordinate of
    the mean, in C / B of a batch of examples), or why there is none.

    spec: batch_size is of examples. num_examples: N; where the task does not say whose they are, every user is taken to have as
    many as count. Raises BadInput for a run without privacy.
    """
    if spec.epsilon is None:
        raise BadInput(f"{spec.method} is not private, so there is no noise to plan; name a private method.")
    named, rows = bool(registry.task(spec.task)(spec.task_options).users), []
    for size in group_sizes or GROUP_SIZES:
        own = replace(spec, unit="user", user_sampling="els", group_size=size, delta=spec.delta)
        counted = users.counts(own, data_dir) if named else (num_examples // size, num_examples // size * size)
        each = counted[1] / counted[0]
        whole = replace(own, user_sampling="uls", batch_size=max(1, round(spec.batch_size / each)))
        row: dict[str, Any] = {"group_size": size, "users": counted[0], "examples": counted[1], "problem": None}
        for one, longer in ((own, 1.0), (whole, math.sqrt(each))):
            found = {"sigma": None, "B": one.batch_size, "noise": None}
            try:
                sigma = plan(one, data_dir, None, counted[1], counted[0]).noise_multiplier
                # the batch of users is a whole number: what rounding changes of their mean is no matter of sampling
                found |= {"sigma": sigma, "noise": sigma * longer}
            except BadInput as problem:
                row["problem"] = f"{one.user_sampling}: {problem}"
            row[one.user_sampling] = found
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows for a reader."""
    return [
        {
            "k": str(row["group_size"]),
            "users": f"{row['users']:,}",
            "examples": f"{row['examples']:,}",
            "ELS: B, σ": _drawn(row["els"]),
            "ULS: B, σ": _drawn(row["uls"]),
            "ELS noise": _shown(row["els"]["noise"]),
            "ULS noise": _shown(row["uls"]["noise"]),
            "less noise": _less(row),
        }
        for row in rows
    ]


def _drawn(found: dict[str, Any]) -> str:
    return f"{found['B']:,}, {_shown(found['sigma'])}"


def _less(row: dict[str, Any]) -> str:
    els, uls = row["els"]["noise"], row["uls"]["noise"]
    if None in (els, uls) or math.isclose(els, uls, rel_tol=0.01):
        return "–"
    return "ELS" if els < uls else "ULS"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
