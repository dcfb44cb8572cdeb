"""Small JSON results kept on disk: calibrations, epsilon curves, measurements; keyed by all that went into them."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = 2  # raise it when the accounting itself changes: old values are then computed again


def cache_dir() -> Path:
    """The folder of the cache: `$DPFT_CACHE`, or `~/.cache/dpft`; it need not exist."""
    folder = os.environ.get("DPFT_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "dpft"


def cached(kind: str, inputs: dict[str, Any], valid: Callable[[Any], bool], compute: Callable[[], Any]) -> Any:
    """The JSON value of `compute()`, from disk when the same `kind` and `inputs` were computed before.

    A damaged, foreign or invalid (`valid(value)` false) file is recomputed; an unwritable folder is no error.
    Whatever `compute` raises passes through and is not stored.
    """
    key = {"schema": SCHEMA, "kind": kind, "inputs": inputs}
    path = cache_dir() / "computed" / f"{kind}-{_digest(key)}.json"
    value = _read(path, key)
    if value is not None and valid(value):
        return value
    value = compute()
    _write(path, {**key, "value": value, "check": _digest({**key, "value": value})})
    return value


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, key: dict[str, Any]) -> Any:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        value = stored["value"]
        # a changed digit is still valid JSON, and would be a wrong noise scale: hence the digest
        return value if stored["check"] == _digest({**key, "value": value}) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, allow_nan=False)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
