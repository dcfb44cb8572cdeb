"""The Hugging Face hub: whether it answers, what of it lies in the cache here, and fetching from it."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dpft.harness.errors import CannotRun, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

PROBE = 2.5  # seconds that the hub has to answer
GATEWAY = (502, 503, 504)  # what a proxy says where there is nobody behind it
SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # of huggingface_hub: the cache alone is looked into
READ = (".json", ".txt", ".model", ".safetensors", ".bin", ".jinja", ".tiktoken", ".py")  # what loaders read of a model
WEIGHTS = tuple(f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))


@dataclass(frozen=True)
class Fetch:
    """Something that a run needs and that is not here.

    Attributes:
        what: in words.
        source: where from, in words.
        get: fetches it. Raises CannotRun.
        size: bytes, None where it is not known.
        instead: what else can be done, the end of a sentence.
        remote: whether a network is needed.
    """

    what: str
    source: str
    get: Callable[[], object]
    size: int | None = None
    instead: str = ""
    remote: bool = True


def silent() -> str | None:
    """Why the hub is not asked, in words: the user said so, or it does not answer. None: it is.

    Where it does not answer, the libraries are told to look into their caches alone: each would try again for a minute.
    """
    if any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in SWITCHES):
        return f"{_endpoint()} does not answer" if _silenced else "HF_HUB_OFFLINE is set"
    if _answers(_endpoint()):
        return None
    _silenced.append(True)
    os.environ[SWITCHES[0]] = "1"
    if "huggingface_hub.constants" in sys.modules:  # it has looked at the environment
        sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = True
    return f"{_endpoint()} does not answer"


_silenced: list[bool] = []


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@cache
def _answers(address: str) -> bool:
    """Whether what is behind a URL says anything over HTTP within PROBE seconds, through the proxy where there is one."""
    import ssl
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    unchecked = ssl._create_unverified_context()  # nothing is sent, and what comes is not looked at
    found: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(address, method="HEAD"), timeout=PROBE, context=unchecked
            ):
                found.append(True)
        except urllib.error.HTTPError as error:
            if error.code not in GATEWAY:
                found.append(True)
        except (OSError, ValueError, HTTPException):  # ValueError: HF_ENDPOINT is no URL
            pass

    attempt = threading.Thread(target=ask, daemon=True)  # a thread, as looking up a name knows no time limit
    attempt.start()
    attempt.join(PROBE)
    return bool(found)


def cached_model(name: str) -> bool:
    """Whether configuration and weights of a hub id lie in the hub's cache."""
    return cached_config(name) and any(_cached(name, file) for file in WEIGHTS)


def cached_config(name: str) -> bool:
    """Whether the configuration of a hub id lies in the hub's cache."""
    return _cached(name, "config.json")


def _cached(name: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, file), str)


def cached_data(hub: str) -> bool:
    """Whether `datasets` has a data set in its cache; hub: "owner/name/config" or "owner/name"."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
    owner, name, *config = hub.split("/")
    return any((folder / f"{owner}___{name}".lower() / (config or ["default"])[0]).glob("*/*/*.arrow"))


def model(name: str, instead: str) -> Fetch:
    """What fetches a model; its size where the hub says it. Raises CannotRun where the hub has no such model."""
    files = _files(name)
    size = sum(files.values()) if files else None
    return Fetch(f"the model {name}", "the hub", lambda: _download(name, list(files) or None), size, instead)


def _files(name: str) -> dict[str, int]:
    """Name -> bytes of the files that loaders read; nothing where the hub does not say."""
    if silent():
        return {}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = HfApi().model_info(name, files_metadata=True, timeout=PROBE).siblings or []
    except RepositoryNotFoundError as error:
        raise CannotRun(
            f"The hub has no model {name}, or shows it to its members only; correct the name, or log in with `hf auth login`."
        ) from error
    except Exception:  # of the network, in four libraries: the size is a courtesy
        return {}
    files = {one.rfilename: one.size or 0 for one in found if "/" not in one.rfilename}
    files = {file: size for file, size in files.items() if file.endswith(READ)}
    if any(file.endswith(".safetensors") for file in files):
        files = {file: size for file, size in files.items() if not file.endswith(".bin")}
    return files


def _download(name: str, files: list[str] | None) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, allow_patterns=files)
    except Exception as error:  # anything
        reason = first_line(error, longest=200)
        raise CannotRun(
            f"The model {name} cannot be fetched ({reason}); check the connection, and try again."
        ) from error
