"""Where a user's own files lie, and the digest of what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from dpft.harness.errors import CannotRun
from dpft.tasks.downloads import data_root, sha256_of

DIGITS = 16  # of a digest that is part of a run id, as of the id itself


def file(name: str, data_dir: Path | None) -> Path:
    """The file called `name`: as it is written, else in the mirror folder. Raises CannotRun where it is no regular file."""
    path = _placed(name, data_dir)
    if path.is_dir():
        raise CannotRun(f"{path} is a folder, not a file; give the path of one file.")
    if path.exists() and not path.is_file():
        raise CannotRun(f"{path} is not a regular file, and data are read more than once; write them to one.")
    if not path.is_file():
        raise CannotRun(f"The data file {path} does not exist; give an existing one.")
    return path


def folder(name: str, data_dir: Path | None) -> Path:
    """The folder called `name`, found as `file` is. Raises CannotRun where it is none."""
    path = _placed(name, data_dir)
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise CannotRun(f"The data folder {path} {what}; give an existing one.")
    return path


def _placed(name: str, data_dir: Path | None) -> Path:
    path, root = Path(name).expanduser(), data_root(data_dir)
    return root / path if root is not None and not path.exists() and (root / path).exists() else path


def content(files: Mapping[str, Path]) -> str:
    """The first digits of the sha256 of one file; of several, of a line `<key> <sha256>` for each, in order of the keys.

    Where the files lie has no part in it. Raises CannotRun for one that cannot be read.
    """
    digests = {key: _digest(path, _state(path)) for key, path in files.items()}
    if len(digests) == 1:
        return next(iter(digests.values()))[:DIGITS]
    lines = "".join(f"{key} {digests[key]}\n" for key in sorted(digests))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:DIGITS]


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise CannotRun(f"Cannot read {path} ({error.strerror}); check the file and its permissions.") from error
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@lru_cache(maxsize=2**17)  # a grid asks once for each of its runs
def _digest(path: Path, state: tuple[int, ...]) -> str:
    return sha256_of(path)
