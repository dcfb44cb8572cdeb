"""A count on disk of the releases that a run has made, for runs whose noise cannot be drawn again.

A run with `--secure-noise` that is killed goes on with new noise from its last checkpoint: what it released after that
checkpoint is lost, but was released. The journal knows how many there were, and they are charged.
"""

from __future__ import annotations

import os
from pathlib import Path


def path_of(checkpoint: Path) -> Path:
    """The journal beside a run's checkpoint."""
    return checkpoint.with_suffix(".releases")


def note(path: Path) -> None:
    """Count one release, on disk before this returns. Raises OSError where it cannot be: then nothing may be released."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, b".")
        os.fsync(handle)
    finally:
        os.close(handle)


def releases(path: Path) -> int:
    """How many were counted; 0 where there is no journal."""
    return path.stat().st_size if path.exists() else 0
