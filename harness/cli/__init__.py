"""The `dpft` command: parsing and printing only. Everything heavy is imported inside the commands."""

from __future__ import annotations

import os
import sys

import click

from dpft.harness.cli import (
    advising,
    auditing,
    checking,
    listing,
    manual,
    measuring,
    memory,
    noise,
    reporting,
    running,
    writing,
)
from dpft.harness.cli.ending import ended
from dpft.harness.cli.options import one_line_texts

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def main() -> None:
    """Entry point; `ending.ended` has the exit codes."""
    if "_DPFT_COMPLETE" in os.environ:  # a shell asks for names, and takes whatever is printed for one
        cli.main(prog_name="dpft")
    sys.exit(ended(lambda: cli.main(standalone_mode=False)))


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="dpft")
@click.option(
    "--plugin", "plugins", multiple=True, metavar="FILE", help="Python file with methods or tasks (repeatable)."
)
@click.option("--debug", is_flag=True, help="Show the traceback of a fault of dpft itself (or set DPFT_DEBUG=1).")
def cli(plugins: tuple[str, ...], debug: bool) -> None:
    """Compare differentially private fine-tuning methods under one matched, PRV-accounted budget."""
    if debug:
        os.environ["DPFT_DEBUG"] = "1"  # the environment, for processes that are started, too
    if plugins:
        from dpft.harness.runs.registry import load_plugin

        for plugin in plugins:
            load_plugin(plugin)


for command in (
    running.run,
    running.plan,
    running.prepare,
    advising.advise,
    reporting.report,
    checking.check,
    reporting.verify,
    reporting.merge,
    reporting.pack,
    reporting.trip,
    listing.list_,
    listing.describe,
    measuring.bench,
    memory.memory,
    noise.noise,
    auditing.audit,
    writing.new,
    manual.commands,
):
    cli.add_command(one_line_texts(command))
