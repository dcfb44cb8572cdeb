"""No circle of imports anywhere, rooms that stay small, and names that occur once.

An import is an edge to the module that names are taken from: `from package import x` leads to package.x where that is a module,
else to the package's __init__. What stands in a function, under TYPE_CHECKING or as the text in `import_module("...")` counts
like the rest. Passing through the __init__ of a package on the way to one of its modules is no edge: a package that offers what
its modules define would always stand in a circle with them.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest
from scipy.sparse import dok_array
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).parent.parent
ROOMS = ("harness", "methods", "tasks")
REGISTRY = "dpft.harness.runs.registry"
SEARCHED = ("dpft.methods.", "dpft.tasks.")  # by the registry, which imports every module there
AGAIN = {"__init__", "base", "noise"}  # may occur more than once; noise: a command, and a part of training


def modules(root):
    """Module -> its file, packages under their own names."""
    found = {}
    for path in (p for room in ROOMS for p in (root / room).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(("dpft", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imports(name, path, known):
    """Sets of modules of `known` that the module `name` imports, one for each import."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield known & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield known & {inner if inner in known else source}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield known & {a.value for a in node.args if isinstance(a, ast.Constant)}


def circles(root):
    """The imports, as `a -> b`, by which modules import one another: those inside strongly connected components."""
    files = modules(root)
    known = set(files)
    edges = {name: set().union(*imports(name, path, known)) - {name} for name, path in files.items()}
    if REGISTRY in edges:
        edges[REGISTRY] |= {name for name in known if name.startswith(SEARCHED)}
    place = {name: i for i, name in enumerate(sorted(known))}
    graph = dok_array((len(known), len(known)))
    for a, found in edges.items():
        for b in found:
            graph[place[a], place[b]] = 1
    _, component = connected_components(graph, connection="strong")
    return [f"{a} -> {b}" for a in place for b in sorted(edges[a]) if component[place[a]] == component[place[b]]]


def test_there_is_no_circle_of_imports():
    assert circles(ROOT) == []


@pytest.mark.parametrize(
    "back",
    [
        "from dpft.harness.runs import spec",
        "from dpft.harness.runs.spec import RunSpec",
        "import dpft.harness.runs.spec",
        "from . import spec",
        "from ..runs.spec import RunSpec",
        "def late():\n    from dpft.harness.runs.spec import RunSpec",
        "if TYPE_CHECKING:\n    from dpft.harness.runs.spec import RunSpec",
        'importlib.import_module("dpft.harness.runs.spec")',
    ],
)
def test_a_circle_is_seen_however_it_is_written(tmp_path, back):
    """Also one through what the registry finds without naming it."""
    folder = tmp_path / "harness/runs"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from dpft.harness.runs.spec import RunSpec\n")
    (folder / "spec.py").write_text("from dpft.harness.runs.plan import plan\n")
    (folder / "plan.py").write_text("import json\n")
    assert circles(tmp_path) == []
    (folder / "plan.py").write_text(back)
    assert circles(tmp_path) == [
        "dpft.harness.runs.plan -> dpft.harness.runs.spec",
        "dpft.harness.runs.spec -> dpft.harness.runs.plan",
    ]


def test_what_the_registry_finds_may_not_import_it(tmp_path):
    for room in ("harness/runs", "methods"):
        (tmp_path / room).mkdir(parents=True)
    (tmp_path / "harness/runs/registry.py").write_text("import pkgutil\n")
    (tmp_path / "methods/mine.py").write_text("from dpft.harness.runs import registry\n")
    assert len(circles(tmp_path)) == 2


def test_the_rooms_of_the_harness_are_its_architecture():
    assert len(list((ROOT / "harness").glob("*.py"))) <= 8


def test_no_two_modules_have_one_name():
    named = Counter(path.stem for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    assert {name for name, count in named.items() if count > 1} <= AGAIN
