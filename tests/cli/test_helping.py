"""Help under headings, names to complete, the reference."""

import os
import subprocess
import sys

import click

from dpft.harness.cli import cli
from dpft.harness.cli.helping import Grouped, completing


def shown(command, *names):
    return command.get_help(click.Context(command, info_name=command.name, terminal_width=80))


def test_every_option_of_a_grouped_command_is_in_its_help():
    grouped = [command for command in cli.commands.values() if isinstance(command, Grouped)]
    assert {command.name for command in grouped} >= {"run", "plan", "prepare"}
    for command in grouped:
        text = shown(command)
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert text.count(f"  {parameter.opts[0]}") >= 1, parameter.opts[0]
        assert text.index("What to run:") < text.index("Where:")
        assert "9223372036854775807" not in text and "<=None" not in text


def test_an_option_that_has_no_heading_is_still_shown():
    command = Grouped("c", params=[click.Option(["--task"]), click.Option(["--odd"])])
    assert "More:" in shown(command) and "--odd" in shown(command)


def test_names_are_completed():
    complete = completing("methods")
    assert complete(None, None, "dp-adam,dp-lo") == ["dp-adam,dp-lora"]
    assert "demo" in completing("suites", "boards")(None, None, "")
    assert "tiny" in completing("suites", "boards")(None, None, "ti")


def test_completion_in_a_shell_prints_names_and_nothing_else():
    asked = {"_DPFT_COMPLETE": "bash_complete", "COMP_WORDS": "dpft run --task senten", "COMP_CWORD": "3"}
    code = "from dpft.harness import cli; import sys; sys.argv = ['dpft']; cli.main()"
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, ["plain,sentences"], "")


def test_the_reference_has_every_command_and_knows_when_it_is_stale(tmp_path, dpft):
    page = tmp_path / "commands.md"
    page.write_text("<!-- dpft report commands: begin -->\n<!-- dpft report commands: end -->\n")
    assert dpft("commands", "-o", page, "--check")[0] == 1
    assert dpft("commands", "-o", page)[0] == 0
    assert dpft("commands", "-o", page, "--check")[0] == 0
    text = page.read_text()
    assert all(f"\n## {name}\n" in text for name, command in cli.commands.items() if not command.hidden)
