"""Two halves of a validation split: settings are chosen on one (`tune`), methods are judged on the other (`test`)."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from dpft.harness.errors import CannotRun
from dpft.tasks.base import Data, Task


def judged(task: Task, data: Data, split: str) -> Data:
    """`data` with the validation rows of `split`, one of `whole`, `tune` and `test`, in their order; fingerprint as it was.

    A row's half is a hash of what it is (`Task.identity`), so it is public, the same for every seed, and examples that are one
    and the same, or references of one prompt, never part. Raises CannotRun where a half is empty.
    """
    if split == "whole":
        return data
    rows = [row for row in data.validation if half(task.identity(row)) == split]
    if not rows:
        raise CannotRun(
            f"The {split} half of the {len(data.validation)} validation examples of {task.name} is empty; judge on the "
            "whole split."
        )
    return replace(data, validation=rows)


def half(identity: str) -> str:
    """`tune` or `test`, with equal chances, by a hash of what an example is."""
    return ("tune", "test")[hashlib.sha256(identity.encode()).digest()[0] & 1]
