"""Task `classify`: a user's own table, from the file to a verified record."""

import csv
import json

import pytest
from small_runs import unwatched

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.records.store import Store
from dpft.harness.runs.resolve import resolve
from dpft.tasks.base import ModelSpec
from dpft.tasks.own.classify import Classify

NAMES = {"text": "review", "label": "stars"}
RUN = ["--steps", 2, "--batch-size", 60, "--set", "eval_every=1", "--set", "max_length=32"]


def save(path, rows, columns=("review", "stars")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def rows_of(count, seed):
    return [(f"the film {seed} {i} is {word}", word) for i in range(count) for word in [("bad", "good")[i % 3 > 0]]]


@pytest.fixture
def file(tmp_path):
    return save(tmp_path / "rows.csv", rows_of(300, 1))


def task(file, **more):
    return Classify({"file": str(file), **NAMES, **more})


def test_rows_classes_and_what_follows_from_them(file):
    mine = task(file)
    data = mine.load(None)
    assert data.classes == ("bad", "good") and mine.count(data) == 2 and not data.notes
    expected = {(text, ("bad", "good").index(label)) for text, label in rows_of(300, 1)}
    assert {(row["text"], row["label"]) for row in [*data.train, *data.validation]} == expected
    assert mine.train_size(None) == len(data.train) == 300 - len(data.validation)
    larger = max(sum(row["label"] == k for row in data.validation) for k in (0, 1)) / len(data.validation)
    assert mine.judged(data) == {"chance": larger, "threshold": (1 + larger) / 2}


def test_the_order_of_rows_moves_none_to_the_other_side_and_equal_texts_stay_together(file, tmp_path):
    rows = rows_of(300, 1)

    def sides(data):
        return [{row["text"] for row in part} for part in (data.train, data.validation)]

    turned = task(save(tmp_path / "turned.csv", rows[::-1])).load(None)
    train, validation = sides(task(file).load(None))
    assert sides(turned) == [train, validation]
    loud = task(save(tmp_path / "twice.csv", [*rows, *((f" {text.upper()}", label) for text, label in rows)])).load(
        None
    )
    assert {text.lower().strip() for text in sides(loud)[1]} == validation


def test_one_text_is_in_one_half_of_validation_however_it_is_written(file):
    mine = task(file)
    assert mine.identity({"text": "A  film ", "label": 0}) == mine.identity({"text": "a film", "label": 1})
    assert mine.identity({"text": "a film", "pair": "b", "label": 0}) != mine.identity({"text": "a film", "label": 0})


def test_pairs_and_whole_numbers(tmp_path):
    rows = [(f"question {i % 50}", f"answer {i}", i % 3 + 1) for i in range(200)]
    file = save(tmp_path / "rows.csv", rows, ("q", "a", "y"))
    data = Classify({"file": str(file), "text": "q", "text2": "a", "label": "y"}).load(None)
    assert data.classes == ("1", "2", "3")
    assert {tuple(row) for row in data.train} == {("text", "pair", "label")}


def test_a_validation_file(file, tmp_path):
    held = rows_of(50, 2) + rows_of(300, 1)[:4]
    data = task(file, validation=str(save(tmp_path / "held.csv", held))).load(None)
    assert (len(data.train), len(data.validation)) == (300, 54)
    assert data.notes[0].startswith("4 of 54 validation texts are in train, too")
    save(tmp_path / "held.csv", [*held, ("film", "fine")])
    with pytest.raises(CannotRun, match="held.csv has the label 'fine', which .*rows.csv has not"):
        task(file, validation=str(tmp_path / "held.csv")).load(None)
    with pytest.raises(CannotRun, match="validation and file are one file"):
        task(file, validation=str(file)).load(None)


def test_a_rare_class_is_said(tmp_path):
    data = task(save(tmp_path / "rows.csv", [*rows_of(300, 1), ("so so", "odd")])).load(None)
    assert data.notes == ("Classes with fewer than 10 training texts, of which noise leaves little: 'odd' 1.",)


def test_a_public_file_is_for_the_methods_that_need_it(file, tmp_path):
    public = save(tmp_path / "public.csv", [(f"public {text}", label) for text, label in rows_of(80, 5)])
    mine = task(file, public=str(public))
    found = mine.public_rows(None)
    assert len(found) == 80 and all(row["text"].startswith("public ") for row in found) and not mine.load(None).public
    asked = {"task": "classify", "file": str(file), **NAMES, "method": "dp-selft"}
    assert resolve({**asked, "public": str(public)}).task_options["public"] == str(public)
    with pytest.raises(BadInput, match="dp-selft learns from public data, and the task classify has none"):
        resolve(asked)
    save(public, [*rows_of(300, 1)[:1], ("other text", "good")])
    with pytest.raises(CannotRun, match="1 rows of .*public.csv are in the private data, too"):
        mine.load(None)


@pytest.mark.parametrize(
    "more, complaint",
    [
        ({"file": ""}, "classify needs a file with texts and labels; give it with --set file=PATH"),
        ({"file": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"text": "revue"}, "has no column revue; it has review, stars: did you mean 'review'"),
        ({"text": "stars"}, "The column stars cannot be two of text, label, text2 and user"),
        ({"label": "review"}, "different labels in 300 rows .* look like numbers or ids|cannot be two of"),
        ({"validation": 1.5}, "validation must be a share between 0 and 1"),
        ({"validation": "held.csv"}, "held.csv does not exist"),
        ({"validation": True}, "true does not exist"),
        ({"content": "0123456789abcdef"}, "its content is .*, not 0123456789abcdef"),
    ],
)
def test_what_cannot_work_is_said_when_the_run_is_resolved(more, complaint, file):
    """So there is no record yet: a record must not quote a row."""
    with pytest.raises(BadInput, match=complaint) as error:
        resolve({"task": "classify", "method": "dp-adam", "file": str(file), **NAMES, **more})
    assert "\n" not in str(error.value)


def test_columns_may_be_called_like_numbers_and_a_share_may_be_one(tmp_path):
    file = save(tmp_path / "rows.csv", rows_of(300, 1), ("0", "true"))
    spec = resolve(
        {"task": "classify", "method": "dp-adam", "file": str(file), "text": 0, "label": True, "validation": 0.2}
    )
    assert (spec.task_options["text"], spec.task_options["label"], spec.task_options["validation"]) == (
        "0",
        "true",
        "0.2",
    )


def test_runs_to_a_table_and_edited_files_are_other_runs(file, tmp_path, tiny_bert, dpft):
    results = tmp_path / "runs"
    command = ["run", "--task", "classify", "--model", tiny_bert, "--method", "last-layer", "--results", results, *RUN]
    command += ["--set", f"file={file}", "--set", "text=review", "--set", "label=stars"]
    code, out, err = dpft(*command, "--json")
    assert code == 0, err
    (record,) = json.loads(out)
    result, chance = record["result"], task(file).judged(task(file).load(None))
    assert {key: result[key] for key in ("chance", "threshold")} == chance and "chance_is" not in result
    assert (
        result["all_metrics"].keys() == {"accuracy", "macro_f1"}
        and result["final"] == result["all_metrics"]["accuracy"]
    )
    assert "the film" not in out, "a record quotes no row"
    assert dpft("verify", results)[0] == 0 and "other content" not in err
    assert dpft(*command)[2] == "", "nothing is made again"
    save(file, rows_of(300, 1)[:-1])
    with unwatched():
        code, out, err = dpft(*command)
    assert code == 0 and len(Store(results).records()) == 2
    assert f"Of the runs in {results}, 1 saw other content of {file}" in err and out.count("###") == 1
    code, _, err = dpft("run", "--replay", record["run_id"], "--results", results)
    assert code == 2 and "is not what was asked for" in err


def test_a_column_names_the_user_of_each_row_and_whole_users_are_held_out(tmp_path, dpft):
    rows = [(text, label, f"u{i // 3}") for i, (text, label) in enumerate(rows_of(300, 1))]
    columns = ("review", "stars", "who")
    mine = task(save(tmp_path / "users.csv", rows, columns), user="who", validation="0.2")
    data, owner = mine.load(None), {text: who for text, _, who in rows}
    assert mine.users == "whom the column who names" and len(data.users) == len(data.train)
    assert [owner[row["text"]] for row in data.train] == data.users
    assert not {owner[row["text"]] for row in data.validation} & set(data.users) and len(data.validation) > 30
    assert task(save(tmp_path / "rows.csv", rows, columns)).load(None).users == ()
    rows[7] = (*rows[7][:2], "")
    with pytest.raises(CannotRun, match="a row without who, the first in line 9"):
        task(save(tmp_path / "gaps.csv", rows, columns), user="who").load(None)
    with pytest.raises(BadInput, match="cannot be two of text, label, text2 and user"):
        task(tmp_path / "users.csv", user="stars").validate()
    given = ["--set", f"file={tmp_path / 'users.csv'}", "--set", "text=review", "--set", "label=stars"]
    out = dpft("describe", "classify", *given, "--set", "user=who")[1]
    assert "examples of each user: 3 to 3, median 3, of" in out and "users: whom the column who names" in out


def test_a_prompted_head_is_refused(file):
    with pytest.raises(CannotRun, match="classify has no prompt, which head=mlm needs"):
        task(file).prepare(task(file).load(None), ModelSpec("minilm-l6", "mlm"), None)


def test_describe_shows_what_was_found(file, dpft):
    given = ["--set", f"file={file}", "--set", "text=review", "--set", "label=stars"]
    code, out, err = dpft("describe", "classify", *given, "--json")
    found = json.loads(out)
    assert code == 0 and found["columns"] == ["review", "stars"] and found["threshold"] > found["chance"] >= 0.5
    assert list(found["classes"]) == ["0: bad", "1: good"] and found["training examples"] < 300
    assert found["example"]["text"] in {text for text, _ in rows_of(300, 1)} and "to" in found["characters"]["text"]
    assert "not shown: The task classify needs a file" in dpft("describe", "classify")[1]
    for arguments, complaint in (
        (["classify", "--set", f"file={file}"], "has no column text"),
        (["classify", "--set", "fil=x"], "did you mean 'file'"),
        (["reviews", "--set", "x=1"], "The task reviews has no settings"),
        (["dp-adam", "--set", "x=1"], "dp-adam is no task"),
    ):
        code, out, err = dpft("describe", *arguments)
        assert (code, out) == (2, "") and complaint in err


def test_describe_shows_an_example_of_what_is_here(mirror, dpft, monkeypatch):
    monkeypatch.delenv("DPFT_DATA", raising=False)
    assert '"image": "uint8 array of 1 x 8 x 8"' in dpft("describe", "digits")[1]
    assert json.loads(dpft("describe", "sst2", "--data-dir", mirror, "--json")[1])["training examples"] == 600
    assert "not shown: Its data are not here" in dpft("describe", "sst2")[1]
    assert "example" not in json.loads(dpft("describe", "canaries", "--json")[1])


def test_an_edited_file_draws_other_noise(file):
    from dpft.harness.train.run import noise_key

    def key(method="dp-adam"):
        return noise_key(resolve({"task": "classify", "method": method, "file": str(file), **NAMES}))

    before = key()
    assert before == key() and before != key("dp-sgd")
    save(file, rows_of(300, 1)[1:])
    assert before != key() and before[:4] == key()[:4]
    assert len(noise_key(resolve({"task": "sentences", "method": "dp-adam"}))) == 4, "that of committed records"
