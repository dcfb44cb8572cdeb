"""The command that begins a plug-in."""

from __future__ import annotations

import click

from dpft.harness.cli.options import Where


@click.command()
@click.argument("kind", type=click.Choice(["method", "task"]))
@click.argument("name")
@click.option("-o", "output", type=Where(dir_okay=False), help="The file.  [default: NAME.py, here]")
def new(kind, name, output):
    """Write a method or task called NAME that runs at once, in one file, and a test beside it.

    What a plug-in may do: docs/plugins.md.
    """
    from dpft.harness.plugins.scaffold import write
    from dpft.harness.runs import registry

    if name in (registry.methods() if kind == "method" else registry.tasks()):
        from dpft.harness.errors import BadInput

        raise BadInput(f"There is a {kind} called {name!r} already; take another name.")
    path, test = write(kind, name, output)
    asked = f"--task low-rank --method {name}" if kind == "method" else f"--task {name} --method dp-sgd --lr 0.5"
    click.echo(f"{path} and {test} were written. Try:")
    click.echo(f"  dpft --plugin {path} run {asked} --epsilon 8 --batch-size 512 --steps 50")
    click.echo(f"  python -m pytest {test}")
