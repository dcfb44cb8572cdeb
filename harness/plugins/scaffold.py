"""A plug-in to begin with: a file that runs, and a test beside it."""

from __future__ import annotations

import keyword
from importlib.resources import files
from pathlib import Path
from string import Template

from dpft.harness.errors import BadInput
from dpft.harness.plugins.contract import bad_name

KINDS = ("method", "task")


def write(kind: str, name: str, output: Path | None) -> tuple[Path, Path]:
    """Write the plug-in and its test; returns where. kind: of KINDS. output: the file, by default called as what is in it.

    Raises BadInput for a name that nothing can have, a place that cannot be written to, and files that are there already.
    """
    if problem := bad_name(name):
        raise BadInput(f"A {kind} cannot be called so: {problem}")
    words = "".join(c if c.isalnum() else " " for c in name).split()
    class_name = "".join(word.capitalize() for word in words)
    path = Path(f"{'_'.join(words)}.py") if output is None else output
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise BadInput(
            f"{path} is no name of a Python file that can be imported; write for example {'_'.join(words)}.py."
        )
    test = path.with_name(f"test_{path.name}")
    for file in (path, test):
        if file.exists():
            raise BadInput(f"There is a file {file} already; give another with -o, or move it away.")
    if not path.parent.is_dir():
        raise BadInput(f"There is no folder {path.parent}; make it.")
    filled = {"name": name, "class_name": class_name, "file": path.name, "test_file": test.name}
    for template, file in ((f"{kind}.template", path), (f"test_{kind}.template", test)):
        text = (files(__package__) / template).read_text(encoding="utf-8")
        file.write_text(Template(text).substitute(filled), encoding="utf-8")
    return path, test
