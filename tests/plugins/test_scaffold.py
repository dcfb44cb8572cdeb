"""`dpft new`: what it writes runs, its tests pass, and nothing is overwritten; docs/plugins.md says what is so."""

import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dpft.harness.plugins import conformance
from dpft.harness.records.store import Store
from dpft.harness.runs import registry

DOCUMENT = (Path(__file__).parents[2] / "docs/plugins.md").read_text()

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, and no plug-ins afterwards."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    registry._PLUGINS.clear()
    registry.forget()


@pytest.mark.parametrize("kind, chance", [("method", 0.0), ("task", 0.5)])
def test_what_is_written_runs_as_it_says_and_its_tests_pass(here, dpft, kind, chance):
    code, out, err = dpft("new", kind, "my-own.2")
    assert code == 0 and err == ""
    command = shlex.split(re.search(r"dpft (--plugin .*)", out)[1])
    code, out, err = dpft(*command)
    assert code == 0, err
    (record,) = Store(here / "results/runs").records()
    assert record["status"] == "done" and record["spec"][kind] == "my-own.2"
    assert record["result"]["final"] > chance + 0.2, "an example should learn something"
    tests = functions(here / "test_my_own_2.py")
    assert len(tests) == 2
    for number, test in enumerate(tests):
        test(**{name: here / f"records-{number}" for name in inspect.signature(test).parameters})


def functions(path):
    spec = importlib.util.spec_from_file_location("written", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [value for name, value in vars(module).items() if name.startswith("test_")]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["method", "My Method"], ["'My Method'", "for example 'my-method'"]),
        (["method", "dp-sgd"], ["a method called 'dp-sgd' already"]),
        (["task", "sst2"], ["a task called 'sst2' already"]),
        (["method", "mine"], ["test_mine.py already"]),
        (["method", "other", "-o", "gone/other.py"], ["no folder gone"]),
        (["method", "other", "-o", "other.txt"], ["other.txt is no name of a Python file", "other.py"]),
        (["method", "class"], ["class.py is no name"]),
        (["metod", "mine"], ["metod"]),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(here, dpft, arguments, words):
    (here / "test_mine.py").write_text("mine")
    code, out, err = dpft("new", *arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    assert all(word in err for word in words), err
    assert [path.name for path in here.iterdir()] == ["test_mine.py"]


BAD = """
import torch
from dpft.methods.base import Gradients, Method

class Keeps(Method):
    name = "keeps"
    def step(self, ask, step):
        (noisy,) = ask(gradient=Gradients())
        return {name: t + 1e-3 * torch.randn(()) for name, t in noisy.mean().items()}
"""
WORSE = """
from dpft.tasks.lowrank import LowRank
class Fine(LowRank):
    name = "fine"
class Short(LowRank):
    name = "short"
    def train_size(self, data_dir):
        return 19_000
"""


def test_conformance_says_what_is_wrong(here):
    (here / "bad.py").write_text(BAD + WORSE)
    found = conformance.of_method(here / "bad.py", "keeps", here / "records")
    assert any("do not follow from the releases" in problem for problem in found), found
    assert any("Two runs of one seed differ from step" in problem for problem in found), found
    (problem,) = conformance.of_task(here / "bad.py", "short", here / "more")
    assert "`train_size` of task short is not the 20000 rows" in problem
    (problem,) = conformance.of_task(here / "bad.py", "fine", here / "again", model="none")
    assert "ended with status error" in problem and "model of its own" in problem


def test_the_document_names_the_groups_and_classes_that_there_are():
    rows = re.findall(r"\| `(\w+)` \| `([\w.]+)` \| `([\w.]+)` \|", DOCUMENT)
    assert rows == [(base, f"{package}.base", group) for package, base, group in registry.KINDS.values()]


def test_the_package_of_the_document_is_found_where_it_is_installed(here, dpft, monkeypatch):
    """Built as pip builds it without isolation, so without a network."""
    pytest.importorskip("setuptools")
    for kind in ("method", "task"):
        assert dpft("new", kind, f"my-{kind}")[0] == 0
    (template,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    (here / "pyproject.toml").write_text(template)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel('made')"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True)
    (wheel,) = (here / "made").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(here / "installed")
    monkeypatch.syspath_prepend(here / "installed")
    registry.forget()
    for cls in (registry.method("my-method"), registry.task("my-task")):
        assert Path(inspect.getfile(cls)).parent == here / "installed"
    assert [registry.set_aside(kind) for kind in registry.KINDS] == [[], [], [], []]
    monkeypatch.undo()  # `here` forgets afterwards
