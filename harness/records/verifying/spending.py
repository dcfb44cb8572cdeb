"""The epsilon of every row of a curve, computed again from the ledger: it is a function of the plan alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy.accountant import tolerance
from dpft.harness.privacy.calibration import Noise, Wanted, curve_of
from dpft.harness.privacy.noise_kinds import covering_gaussian
from dpft.harness.privacy.recompute import REPEATS
from dpft.harness.records.verifying.curves import Rows


def findings(record: dict[str, Any], rows: Rows) -> Iterator[str]:
    """Of a private run that is done, with one kind of step; noise of random scale is left to the steps that `verify_record`
    looks at, because its whole curve takes minutes."""
    privacy = record["privacy"]
    if privacy is None or len(privacy["ledger"]) != 1 or privacy.get("steps_lost"):
        return
    (event,) = privacy["ledger"]
    release = event["releases"][0]
    noise = Noise(release["mechanism"], release["noise_multiplier"], release.get("parameters", {}))
    if (
        len(event["releases"]) != 1
        or covering_gaussian(noise.mechanism, noise.noise_multiplier, noise.parameters) is None
    ):
        return
    stream = privacy.get("noise_stream", 1)
    more = {} if stream == 1 else {"noise_stream": stream}
    target, delta = float(privacy["target"]), float(privacy["delta"])
    try:
        spent = curve_of(noise, Wanted(target, delta, event["sampling_probability"], privacy["steps_planned"], **more))
    except BadInput:
        return  # said of the whole ledger
    for row, value in zip(rows, spent[1:], strict=False):
        if abs(row["epsilon"] - value) > REPEATS * tolerance(target, delta)[0]:
            yield f"Row {row['step']} of the curve has epsilon {row['epsilon']:.6g}, but the ledger gives {value:.6g}."
            return
