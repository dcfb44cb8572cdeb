"""Where a record comes from: code, packages, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "dpft",
    "torch",
    "transformers",
    "peft",
    "opacus",
    "datasets",
    "evaluate",
    "prv-accountant",
    "dp-accounting",
    "numpy",
)


def collect(settings) -> dict[str, Any]:
    """Git state, versions, hardware and run settings."""
    return {
        "git": _git(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": _hardware(settings.device),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def _git() -> dict[str, Any] | None:
    """The commit of the checkout this code runs from; None outside one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", here, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware(device: str) -> dict[str, Any]:
    import torch

    # asked for every record: the number of threads can change while a process lives
    found = {"device": device, "cpu": cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found["capability"] = torch.backends.cpu.get_cpu_capability()
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


@cache
def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name
