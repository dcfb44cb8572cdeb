"""Opening what a user names: a regular file of a sensible size, or a sentence. A FIFO or a device would be read for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dpft.harness.border.values import shown
from dpft.harness.errors import BadInput

LARGEST = 2**30  # bytes of a document; tables and weights are read by their own libraries, piece by piece
ABSENT = "does not exist"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def trouble(path: Path | str, largest: int | None = None) -> str | None:
    """Why `path` cannot be read as a file, as the end of a sentence after its name; None where it can. largest: in bytes."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return ABSENT
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(found.st_mode):
        return f"is {KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}, no regular file"
    if largest is not None and found.st_size > largest:
        return f"has {found.st_size:,} bytes, and more than {largest:,} are never right"
    return None


def stamp_of(path: Path | str) -> tuple[int, ...] | None:
    """What tells a file from one that replaces it; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def content(path: Path | str, what: str, hint: str) -> bytes:
    """The bytes of a document. what: `The record`; hint: what to do. Raises BadInput with one sentence."""
    problem = trouble(path, LARGEST)
    if problem is None:
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
    raise BadInput(f"{what} {shown_path(path)} {problem}; {hint}.")


def text(path: Path, what: str, hint: str) -> str:
    """The text of a document in UTF-8. Raises BadInput as `content`."""
    found = content(path, what, hint)
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{what} {shown_path(path)} is no UTF-8 text (byte {error.start}); {hint}.") from None


def shown_path(path: Path | str) -> str:
    """A path as it is, or quoted where it holds what a terminal would obey."""
    name = str(path)
    return name if name.isprintable() and len(name) <= 500 else shown(name)
