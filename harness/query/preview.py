"""What a method would ask first in a step, without an answer."""

from __future__ import annotations

import contextlib
from typing import Any

from dpft.harness.query.queries import Query


class _Asked(Exception):
    """The questions have been heard."""


def first_questions(method: Any, step: int) -> dict[str, Query]:
    """The questions of the first breath of a step, by name, before the clipping rule adds its own; nothing is answered."""
    heard: dict[str, Query] = {}

    def ask(**queries: Query):
        heard.update(queries)
        raise _Asked

    with contextlib.suppress(_Asked):
        method.step(ask, step)
    return heard
