"""Rows encoded once: flat arrays shared by the runs of a process, and for data that are nobody's secret by all processes.

Encoded examples are kept under what went into them: the texts, the tokenizer, the encoder's settings and its code. On disk are
one file each in the cache folder, mapped into memory, so that processes hold one copy between them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dpft.harness.cache import cache_dir
from dpft.tasks import encoded_files
from dpft.tasks.base import Example

ASKED = "DPFT_CACHE_OWN"  # set to 1, encoded rows of the user's own files are kept on disk, too
CHUNK = 4096  # rows encoded at once
HELD = 256 * 2**20  # bytes of encoded examples that a process keeps for its next run, those on disk apart


class Examples(Sequence):
    """Encoded examples in flat arrays. Example i is a dict as the encoder made it: its arrays are views, to be read only.

    arrays: `offsets` int64 [examples + 1]; int32 [tokens] for every ragged column; int64 [examples] for every other.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self._offsets = arrays["offsets"]
        self._ragged = [(name, array) for name, array in arrays.items() if array.dtype == np.int32]
        self._plain = [(name, array) for name, array in arrays.items() if array.dtype == np.int64 and name != "offsets"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        first, last = self._offsets[place], self._offsets[place + 1]
        example: Example = {name: array[first:last] for name, array in self._ragged}
        return example | {name: int(array[place]) for name, array in self._plain}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example."""
    if isinstance(examples, Examples):
        return np.diff(examples.arrays["offsets"]).tolist()
    return [len(example["input_ids"]) for example in examples]


def of(
    encode: Callable[[Sequence[Example]], list[Example]],
    rows: Sequence[Example],
    tokenizer: Any,
    settings: Any,
    on_disk: bool = False,
) -> Sequence[Example]:
    """`encode(rows)`, from memory or disk where the same was encoded before; its examples hold int32 arrays and ints.

    encode: may be called with a part of the rows, each of which it encodes by itself; settings: all that it depends on besides
    the rows, the tokenizer and its own code, in JSON. on_disk: whether the cache folder may hold these rows. A damaged or foreign
    file is made anew, and a folder that cannot be written to is no error. Raises what `encode` raises.
    """
    name = _key(encode, rows, tokenizer, settings) if len(rows) else None
    if name is None:
        return encode(rows)
    if (found := _MEMORY.get(name)) is not None:
        return found
    path = cache_dir() / "encoded" / f"{name}.bin" if may_lie_on_disk(on_disk) else None
    arrays = encoded_files.read(path, name) if path is not None else None
    if arrays is None:
        made = _flat(encode, rows)
        if not isinstance(made, dict):
            return made
        arrays = made
        if path is not None and encoded_files.write(path, name, arrays):
            arrays = encoded_files.read(path, name) or arrays  # from now on the file's pages, which others share
    return _MEMORY.put(name, Examples(arrays))


def may_lie_on_disk(public: bool) -> bool:
    """Whether the cache folder may hold what is as good as the rows: of public data, and of all where the user asks for it."""
    return public or os.environ.get(ASKED) == "1"


def _flat(encode: Callable, rows: Sequence[Example]) -> dict[str, np.ndarray] | list[Example]:
    """The arrays of all examples, encoded in chunks; the examples themselves where they are no such."""
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(rows), CHUNK):
        examples = encode(rows[start : start + CHUNK])
        names = list(examples[0])
        if not all(list(example) == names and _fits(example) for example in examples) or (
            parts and names != list(parts)[1:]
        ):
            return encode(rows)
        parts.setdefault("offsets", []).append(np.array([len(example["input_ids"]) for example in examples], np.int64))
        for name in names:
            values = [example[name] for example in examples]
            ragged = isinstance(values[0], np.ndarray)
            parts.setdefault(name, []).append(np.concatenate(values) if ragged else np.array(values, np.int64))
    arrays = {name: np.concatenate(found) for name, found in parts.items()}
    arrays["offsets"] = np.concatenate([[0], np.cumsum(arrays["offsets"])])
    return arrays


def _fits(example: Example) -> bool:
    """Whether it can be put into flat arrays and come out as it was: arrays as long as its tokens, and whole numbers."""
    size = len(example["input_ids"])
    return all(
        value.dtype == np.int32 and len(value) == size
        if isinstance(value, np.ndarray)
        else type(value) is int and abs(value) < 2**63
        for value in example.values()
    )


def _key(encode: Any, rows: Sequence[Example], tokenizer: Any, settings: Any) -> str | None:
    """64 hex digits of all that the examples depend on; None where that cannot be told."""
    state = _tokenizer(tokenizer)
    if state is None:
        return None
    about = {"code": _code(type(encode).__module__), "tokenizer": state, "settings": settings}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    try:
        for text in _texts(rows):
            digest.update(text)
    except TypeError:  # rows that are no JSON
        return None
    return digest.hexdigest()


def _texts(rows: Sequence[Example]) -> Iterator[bytes]:
    for start in range(0, len(rows), CHUNK):
        yield json.dumps(rows[start : start + CHUNK]).encode()


def _tokenizer(tokenizer: Any) -> str | None:
    """The digest of a tokenizer's vocabulary, rules and settings; None for those that are Python code."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole |= {"truncation": None, "padding": None}  # of its last call
    given = {k: v for k, v in tokenizer.init_kwargs.items() if not k.endswith(("_path", "_file"))}  # not where it lies
    kept = [type(tokenizer).__name__, tokenizer.special_tokens_map, sorted(map(repr, given.items()))]
    kept += [tokenizer.truncation_side, version("tokenizers"), version("transformers"), whole]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=repr).encode()).hexdigest()


@functools.cache
def _code(module: str) -> str:
    """The digest of the code that encodes: what another version made is not taken for its own."""
    files = [Path(sys.modules[module].__file__), Path(__file__), Path(__file__).with_name("prompts.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


class _Memory:
    """What was used last, up to HELD bytes of this process."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Examples] = OrderedDict()

    def get(self, name: str) -> Examples | None:
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    def put(self, name: str, examples: Examples) -> Examples:
        self._kept[name] = examples
        while len(self._kept) > 1 and sum(map(_own_bytes, self._kept.values())) > HELD:
            self._kept.popitem(last=False)
        return examples

    def clear(self) -> None:
        self._kept.clear()


def _own_bytes(examples: Examples) -> int:
    return 0 if encoded_files.is_mapped(examples.arrays["offsets"]) else examples.nbytes


_MEMORY = _Memory()
