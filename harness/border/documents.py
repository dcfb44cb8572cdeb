"""JSON, TOML and settings as typed values. What does not fit becomes one sentence: the file, the key, the value, what to do."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dpft.harness.border import files, values
from dpft.harness.border.values import shown
from dpft.harness.errors import BadInput

KINDS = {
    "float": "a number",
    "int": "a whole number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "null": "null",
}


class Misfit(Exception):
    """A value that its type does not take. where: its key path, empty at the top; why: the end of a sentence after `where`."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where} {why}".strip())
        self.where, self.why = where, why


def parsed(text: str | bytes) -> Any:
    """Strict JSON: no NaN, no infinity, no number that is one, nested as deep as can be read. Raises ValueError."""
    try:
        return msgspec.json.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ValueError(str(error)) from None


def fitted(value: Any, kind: Any) -> Any:
    """`value` as type `kind`. Raises Misfit, naming the first entry that does not fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _misfit(value, kind, str(error)) from None
    except RecursionError:
        raise Misfit("", "is nested too deep") from None


def from_json(path: Path, kind: Any, what: str, hint: str) -> tuple[Any, Any]:
    """(the document as it is, as `kind`) of a JSON file. what, hint: as of `files.content`. Raises BadInput."""
    return checked(files.content(path, what, hint), kind, f"{what} {files.shown_path(path)}", hint)


def checked(content: bytes, kind: Any, where: str, hint: str) -> tuple[Any, Any]:
    """(the document as it is, as `kind`) of JSON. where: its name at the start of a sentence. Raises BadInput."""
    try:
        document = parsed(content)
        return document, fitted(document, kind)
    except ValueError as error:
        raise BadInput(f"{where} is damaged ({error}); {hint}.") from None
    except Misfit as problem:
        raise BadInput(f"{where} cannot be used: {sentence(problem)}; {hint}.") from None


def from_toml(path: Path, kind: Any, what: str, hint: str) -> Any:
    """A TOML file as `kind`. what, hint: as of `files.content`. Raises BadInput."""
    where = f"{what} {files.shown_path(path)}"
    try:
        return fitted(tomllib.loads(files.text(path, what, hint)), kind)
    except Misfit as problem:
        reason = f"cannot be used: {sentence(problem)}"
    except RecursionError:
        reason = "cannot be read (it is nested too deep)"
    except ValueError as error:  # a key that is given twice, and integers of thousands of digits among them
        reason = f"cannot be read ({' '.join(str(error).split())})"
    raise BadInput(f"{where} {reason}; {hint}.")


def sentence(problem: Misfit) -> str:
    """A misfit within a sentence about its document."""
    return f"{problem.where or 'it'} {problem.why}"


PHRASES: tuple[tuple[str, Callable[[re.Match], str]], ...] = (
    (r"Expected `.+` matching regex (.+)", lambda m: f"must be {DESCRIBED.get(m[1], 'of another form')}"),
    (r"Expected `str` of length (>=|<=) (\d+)", lambda m: f"must have {BOUNDS[m[1]]} {m[2]} characters"),
    (r"Expected `object` of length (>=|<=) (\d+)", lambda m: f"must have {BOUNDS[m[1]]} {m[2]} entries"),
    (r"Invalid enum value .+", lambda m: "must be one of those there are"),
    (r"Expected `array` of length (>=|<=) (\d+)", lambda m: f"must have {BOUNDS[m[1]]} {m[2]} entries"),
    (r"Expected `.+` (>=|<=|>|<) (.+)", lambda m: f"must be {BOUNDS[m[1]]} {float(m[2]):.12g}"),
    (r"Expected `(.+)`, got `.+`", lambda m: f"must be {' or '.join(KINDS.get(k, k) for k in m[1].split(' | '))}"),
    (r"Number out of range|Integer value out of range", lambda m: "is too large a number"),
    (r"Object missing required field `(.+)`", lambda m: f"lacks {m[1]}"),
    (r"Object contains unknown field `(.+)`", lambda m: f"has {shown(m[1])}, which nobody knows"),
)
BOUNDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
DESCRIBED = {
    repr(meta.pattern): meta.description
    for kind in vars(values).values()
    for meta in getattr(kind, "__metadata__", ())
    if getattr(meta, "pattern", None)
}


def _misfit(document: Any, kind: Any, message: str) -> Misfit:
    """What msgspec says, told with the value: its messages have the way to it, but `[...]` for the keys of a mapping."""
    reason, _, way = (
        message.rpartition(" - at ") if message.endswith("`") and " - at " in message else (message, "", "")
    )
    where, value = "", document
    try:
        for name, index, _ in re.findall(r"\.([^.\[`]+)|\[(\d+)\]|\[(\.\.\.)\]", way):
            key = int(index) if index else name if name else _entry(document, value, kind, message)
            where, value = f"{where}{f'[{index}]' if index else f'.{key}' if where else key}", value[key]
    except (LookupError, TypeError, AttributeError):  # a key of the document that is written like a way
        return Misfit("", f"is wrong ({shown(message)})")
    if way.startswith("`key`"):
        return Misfit(where, "has a key that cannot be one")
    told = (tell(match) for form, tell in PHRASES if (match := re.fullmatch(form, reason, re.DOTALL)))
    why = next(told, f"is wrong ({shown(reason)})")
    if isinstance(value, float) and not math.isfinite(value):
        why = "must be a finite number"
    return Misfit(where, why if why.startswith(("lacks", "has")) else f"{why}, not {shown(value)}")


def _entry(document: Any, mapping: dict[str, Any], kind: Any, message: str) -> str:
    """The key of the entry of `mapping`, a part of `document`, that `message` is about."""
    entries = dict(mapping)
    try:
        for key, value in entries.items():
            mapping.clear()
            mapping[key] = value
            try:
                msgspec.convert(document, kind)
            except msgspec.ValidationError as error:
                if str(error) == message:
                    return key
    finally:
        mapping.clear()
        mapping.update(entries)
    return next(iter(entries))
