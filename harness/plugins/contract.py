"""Is a class what the contract of methods, decoders, clipping rules or tasks asks for? Looked at when it is registered.

What can only be seen while it runs (what a step returns, say) is looked at there: harness/train/hooks.py.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from dpft.harness.errors import BadInput, unknown
from dpft.harness.query.queries import Gradients, Nothing, Values
from dpft.harness.runs.spec import RunSpec, typed

NAME = re.compile(r"[a-z][a-z0-9._-]{0,39}")
# versions and the noise stream are found out; options are given one by one, by their own names
UNSETTABLE = {"options", "task_options", "task_version", "method_version", "decoder_version", "noise_stream"}
SETTINGS = frozenset(f.name for f in fields(RunSpec)) - UNSETTABLE
OF_THE_RUN = {"task", "method", "seed"}  # no default of a method's
NEAR = 0.8  # likeness, from 0 to 1, from which a name is taken for a misspelt one of the contract
# What a class attribute may be, by its annotation in the base class.
_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "str": ("a text", (str,)),
    "str | None": ("a text or None", (str, type(None))),
    "int": ("a whole number", (int,)),
    "bool": ("True or False", (bool,)),
    "float": ("a number", (int, float)),
    "float | None": ("a number or None", (int, float, type(None))),
    "dict[str, Any]": ("a dictionary by name", (dict,)),
    "dict[str, tuple[str, ...]]": ("a dictionary by name", (dict,)),
    "dict[str, tuple[float, float]]": ("a dictionary by name", (dict,)),
}


def called(part: Any) -> str:
    """A method, decoder, rule or task for a message: its name and its class."""
    kind = part if isinstance(part, type) else type(part)
    return f"{getattr(part, 'name', kind.__name__)} (class {kind.__name__})"


def check(cls: type, base: type, where: str) -> None:
    """Hold a class to `base`, the contract's Method, Decoder, ClippingRule or Task. where: what it is called in a message.

    Raises BadInput with one sentence: the class, what is wrong with which of its attributes, and what to do.
    """
    for problem in _problems(cls, base):
        raise BadInput(f"{where}: {problem}")


def _problems(cls: type, base: type) -> Iterator[str]:
    """What is wrong, in the order in which it should be mended; of each problem the first is enough."""
    yield from _name(cls)
    yield from _strangers(cls, base)
    yield from _attributes(cls, base)
    yield from _hooks(cls, base)
    yield from _options(cls)
    yield from _of_a_method(cls)


def nameless(cls: type) -> str:
    """What is wrong with a class that has no name of its own."""
    return f'it has no `name` of its own, so nobody can ask for it; write name = "{slug(cls.__name__)}".'


def slug(text: str) -> str:
    """`MyMethod` as `my-method`."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", text).lower()).strip("-") or "mine"


def bad_name(name: Any) -> str | None:
    """What is wrong with a name under which something is registered, and what to do; None: nothing."""
    if isinstance(name, str) and NAME.fullmatch(name):
        return None
    near = slug(str(name))[:40].rstrip("-")
    return (
        f"the name {name!r} is not up to 40 lower-case letters, digits, hyphens, dots and underscores, a letter first; write "
        f"for example {near if near[0].isalpha() else 'mine'!r}."
    )


def _name(cls: type) -> Iterator[str]:
    if "name" not in vars(cls):
        yield nameless(cls)
    elif problem := bad_name(cls.name):
        yield problem


def _strangers(cls: type, base: type) -> Iterator[str]:
    """Public names that the contract does not have, and that are nearly one that it has: misspelt, they would do nothing."""
    between = [one for one in cls.__mro__ if one not in base.__mro__]
    own = [one for one in between if one is cls or not one.__module__.startswith("dpft.")]
    written = {name: value for one in reversed(own) for name, value in vars(one).items()}
    ours = {name for one in between if one not in own for name in vars(one)}
    for name, value in written.items():
        if name.startswith("_") or name in known(base) | ours:
            continue
        near = _nearest(name, known(base) | ours)
        if near and near not in written:
            kind = "function" if inspect.isfunction(value) else "attribute"
            yield f"its {kind} `{name}` would never be looked at; did you mean `{near}`? If not, call it otherwise."


def _nearest(name: str, names: set[str]) -> str | None:
    """The name that is probably meant: very like it, or of the same letters."""
    turned = [other for other in sorted(names) if sorted(other) == sorted(name)]
    return next(iter(turned or difflib.get_close_matches(name, names, n=1, cutoff=NEAR)), None)


def known(base: type) -> set[str]:
    """The public names of a contract."""
    return {name for name in (*vars(base), *annotations(base)) if not name.startswith("_")}


def annotations(base: type) -> dict[str, str]:
    """What the contract says of its attributes, as it is written."""
    return vars(base)["__annotations__"]


def _attributes(cls: type, base: type) -> Iterator[str]:
    for name, text in annotations(base).items():
        inner = text.removeprefix("ClassVar[").removesuffix("]") if text.startswith("ClassVar[") else text
        value = inspect.getattr_static(cls, name, None)
        if inspect.isfunction(value):
            near = difflib.get_close_matches(name, hooks(base), n=1)
            yield f"`{name}` is a value of the contract, not a function; " + (
                f"did you mean `{near[0]}`?" if near else "call the function otherwise."
            )
        elif isinstance(value, property) or inner not in _TYPES:
            continue
        elif not hasattr(cls, name) and text.startswith("ClassVar["):
            yield f"it has no `{name}`; set it to {_TYPES[inner][0]}."
        elif hasattr(cls, name) and not _is(value, *_TYPES[inner][1]):
            yield f"`{name}` is {value!r}, not {_TYPES[inner][0]}; correct it."
    if getattr(cls, "version", 1) < 1:
        yield f"`version` is {cls.version}; count from 1."


def _is(value: Any, *types: type) -> bool:
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types)


def hooks(base: type) -> list[str]:
    """The public functions of a contract."""
    return [name for name, value in vars(base).items() if inspect.isfunction(value) and not name.startswith("_")]


def required(base: type) -> list[str]:
    """The functions that a contract leaves to its classes."""
    return [name for name in hooks(base) if "NotImplementedError" in vars(base)[name].__code__.co_names]


def _hooks(cls: type, base: type) -> Iterator[str]:
    for name, value in vars(base).items():
        found = inspect.getattr_static(cls, name, None)
        if isinstance(value, property) and inspect.isfunction(found):
            yield f"`{name}` is a value of the contract, not a function; write @property above it."
        if not inspect.isfunction(value) or (name.startswith("_") and name != "__init__"):
            continue
        if found is value:
            if name in required(base):
                yield f"it has no function `{name}`; write {_written(value)}."
        elif not callable(getattr(cls, name)):
            yield f"`{name}` is {found!r}, not a function; write {_written(value)}."
        elif not _fits(found, value):
            yield f"`{name}` cannot be called as the contract calls it; write {_written(value)}."


def _written(hook: Any) -> str:
    return f"def {hook.__name__}({', '.join(inspect.signature(hook).parameters)})"


def _fits(found: Any, hook: Any) -> bool:
    """Whether it can be called with as many arguments as the contract's, the optional ones given and not."""
    wanted = list(inspect.signature(hook).parameters.values())
    needed = sum(p.default is p.empty for p in wanted)
    spare = 0
    if isinstance(found, (staticmethod, classmethod)):
        spare, found = int(isinstance(found, staticmethod)), found.__func__
    try:
        own = inspect.signature(found)
        for count in {needed, len(wanted)}:
            own.bind(*[None] * (count - spare))
    except TypeError:
        return False
    except ValueError:  # made by C code, which does not say
        return True
    return True


def _options(cls: type) -> Iterator[str]:
    for name, value in cls.options.items():
        if not isinstance(name, str) or not name.isidentifier():
            yield f"the option {name!r} is not letters, digits and underscores, a letter first; rename it."
        elif name in SETTINGS | UNSETTABLE:
            yield f"the option {name!r} has the name of a setting of every run; rename it, or set it in `defaults`."
        elif not _plain(value):
            yield (
                f"the option {name!r} is {value!r} by default, which no file of settings can hold; use a number, a text, "
                "True, False or a list of such."
            )
    for attribute, allowed in (("choices", _chosen), ("ranges", _within)):
        for name, limits in getattr(cls, attribute, {}).items():
            if name not in cls.options:
                yield f"`{attribute}` speaks of {name!r}: {unknown('option', str(name), cls.options)}"
            elif not allowed(cls.options[name], limits):
                yield (
                    f"the option {name!r} is {cls.options[name]!r} by default, which `{attribute}` does not allow "
                    f"({limits!r}); correct one of them."
                )


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_plain, value))
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and not math.isnan(value))


def _chosen(value: Any, limits: Any) -> bool:
    return isinstance(limits, (tuple, list)) and value in limits


def _within(value: Any, limits: Any) -> bool:
    return _pair(limits) and _is(value, int, float) and limits[0] <= value <= limits[1]


def _pair(limits: Any) -> bool:
    return isinstance(limits, (tuple, list)) and len(limits) == 2 and all(_is(n, int, float) for n in limits)


def _of_a_method(cls: type) -> Iterator[str]:
    """`asks`, `defaults` and `space`, which methods alone have."""
    if not hasattr(cls, "asks"):
        return
    if not (isinstance(cls.asks, tuple) and cls.asks and set(cls.asks) <= {Gradients, Values, Nothing}):
        yield f"`asks` is {cls.asks!r}; write the kinds of its questions, for example (Gradients,)."
    for key, value in cls.defaults.items():
        if key in OF_THE_RUN:
            yield f"`defaults` sets {key}, which belongs to the run; leave it out."
        elif key in cls.options:
            yield f"`defaults` sets {key}, which is its own option; set it in `options`."
        elif key not in SETTINGS:
            yield f"`defaults` sets {key}: {unknown('setting', str(key), SETTINGS - OF_THE_RUN)} Its own settings are `options`."
        else:
            try:
                typed(key, value)
            except BadInput as problem:
                yield f"`defaults` sets {problem}"
    for key, limits in cls.space.items():
        if key not in SETTINGS - OF_THE_RUN | cls.options.keys():
            yield f"`space` speaks of {key}: {unknown('setting', str(key), SETTINGS - OF_THE_RUN | cls.options.keys())}"
        elif not (_pair(limits) and 0 < limits[0] <= limits[1] < math.inf):
            yield f"`space` gives {key} {limits!r}; give its least and its greatest value, both above 0."
