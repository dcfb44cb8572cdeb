"""A wheel holds the whole package, and what it holds runs."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("harness", "methods", "tasks")
TOP = "dpft"  # the package itself, whose rooms the others are


def contents(root):
    """All files of the package, compiled ones left out."""
    files = (path for room in ROOMS for path in (root / room).rglob("*"))
    return {p.relative_to(root).as_posix() for p in files if p.is_file() and "__pycache__" not in p.parts}


def test_the_list_of_packages_is_complete():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {Path(name).parent.as_posix() for name in contents(ROOT) if name.endswith(".py")}
    assert sorted(listed) == sorted([TOP, *("dpft." + folder.replace("/", ".") for folder in folders)])
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_a_wheel_holds_every_file_and_runs(tmp_path):
    """Built as pip builds it without isolation, so without a network."""
    pytest.importorskip("setuptools")
    source, installed = tmp_path / "source", tmp_path / "installed"
    for room in (TOP, *ROOMS):
        copytree(ROOT / room, source / room, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(installed)
    assert contents(installed / "dpft") == contents(ROOT)
    assert {path.name for path in (installed / "dpft").iterdir() if path.is_file()} == {"__init__.py", "py.typed"}
    assert {f"{room}/py.typed" for room in ROOMS} <= contents(ROOT)
    show = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from dpft.harness import cli; print(cli.__file__); cli.main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", show, str(installed), "list", "suites"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    where, *shown = ran.stdout.splitlines()
    assert Path(where).is_relative_to(installed)
    assert set(tomllib.loads((ROOT / "tasks/suites.toml").read_text())) <= set(" ".join(shown).split())
