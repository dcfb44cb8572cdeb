"""What README and docs/tasks.md show: the own CSV, and AG News as a plug-in in 25 lines."""

import csv
import re
import shlex
from pathlib import Path

import polars
import pytest
from small_runs import unwatched

from dpft.harness.records.store import Store
from dpft.harness.runs import registry
from dpft.tasks.reviews import Reviews

ROOT = Path(__file__).parents[3]
SMALL = ["--steps", 2, "--batch-size", 16, "--set", "max_length=16", "--set", "eval_every=2"]


def commands(name, start):
    """The commands of a page that begin with `start`, as lists of arguments."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix(".venv/bin/") for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(start)]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Two hundred real reviews of food as README's file, in the current folder."""
    data = Reviews().load(None)
    monkeypatch.chdir(tmp_path)
    with open("rows.csv", "w", newline="") as file:
        stars = ("fair", "great")
        csv.writer(file).writerows([("review", "stars"), *((r["text"], stars[r["label"]]) for r in data.train[:200])])


def test_the_example_of_the_readme_runs_on_a_file_of_real_texts(rows, tiny_bert, dpft):
    (command,) = commands("README.md", "dpft run --task classify")
    with unwatched():
        code, out, err = dpft(*command, *SMALL, "--model", tiny_bert)
    assert code == 0, err
    methods = {record["spec"]["method"] for record in Store("results/runs").records()}
    assert methods == {"dp-adam", "dp-lora", "last-layer"} and all(name in out for name in methods)


def test_the_example_of_describe_runs(rows, dpft):
    (command,) = commands("docs/tasks.md", "dpft describe")
    code, out, err = dpft(*command)
    assert code == 0 and '"0: fair"' in out and "example: {" in out, err


def test_the_task_of_the_documents_runs_as_a_plug_in(tmp_path, monkeypatch, tiny_bert, dpft):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tasks.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    Path("ag_news.py").write_text(example)
    folder = Path("MIRROR/fancyzhx/ag_news")
    folder.mkdir(parents=True)
    for split, count in (("train", 80), ("test", 20)):
        rows = [{"text": f"the story {i} is a plot", "label": i % 4} for i in range(count)]
        polars.DataFrame(rows).write_parquet(folder / f"{split}.parquet")
    (command,) = commands("docs/tasks.md", "dpft --plugin ag_news.py")
    try:
        with unwatched():
            code, out, err = dpft(*command, *SMALL, "--model", tiny_bert)
        assert code == 0 and "ag-news" in out, err
        assert registry.task("ag-news")().train_size(Path("MIRROR")) == 80
        assert dpft("verify", "results/runs")[0] == 0
    finally:
        registry._PLUGINS.clear()
        registry.forget()
