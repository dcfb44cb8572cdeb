"""Whose an exception is: the hook of a plug-in out of which it came, told with class, place and remedy."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

LONGEST = 500  # characters of what an exception says


def told(error: BaseException) -> str | None:
    """One sentence about an exception that a hook of a plug-in let out; None where it came from elsewhere.

    Of hooks within hooks the innermost is named. The line is the last one of its file on the way to where the error arose.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    found = next(((at, who) for at in reversed(range(len(frames))) for who in _hooks(frames[at][0])), None)
    if found is None:
        return None
    at, who = found
    file = frames[at][0].f_code.co_filename
    line = next(line for frame, line in reversed(frames) if frame.f_code.co_filename == file)
    place = f"{Path(file).name}:{line}"
    if isinstance(error, SystemExit):
        return f"{who} calls sys.exit ({place}), which would end all of dpft; let it raise an error that says what is wrong."
    text = " ".join(str(error).split())[:LONGEST].rstrip(".")
    return f"{who} ends with {type(error).__name__} at {place}{f' ({text})' if text else ''}; mend it."


def _hooks(frame: FrameType) -> Iterator[str]:
    """The hook of a plug-in's class that runs in a frame, in words, if one does."""
    from dpft.harness.plugins import contract
    from dpft.harness.runs import registry

    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    cls = first if isinstance(first, type) else type(first)
    if cls.__module__.partition(".")[0] in ("builtins", "dpft"):
        return
    for base, kind in registry.bases().items():
        if issubclass(cls, base):
            names = [*contract.hooks(base), "__init__"]
            own = (name for name in names if getattr(inspect.getattr_static(cls, name), "__code__", None) is code)
            if (name := next(own, code.co_name)) in names:
                yield f"`{name}` of {kind} {contract.called(cls)}"
