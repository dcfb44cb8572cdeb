"""GGUF files: to unpack one takes half a minute, so what came of it is kept beside the downloads, as transformers saves it."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dpft.harness.cache import cache_dir
from dpft.harness.errors import CannotRun
from dpft.tasks import folders
from dpft.tasks.downloads import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOTE = "unpacked.json"


def place(source: str) -> tuple[str, dict[str, str]]:
    """(folder or hub id, further arguments) by which transformers finds `source`: of a GGUF file what was unpacked, or itself.

    Raises CannotRun without the package gguf, as all of this module does.
    """
    path = Path(source)
    if path.suffix != ".gguf":
        return source, {}
    if fingerprint(source) is not None:
        return str(_folder(source)), {}
    return str(path.parent), {"gguf_file": path.name}


def fingerprint(source: str) -> str | None:
    """The sha256 of the weights that were unpacked of `source`; None: they are not here, or not whole."""
    folder = _folder(source)
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return note["weights"] if _sizes(folder) == note["sizes"] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: str) -> None:
    """Keep what was unpacked of `source`; where it cannot be kept, it is unpacked again next time."""
    from safetensors import SafetensorError

    with (
        contextlib.suppress(OSError, SafetensorError),  # the disk is full, say
        folders.made(_folder(source), lambda: fingerprint(source) is not None) as scratch,
    ):
        _save(model, scratch)
        tokenizer.save_pretrained(scratch)
        note = {"weights": weights, "sizes": _sizes(scratch)}
        (scratch / NOTE).write_text(json.dumps(note), encoding="utf-8")


def _save(model: PreTrainedModel, folder: Path) -> None:
    """As `save_pretrained`, which refuses what came of a GGUF file though nothing of it is quantized any more."""
    from safetensors.torch import save_file

    tied = model.all_tied_weights_keys or {}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, str(folder / "model.safetensors"), {"format": "pt"})
    config = copy.deepcopy(model.config)
    del config.quantization_config
    config.save_pretrained(folder)


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != NOTE}


def forget(source: str) -> None:
    """Of what was kept nothing is left."""
    shutil.rmtree(_folder(source), ignore_errors=True)


def _folder(source: str) -> Path:
    return cache_dir() / "unpacked" / _key(source, os.stat(source).st_mtime_ns)


@cache
def _key(source: str, changed: int) -> str:
    """By the file's content, and by the versions that unpack it. changed: so that another file is looked at again."""
    try:
        versions = "-".join(importlib.metadata.version(package) for package in ("transformers", "gguf"))
    except importlib.metadata.PackageNotFoundError:
        raise CannotRun(
            f"{Path(source).name} is read by the package gguf, which is not installed; run pip install gguf."
        ) from None
    return f"{sha256_of(Path(source))[:16]}-{versions}"
