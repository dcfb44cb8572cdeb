"""Tasks `causal-lm` and `instruction`: the same rows from every kind of file, and run ids that stay what they were."""

import json

import polars
import pytest

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve

ROWS = [{"q": f"question {i} ", "a": f"answer {i}", "n": i} for i in range(40)]
NAMES = {"prompt": "q", "response": "a"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the rows as JSONL, parquet and CSV."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    polars.DataFrame(ROWS).write_parquet(tmp_path / "rows.parquet")
    polars.DataFrame(ROWS).write_csv(tmp_path / "rows.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_same_rows_from_every_kind_of_file(here):
    made = [registry.task("instruction")({"file": f"rows.{kind}", **NAMES}) for kind in ("jsonl", "parquet", "csv")]
    first, second, third = (task.load(None) for task in made)
    assert first == second == third
    assert made[0].train_size(None) == len(first.train) == 36 and len(first.validation) == 4
    assert {"prompt": "question 3\n", "response": "answer 3"} in [*first.train, *first.validation]


def test_a_column_names_the_user_of_each_row(here):
    for kind in ("jsonl", "csv"):
        task = registry.task("instruction")({"file": f"rows.{kind}", **NAMES, "user": "n"})
        data = task.load(None)
        assert data.users == [row["prompt"].split()[1] for row in data.train] and len(data.users) == 36
        assert list(task.pinned(None)) == ["content"], "an edited column of users is another run"
        assert data.train == registry.task("instruction")({"file": f"rows.{kind}", **NAMES}).load(None).train
    given = registry.task("causal-lm")({"file": "rows.csv", "validation_file": "rows.jsonl", "text": "q", "user": "n"})
    assert given.load(None).users == [str(i) for i in range(40)]


def test_language_modelling_with_a_split_and_with_a_file(here, monkeypatch):
    monkeypatch.chdir("/")
    language = registry.task("causal-lm")({"file": "rows.parquet", "text": "a"})
    assert language.load(here).train[0]["prompt"] == "" and len(language.load(here).validation) == 4
    given = registry.task("causal-lm")({"file": "rows.csv", "validation_file": "rows.jsonl", "text": "q"}).load(here)
    assert len(given.train) == len(given.validation) == 40


def test_ids_of_jsonl_and_parquet_stay_and_those_of_other_kinds_know_the_content(here):
    """Two ids as the version before `content` gave them."""
    assert resolve({"task": "instruction", "file": "rows.jsonl", "method": "dp-lora"}).run_id == "491b4f549517a0c8"
    more = {"file": "rows.parquet", "validation_file": "more.jsonl", "text": "body", "seed": 1}
    assert resolve({"task": "causal-lm", "method": "dp-adam", **more}).run_id == "2be6d09c9a299369"
    asked = {"task": "instruction", "file": "rows.csv", "method": "dp-lora", **NAMES}
    first = resolve(asked)
    assert len(first.task_options["content"]) == 16
    polars.DataFrame(ROWS[::-1]).write_csv("rows.csv")
    second = resolve(asked)
    assert second.run_id != first.run_id
    with pytest.raises(CannotRun, match=f"rows.csv is not what was asked for: its content is .*, not {'0' * 16}"):
        resolve({**asked, "content": "0" * 16})
    assert resolve({**asked, "content": second.task_options["content"]}) == second
    pinned = resolve(
        {
            **asked,
            "file": "rows.jsonl",
            "content": registry.task("instruction")({"file": "rows.jsonl"}).about(None)["content"],
        }
    )
    assert pinned.task_options["content"]


def test_a_csv_that_cannot_be_used_is_refused_before_there_is_a_record(here):
    with pytest.raises(CannotRun, match="rows.csv has no column prompt; it has q, a, n"):
        resolve({"task": "instruction", "file": "rows.csv", "method": "dp-lora"})
    with pytest.raises(BadInput, match="needs a file with texts; give it with --set file=PATH"):
        registry.task("instruction")().load(None)
    (here / "one.csv").write_text("q,a\nalone,alone\n")
    with pytest.raises(CannotRun, match="too few different texts"):
        resolve({"task": "instruction", "file": "one.csv", "method": "dp-lora", **NAMES})


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"file": "nowhere.parquet"}, "nowhere.parquet does not exist"),
        ({"file": "rows.txt"}, "has none of the endings that are read"),
        ({"file": "rows.jsonl", "text": "body"}, "has no column body; it has text, n"),
        ({"file": "rows.jsonl", "text": "n"}, "The column n of .* holds numbers .line 1., not text"),
        ({"file": "broken.jsonl"}, "is not a readable jsonl file"),
        ({"file": "broken.parquet"}, "is not a readable parquet file"),
        ({"file": "holes.jsonl"}, "has 2 rows without text, the first in line 2"),
        ({"file": "empty.jsonl"}, "is empty"),
    ],
)
def test_text_files_that_cannot_be_used(options, complaint, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a b", "n": 1}\n')
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "holes.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "  "}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{not json")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CannotRun, match=complaint) as error:
        registry.task("causal-lm")(options).load(tmp_path)
    assert "\n" not in str(error.value)
