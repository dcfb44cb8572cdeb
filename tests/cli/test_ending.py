"""How commands end: 2 for bad input, 70 for a fault of ours with a report, never 1, and no traceback."""

import subprocess
import sys

import click
import pytest

from dpft.harness import cli
from dpft.harness.cli import ending, options
from dpft.harness.errors import CannotRun


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CannotRun("The data are\nnot \x1b[31mhere; get them."), 2, "dpft: The data are not \\x1b[31mhere; get them."),
        (click.BadParameter("no"), 2, "dpft: Invalid value: no."),
        (OSError(28, "No space left on device", "/x"), 2, "dpft: No space left on device (/x);"),
        (MemoryError(), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (SystemExit(0), 2, "test_ending.py:16 ends the program with sys.exit"),
        (
            RecursionError("deep"),
            70,
            "This is a fault of dpft, not of what you asked (RecursionError in test_ending.py:16)",
        ),
    ],
)
def test_every_end_is_one_sentence(capsys, monkeypatch, tmp_path, error, code, said):
    monkeypatch.chdir(tmp_path)
    assert ending.ended(raising(error)) == code
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1 and err.endswith(".\n") and "Traceback" not in err


def test_the_answer_of_a_command_is_its_code():
    assert [ending.ended(lambda code=code: code) for code in (None, 0, 1)] == [0, 0, 1]


def test_a_fault_leaves_a_report_without_the_data_that_its_message_may_quote(dpft, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    secret = "a sentence of the training data"

    def broken(kind):
        try:
            {}[secret]
        except KeyError as cause:
            raise TypeError(secret) from cause

    monkeypatch.setattr("dpft.harness.runs.catalogue.listing", broken)
    code, out, err = dpft("list", "methods")
    (report,) = tmp_path.glob("dpft-fault-*.txt")
    text = report.read_text()
    assert (code, out) == (70, "") and report.name in err and secret not in err + text
    for part in (
        "command: 'list' 'methods'",
        "builtins.TypeError",
        "builtins.KeyError",
        "test_ending.py",
        "torch ",
        "python 3",
    ):
        assert part in text
    monkeypatch.setenv("DPFT_DEBUG", "")  # as it is put back, what the command sets goes
    _, _, err = dpft("--debug", "list", "methods")
    assert "Traceback" in err and secret in err


def test_a_report_goes_where_it_can(monkeypatch, tmp_path, capsys):
    (tmp_path / "closed").mkdir()
    (tmp_path / "open").mkdir()
    monkeypatch.chdir(tmp_path / "closed")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "open"))
    (tmp_path / "closed").rmdir()
    assert ending.ended(raising(ValueError())) == 70
    (report,) = (tmp_path / "open").iterdir()
    assert str(report) in capsys.readouterr().err
    report.unlink()
    (tmp_path / "open").rmdir()
    assert ending.ended(raising(ValueError())) == 70
    assert "run it again with --debug" in capsys.readouterr().err


def test_every_number_path_and_text_of_the_command_line_passes_the_border():
    kinds = (options.Finite, options.Whole, options.Where, options.Word, click.Choice)
    for command in cli.cli.commands.values():
        for parameter in command.params:
            taken_apart = parameter.callback is not None or getattr(parameter, "is_flag", False)
            flag = getattr(parameter, "flag_value", None) is not None and parameter.name == "only"
            assert taken_apart or flag or isinstance(parameter.type, kinds), f"{command.name} {parameter.name}"


@pytest.fixture
def own_plugins(monkeypatch):
    """Plug-ins of this test alone."""
    from dpft.harness.runs import registry

    monkeypatch.setattr(registry, "_PLUGINS", [])
    yield
    monkeypatch.undo()
    registry.forget()


@pytest.mark.usefixtures("own_plugins")
@pytest.mark.parametrize(
    "ends, said",
    [
        ("", "quits.py does not import (line 2: it ends the program by sys.exit)"),
        ("sys.exit(0)", "`validate` of method quits (class Quits) calls sys.exit (quits.py:10)"),
        ("{}['gone']", "`validate` of method quits (class Quits) ends with KeyError at quits.py:10 ('gone'); mend it"),
        ("raise GeneratorExit", "`validate` of method quits (class Quits) ends with GeneratorExit"),
    ],
)
def test_a_plug_in_that_fails_is_named_and_does_not_end_dpft_with_its_code(dpft, tmp_path, ends, said):
    path = tmp_path / "quits.py"
    path.write_text(
        f"import sys\n{'' if ends else 'sys.exit(0)'}\nfrom dpft.methods.base import Method\n\n\nclass Quits(Method):\n"
        f"    name = 'quits'\n    summary = 'leaves'\n    def validate(self, spec):\n        {ends or '...'}\n"
    )
    code, out, err = dpft("--plugin", path, "plan", "--task", "low-rank", "--method", "quits")
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1 and err.endswith(".\n")


def test_a_reader_that_has_enough_ends_the_command_quietly():
    """`dpft list tasks | head -1`, before: a sentence about sys.exit and code 2."""
    code = "from dpft.harness import cli; import sys; sys.argv = ['dpft', 'describe', 'demo', '--json']; cli.main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
