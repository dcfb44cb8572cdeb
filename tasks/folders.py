"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def made(path: Path, is_whole: Callable[[], bool]) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends well; two processes may make it at once.

    is_whole: whether what stands at `path` is what was to be made; such a folder stays, as others may be reading it.
    Raises OSError where it can neither be written nor stands there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=".making-"))
    try:
        yield scratch
        if is_whole():
            return
        shutil.rmtree(path, ignore_errors=True)  # damaged
        try:
            os.rename(scratch, path)
        except OSError:
            if not is_whole():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
