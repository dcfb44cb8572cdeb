"""The epsilon of every row of a curve, computed again from the ledger: it is a function of the plan alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.privacy import pure, tail
from dpft.harness.privacy.accountant import tolerance
from dpft.harness.privacy.curve import epsilon_curve
from dpft.harness.privacy.ledger import Ledger
from dpft.harness.privacy.recompute import REPEATS
from dpft.harness.privacy.spent import covering
from dpft.harness.records.verifying.curves import Rows


def findings(record: dict[str, Any], rows: Rows) -> Iterator[str]:
    """Of a private run that is done, whose steps all have one noise multiplier, whatever shares it; noise of random scale, and
    batches that are no Poisson samples, are left to the steps that `verify_record` looks at: their whole curve takes minutes."""
    privacy = record["privacy"]
    if privacy is None or privacy.get("steps_lost"):
        return
    ledger = Ledger.from_events(privacy["ledger"])
    kinds = covering(ledger)
    if kinds is None or len(kinds) != 1:
        return
    ((q, sigma, _),) = kinds
    target, delta = float(privacy["target"]), float(privacy["delta"])
    left = tail.checked(ledger.events, delta, privacy.get("noise_stream", 1))
    try:
        if delta == 0:
            (event,) = ledger.events
            spent = pure.curve(q, event["noise_multiplier"], privacy["steps_planned"])
        else:
            turns = ledger.sampling.participations
            rounds = epsilon_curve(sigma, q, turns(privacy["steps_planned"]), left, target)
            spent = [rounds[turns(step)] for step in range(privacy["steps_planned"] + 1)]
    except BadInput:
        return  # said of the whole ledger
    for row, value in zip(rows, spent[1:], strict=False):
        if abs(row["epsilon"] - value) > REPEATS * tolerance(target, delta)[0]:
            yield f"Row {row['step']} of the curve has epsilon {row['epsilon']:.6g}, but the ledger gives {value:.6g}."
            return
