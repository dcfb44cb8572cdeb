"""`dpft audit` on the command line."""

import json

import click
import pytest
from click.testing import CliRunner

from dpft.harness.audit import bugs
from dpft.harness.cli import cli
from dpft.harness.errors import BadInput

pytestmark = pytest.mark.usefixtures("one_thread")


def ran(*arguments):
    try:
        result = CliRunner().invoke(cli, ["audit", *arguments], standalone_mode=False)
    except BadInput as error:  # pragma: no cover - click hands exceptions over
        return None, str(error)
    return result, str(result.exception or "")


def test_the_command():
    few = ["--steps", "24", "--canaries", "32", "--sampling-rate", "0.25", "--quiet"]
    result, _ = ran("dp-bitfit", *few, "--json")
    document = json.loads(result.stdout)
    assert result.return_value == 0 and document["verdict"] == "consistent"
    assert document["certificate"] <= 4 and {c["name"] for c in document["checks"]} >= {"noise std", "inclusion rate"}
    assert "within reach" in ran("last-layer", *few)[0].output
    with next(bug for bug in bugs.BUGS if bug.name == "shuffled").plant():
        assert ran("last-layer", *few)[0].return_value == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "Name one method"),
        (["dp-adm"], "did you mean 'dp-adam'?"),
        (["non-private"], "is not private"),
        (["dp-adam", "--check"], "belong to --planted"),
        (["dp-adam", "--repeat", "2", "--one-run"], "leave out"),
        (["--planted", "--repeat", "2"], "leave out"),
        (["dp-adam,dp-lroa", "--repeat", "2"], "did you mean 'dp-lora'?"),
        (["dp-adam,non-private", "--repeat", "2"], "is not private"),
        (["--planted", "--check"], "-o"),
        (["--planted", "--only", "shufled"], "did you mean 'shuffled'?"),
        (["dp-adam", "--engine", "fast"], "engine"),
        (["dp-adam", "--sampling-rate", "0"], "0<x<=1"),
        (["dp-adam", "--sampling-rate", "nan"], "finite"),
        (["dp-adam", "--canaries", "1000"], "at most 256"),
        (["dp-adam", "--epsilon", "1000"], "epsilon"),
        (["dp-adam", "--set", "rank=3"], "rank"),
    ],
)
def test_bad_questions_are_one_sentence(arguments, words):
    result, message = ran(*arguments)
    assert isinstance(result.exception, (BadInput, click.BadParameter)) and words in message and "\n" not in message


def test_the_planted_table_stands_between_its_markers(tmp_path):
    from dpft.harness.audit.report import MARKERS

    path = tmp_path / "page.md"
    path.write_text("before\n" + "\n".join(MARKERS) + "\nafter\n")
    few = ["--planted", "--only", "clean-mask", "--steps", "16", "--canaries", "32", "--sampling-rate", "0.25"]
    assert ran(*few, "-o", str(path))[0].return_value == 0
    text = path.read_text()
    assert "replay (weights after step 1)" in text and "| nothing " in text
    assert ran(*few, "-o", str(path), "--check")[0].return_value == 0, "a seed repeats exactly"
    path.write_text(text.replace("4.00", "4.01"))
    assert ran(*few, "-o", str(path), "--check")[0].return_value == 1


def test_repeated_audits_count_what_they_find():
    few = ["--steps", "12", "--canaries", "24", "--sampling-rate", "0.25", "--quiet", "--json"]
    result, _ = ran("last-layer,dp-bitfit", "--repeat", "2", *few)
    document = json.loads(result.stdout)
    assert result.return_value == 0 and document["audits"] == 4 and document["accused"] == []
    assert document["low"] == 0 and document["high"] == pytest.approx(0.6024, abs=1e-3), "Clopper-Pearson of 0 in 4"
    with next(bug for bug in bugs.BUGS if bug.name == "fixed-size").plant():
        result, _ = ran("last-layer", "--repeat", "2", *few)
    document = json.loads(result.stdout)
    assert result.return_value == 1 and [seed for _, seed, _ in document["accused"]] == [0, 1]
