"""dpft from Python: the examples of docs/python.md, and what it says of errors."""

import re
from pathlib import Path

import polars
import pytest

import dpft
from dpft.harness.errors import BadInput

ROOT = Path(__file__).parent.parent
SMALL = {"task": "low-rank", "model": "linear", "epsilon": 8, "batch_size": 512, "steps": 4}


def test_the_examples_of_the_documents_run(tmp_path, monkeypatch, capsys):
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(first, names)
    frame = names["frame"]
    assert frame.height == 6 and set(frame["status"]) == {"done"} and frame["certified_epsilon"].max() <= 8
    exec(second, names)
    assert "| rmt " in capsys.readouterr().out
    records = list(Path("results/notebook").glob("*.json"))
    again = {path: path.stat().st_mtime_ns for path in records}
    exec(first, names)
    assert {path: path.stat().st_mtime_ns for path in records} == again
    assert names["frame"].sort("run_id").equals(frame.sort("run_id"))
    assert dpft.records("results/notebook").sort("run_id")["final"].equals(frame.sort("run_id")["final"])


def test_a_packed_study_is_read():
    frame = dpft.records(ROOT / "results/clicks")
    assert isinstance(frame, polars.DataFrame) and {"run_id", "method", "final", "certified_epsilon"} <= set(
        frame.columns
    )
    assert "dp-adafest" in dpft.report(ROOT / "results/clicks", brief=True)


def test_plan_trains_nothing(tmp_path):
    frame = dpft.plan(**SMALL, method=["dp-sgd", "dp-adam"], results=tmp_path / "none")
    assert frame.height == 2 and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "dp-sdg"}, "dp-sgd"),
        ({}, "method="),
        ({"method": "dp-sgd", "engine": "fast"}, "engine"),
        ({"method": "dp-sgd", "stepz": 3}, "steps"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, wrong, said):
    with pytest.raises(BadInput, match=said):
        dpft.run(**SMALL, **wrong, results=tmp_path)


def test_a_plug_in_and_a_run_that_fails_are_rows(tmp_path):
    (tmp_path / "broken.py").write_text(
        "from dpft.methods.base import Gradients, Method\n\n\n"
        "class Broken(Method):\n"
        '    name, summary, reference = "broken", "raises in its first step", "none"\n\n'
        "    def step(self, ask, step):\n"
        '        ask(gradient=Gradients())\n        raise RuntimeError("no")\n'
    )
    from dpft.harness.runs import registry

    try:
        frame = dpft.run(**SMALL, method="broken", lr=0.1, plugins=[tmp_path / "broken.py"], results=tmp_path / "runs")
    finally:
        registry._PLUGINS.clear()
        registry.forget()
    assert frame["status"].to_list() == ["error"]


def test_nothing_heavy_is_imported_with_dpft():
    import subprocess
    import sys

    code = "import sys, dpft; sys.exit(any(name in sys.modules for name in ('torch', 'polars', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert not hasattr(dpft, "nothing") and "run" in dir(dpft)
