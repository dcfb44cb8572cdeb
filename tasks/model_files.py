"""A model on this disk, told apart by its files, without loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dpft.tasks.downloads import sha256_of
from dpft.tasks.hub import READ
from dpft.tasks.models import resolve


def files_fingerprint(name: str) -> str | None:
    """sha256 over names and contents of the files that a model is read from, where `name` is a local folder or GGUF file.

    None for names and hub ids. It takes as long as reading the files. Raises CannotRun for a path that is not there.
    """
    path = Path(name).expanduser()
    if not (path / "config.json").is_file() and path.suffix != ".gguf":
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            resolve(name)  # says what is wrong
        return None
    resolve(name)
    files = sorted(file for file in path.iterdir() if file.suffix in READ) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
