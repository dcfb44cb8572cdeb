"""Which entries a record's `privacy` section holds, and of what type: with anything else nothing can be recomputed."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import Any

from dpft.harness.privacy import units

CONTRACT = ("ledger", "target", "delta", "epsilon")  # all that a record of another program must have
WHOLE = ("num_examples", "steps_planned", "steps_run")
ONE_KIND = ("sampling_probability", "expected_batch_size", "noise_multiplier", "releases_per_step")  # null: of several
VERDICT = ("within_budget", "error")
OWN = (*WHOLE, *ONE_KIND, *VERDICT, "adjacency", "sampling", "cross_checks", "tolerance", "epsilon_at_threshold")


def findings(privacy: Any, foreign: bool) -> Iterator[str]:
    """Missing keys and values of the wrong type; foreign: the record is of another program."""
    if not isinstance(privacy, dict):
        yield f"The privacy section must be an object or null, not {type(privacy).__name__}."
        return
    missing = [key for key in (CONTRACT if foreign else (*CONTRACT, *OWN)) if key not in privacy]
    if missing:
        yield f"The privacy section lacks {', '.join(missing)}."
        return
    for key in (*WHOLE, "releases_per_step"):
        least = 0 if key == "steps_run" else 1
        value = privacy.get(key)
        absent = key not in privacy or (value is None and key in ONE_KIND)
        if not absent and (type(value) is not int or not least <= value <= 10**15):
            yield f"{key} must be a whole number of at least {least}, not {value!r}."
    for key in ("target", "delta", *ONE_KIND[:3]):
        value = privacy.get(key)
        absent = key not in privacy or (value is None and key in ONE_KIND)
        if not absent and (
            not is_number(value) or value < 0 or (value == 0 and key != "delta")
        ):  # delta 0: pure epsilon
            yield f"{key} must be a finite positive number, not {value!r}."
    values = privacy["epsilon"]
    if not isinstance(values, list) or len(values) != 3 or not all(map(is_number, values)):
        yield f"epsilon must be [lower, estimate, upper], not {values!r}."
    for key, names in (("cross_checks", ("pld", "opacus_prv")), ("tolerance", ("eps_error", "delta_error"))):
        content = privacy.get(key)
        optional = key == "cross_checks"
        if key in privacy and (
            not isinstance(content, dict)
            or any(
                name not in content or not (is_number(content[name]) or (optional and content[name] is None))
                for name in names
            )
        ):
            yield f"{key} must hold the numbers {' and '.join(names)}, not {content!r}."
    stream, short, lost = privacy.get("noise_stream", 1), privacy.get("tail_delta", 0), privacy.get("steps_lost", 0)
    if type(stream) is not int or stream not in (1, 2):
        yield f"noise_stream is {stream!r}, which this dpft does not know."
    if not is_number(short) or not 0 <= short < 1:
        yield f"tail_delta must be a number from 0 to 1, not {short!r}."
    if type(lost) is not int or not 0 <= lost <= 10**15:
        yield f"steps_lost must be a whole number, not {lost!r}."
    yield from units.shape(privacy)
    reached = privacy.get("epsilon_at_threshold")
    if reached is not None and not is_number(reached):
        yield f"epsilon_at_threshold must be a number or null, not {reached!r}."


def is_number(value: Any) -> bool:
    """Whether it is a real number, not too large for the accountants."""
    if type(value) is float or type(value) is int:  # all that JSON has; the rest takes a hundred times as long
        return -1e300 < value < 1e300
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < 1e300
