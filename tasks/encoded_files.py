"""Flat arrays in one file that is written whole or not at all, checked when it is opened, and mapped into memory."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

MAGIC = b"dpft encoded 1\n"
MOST = 8 * 2**30  # bytes of the folder; what has not been used for longest goes first
KINDS = {"int32": np.dtype("<i4"), "int64": np.dtype("<i8")}


def read(path: Path, name: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file that was written under `name`, read-only views of its pages; None where it is not there, not whole or
    not that one."""
    try:
        with open(path, "rb") as file:
            if file.readline(64) != MAGIC:
                return None
            head = json.loads(file.readline(10_000))
            start = file.tell()
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(pages)[start:]
        if head["name"] != name or head["sha256"] != hashlib.sha256(view).hexdigest():
            return None
        arrays, at = {}, 0
        for column, kind, count in head["columns"]:
            arrays[column] = np.frombuffer(view, KINDS[kind], count, at)
            at += arrays[column].nbytes
        os.utime(path)
        return arrays
    except OSError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):  # of a foreign file
        return None


def write(path: Path, name: str, arrays: dict[str, np.ndarray]) -> bool:
    """Write the arrays, those of 8 bytes first so that all lie where their size wants them; whether that worked."""
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)
    kept = [(column, np.ascontiguousarray(array, KINDS[array.dtype.name])) for column, array in ordered]
    digest = hashlib.sha256()
    for _, array in kept:
        digest.update(array.data)
    columns = [[column, array.dtype.name, len(array)] for column, array in kept]
    head = json.dumps({"name": name, "sha256": digest.hexdigest(), "columns": columns}).encode()
    head += b" " * (-(len(MAGIC) + len(head) + 1) % 64) + b"\n"
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + head)
            for _, array in kept:
                file.write(array.data)
        os.replace(temporary, path)
        _shrink(path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array lies in the pages of a file, which all processes share."""
    return isinstance(array.base, memoryview)


def _shrink(new: Path) -> None:
    """Remove files, but for the new one, until the folder has at most MOST bytes; pages that are mapped stay until let go."""
    files = sorted((path for path in new.parent.glob("*.bin") if path != new), key=lambda path: path.stat().st_mtime)
    total = new.stat().st_size + sum(path.stat().st_size for path in files)
    for path in files:
        if total <= MOST:
            return
        total -= path.stat().st_size
        path.unlink(missing_ok=True)
