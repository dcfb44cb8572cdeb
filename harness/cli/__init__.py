"""The `dpft` command: parsing and printing only. Everything heavy is imported inside the commands."""

from __future__ import annotations

import signal
import sys

import click

from dpft.harness.cli import auditing, checking, listing, measuring, memory, noise, reporting, running
from dpft.harness.errors import BadInput
from dpft.harness.execution import interrupts, jobs

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def main() -> None:
    """Entry point: bad input and a full disk are one sentence and exit code 2; SIGINT is exit code 130, SIGTERM 143."""
    try:
        with interrupts.handled():
            code = cli.main(standalone_mode=False) or 0
        sys.exit(code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BadInput as error:
        click.echo(f"dpft: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        click.echo(f"dpft: {error.strerror or error}{place}; finished runs are kept, mend it and run again.", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as stop:
        if not jobs.is_sibling():  # its parent says it
            click.echo("dpft: interrupted; finished runs are kept, the same command continues.", err=True)
        cause = stop.__cause__ if isinstance(stop, click.Abort) else stop  # click wraps it
        sys.exit(128 + getattr(cause, "number", signal.SIGINT))


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="dpft")
@click.option(
    "--plugin", "plugins", multiple=True, metavar="FILE", help="Python file with methods or tasks (repeatable)."
)
def cli(plugins: tuple[str, ...]) -> None:
    """Compare differentially private fine-tuning methods under one matched, PRV-accounted budget."""
    if plugins:
        from dpft.harness.runs.registry import load_plugin

        for plugin in plugins:
            load_plugin(plugin)


for command in (
    running.run,
    running.plan,
    running.prepare,
    reporting.report,
    checking.check,
    reporting.verify,
    reporting.merge,
    listing.list_,
    listing.describe,
    measuring.bench,
    memory.memory,
    noise.noise,
    auditing.audit,
):
    cli.add_command(command)
