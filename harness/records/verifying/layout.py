"""What every section of a record holds, and of what type: with anything else nothing more can be checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import msgspec

from dpft.harness.privacy.shape import is_number
from dpft.harness.records.schema import READ, SECTIONS, STATUSES

Check = Callable[[Any], bool]


def _either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _null(value: Any) -> bool:
    return value is None


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def count(value: Any) -> bool:
    """Whether it is a whole number from 0 to 10^15."""
    return type(value) is int and 0 <= value <= 10**15


def _step(value: Any) -> bool:
    return count(value) and value >= 1


def _of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _list_of_steps(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) and _step(row.get("step")) for row in value)


def _hex(digits: int) -> Check:
    return lambda value: isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


def _time(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


RUN_ID, RELEASE = _hex(16), _hex(32)
DONE: dict[str, dict[str, tuple[str, Check]]] = {
    "result": {
        "metric": ("a name", _text),
        "higher_is_better": ("true or false", _flag),
        "chance": ("a number", is_number),
        "final": ("a number", is_number),
        "all_metrics": ("numbers by name", _of(is_number)),
        "best_step": ("a step", _step),
        "threshold": ("a number", is_number),
        "steps_to_threshold": ("a step or null", _either(_step, _null)),
        "censored": ("true or false", _flag),
    },
    "cost": {
        **dict.fromkeys(("total_s", "train_s", "eval_s", "warmup_s"), ("seconds", _amount)),
        "step_s": ("seconds or null", _either(_amount, _null)),
        "phase_s": ("seconds by phase", _of(_amount)),
        "peak_bytes": ("bytes by category", _of(count)),
        "example_gradients": ("a whole number", _step),
        "trainable_parameters": ("a whole number", _step),
        "total_parameters": ("a whole number", _step),
    },
    "diagnostics": {
        "private": ("false", lambda value: value is False),
        "alignment": ("numbers or nulls by name", _of(_either(is_number, _null))),
        "clipped_fraction": ("a number or null", _either(is_number, _null)),
    },
    "provenance": {
        "git": ("an object or null", _either(_null, lambda value: isinstance(value, dict))),
        "versions": ("versions by name", _of(_either(_text, _null))),
        "hardware": ("an object", lambda value: isinstance(value, dict)),
        "settings": ("an object", lambda value: isinstance(value, dict)),
        "started": ("a time with its zone", _time),
        "data_fingerprint": ("64 hex digits", _hex(64)),
        "model_fingerprint": ("64 hex digits", _hex(64)),
    },
}
_COUNT = ("a whole number", count)
# what not all records have: older ones, or those that have it beside their curve
LATER = {
    "provenance": {"train_examples": _COUNT, "validation_examples": _COUNT, "public_examples": _COUNT},
    "cost": {"step_cpu_s": ("seconds", _amount)},
    "diagnostics": {"alignment_by_parameter": ("rows by step", _list_of_steps)},
}
_HUGE = re.compile(rb"\xcb[\x7e\x7f\xfe\xff]", re.DOTALL)
PACKAGES = ("python", "dpft", "torch", "numpy", "prv-accountant", "dp-accounting")


def findings(record: dict[str, Any]) -> Iterator[str]:
    """Sections that are missing, and entries that are missing or of the wrong type, of a record of ours."""
    missing = [section for section in SECTIONS if section not in record]
    if missing:
        yield f"The record lacks {', '.join(missing)}."
        return
    if type(record["schema"]) is not int or record["schema"] not in READ:
        yield f"The record has schema {record['schema']!r}, not {' or '.join(map(str, READ))}."
    if record["status"] not in STATUSES if isinstance(record["status"], str) else True:
        yield f"The record has the status {record['status']!r}, which no run ends with."
        return
    if not RUN_ID(record["run_id"]):
        yield f"run_id must be 16 hex digits, not {record['run_id']!r}."
    if not isinstance(record["spec"], dict):
        yield f"spec must be an object, not {record['spec']!r}."
    if _may_be_huge(record) and any(_not_finite(record)):
        yield "The record holds a number that is not finite."
    done = record["status"] == "done"
    if record["error"] is not None if done else not _text(record["error"]):
        yield f"The run ended as {record['status']}, but its error is {record['error']!r}."
    if not done and record["result"] is not None:
        yield f"The run ended as {record['status']}, but it has a result."
    for section in DONE if done else ("diagnostics",):
        yield from _section(section, record[section])
    inside = record["diagnostics"] if record["schema"] == 1 else None
    if isinstance(inside, dict) and inside.get("alignment_by_parameter") is None:
        yield "The diagnostics section lacks alignment_by_parameter."


def _section(name: str, content: Any) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f"The {name} section must be an object, not {content!r}."
        return
    for key, (kind, check) in DONE[name].items():
        if key not in content:
            yield f"The {name} section lacks {key}."
        elif not check(content[key]):
            yield f"{key} in the {name} section must be {kind}, not {_short(content[key])}."
    for key, (kind, check) in LATER.get(name, {}).items():
        if content.get(key) is not None and not check(content[key]):
            yield f"{key} in the {name} section must be {kind}, not {_short(content[key])}."
    if name == "provenance" and isinstance(content.get("versions"), dict):
        lacking = [package for package in PACKAGES if package not in content["versions"]]
        if lacking:
            yield f"The versions lack {', '.join(lacking)}."


def _may_be_huge(record: dict[str, Any]) -> bool:
    """False: no number of `record` is NaN, infinite or 1e300 and more. A look at packed bytes takes a tenth of a walk's time.

    In MessagePack a float is a byte cb and its eight bytes, the exponent's highest bits first: 7e or 7f from 2^993 on.
    """
    try:
        return _HUGE.search(msgspec.msgpack.encode(record)) is not None
    except Exception:  # nested too deep, whole numbers of more than 64 bits
        return True


def _not_finite(value: Any) -> Iterator[bool]:
    pending = [value]
    while pending:
        one = pending.pop()
        for entry in one.values() if isinstance(one, dict) else one:
            if type(entry) is float:  # most of a record: nothing is called for it
                if not -1e300 < entry < 1e300:
                    yield True
            elif isinstance(entry, dict | list):
                pending.append(entry)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
