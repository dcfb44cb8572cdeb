"""Features by what an example holds: of this process, and on disk for data that are nobody's secret."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpft.harness.cache import cache_dir
from dpft.tasks import encoded_files

ENCODERS, MOST_BYTES = 2, 2**31  # whose features are held at once; of each
_HELD: OrderedDict[str, Held] = OrderedDict()


class Held:
    """Of one encoder. name: 64 hex digits of all that its features depend on but the example; on_disk: whether they may be there.

    An encoder has few files in the cache folder, each written whole: a process reads all of them, and what it adds goes
    into one with what it has read.
    """

    def __init__(self, name: str, on_disk: bool):
        self.name, self.on_disk = name, on_disk
        self.found: dict[bytes, torch.Tensor] = {}
        self.files: list[Path] = []
        self.new = 0
        for path in sorted(self._folder().glob(f"{name}-*.bin")) if on_disk else ():
            self._read(path)

    def get(self, example: bytes) -> torch.Tensor | None:
        return self.found.get(example)

    def put(self, example: bytes, features: torch.Tensor) -> None:
        if len(self.found) * features.nbytes < MOST_BYTES:
            self.found[example] = features
            self.new += 1

    def save(self) -> None:
        """What is new goes to disk; a folder that cannot be written to is no error."""
        values = list(self.found.values())
        if not (self.on_disk and self.new and all(one.dtype == torch.float32 for one in values)):
            return
        shape = values[0].shape
        arrays = {
            "shape": np.array(shape, np.int64),
            "examples": np.frombuffer(b"".join(self.found), np.int64),
            "features": torch.stack(values).numpy().view(np.int32).reshape(-1),
        }
        path = self._folder() / f"{self.name}-{uuid.uuid4().hex}.bin"
        if encoded_files.write(path, self.name, arrays):
            for old in self.files:  # all of it is in the new one
                old.unlink(missing_ok=True)
            self.files, self.new = [path], 0

    def _read(self, path: Path) -> None:
        arrays = encoded_files.read(path, self.name)
        if arrays is None:
            return
        shape, examples = tuple(arrays["shape"].tolist()), arrays["examples"].tobytes()
        # a copy: torch warns of pages that are read-only, and the file is gone when another process has written a larger one
        values = torch.from_numpy(arrays["features"].copy()).view(torch.float32).reshape(-1, *shape)
        if len(values) * 32 == len(examples) and math.prod(shape):
            self.found |= {examples[32 * i : 32 * i + 32]: values[i] for i in range(len(values))}
            self.files.append(path)

    @staticmethod
    def _folder() -> Path:
        return cache_dir() / "features"


def of(name: str, on_disk: bool) -> Held:
    """What is held of an encoder, of the last ENCODERS that were asked for."""
    if name not in _HELD:
        _HELD[name] = Held(name, on_disk)
    _HELD.move_to_end(name)
    while len(_HELD) > ENCODERS:
        _HELD.popitem(last=False)
    return _HELD[name]


def save() -> None:
    for held in _HELD.values():
        held.save()


def digest(example: dict[str, Any], without: str) -> bytes:
    """32 bytes of all that an encoded example holds but `without`."""
    found = hashlib.sha256()
    for name, value in sorted(example.items()):
        if name != without:
            array = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            found.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return found.digest()
