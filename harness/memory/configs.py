"""Where the configuration of a model comes from whose memory is asked for; torch is not needed to find out."""

from __future__ import annotations

from pathlib import Path

from dpft.harness.errors import CannotRun, unknown
from dpft.harness.memory.shapes import SHAPES


def found(name: str) -> str | None:
    """The folder or hub id that has it, None for a built-in shape.

    Raises BadInput for an unknown name, and where the hub has it and does not answer.
    """
    if name in SHAPES:
        return None
    from dpft.tasks import hub
    from dpft.tasks.models import ALIASES, resolve

    try:
        source = resolve(name)
    except CannotRun as error:
        if "called" not in str(error):
            raise
        raise unknown("model", name, {*SHAPES, *ALIASES}) from None
    if not Path(source).exists() and not hub.cached_config(source) and (why := hub.silent()):
        raise CannotRun(
            f"The configuration of {source} is not in the cache, and {why}; take a built-in shape or a local folder."
        )
    return source
