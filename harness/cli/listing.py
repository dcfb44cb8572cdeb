"""Commands that say what there is."""

from __future__ import annotations

import json

import click

from dpft.harness.cli import showing
from dpft.harness.cli.helping import completing
from dpft.harness.cli.options import data_dir_option, pairs


@click.command("list")
@click.argument("kind", type=click.Choice(["methods", "decoders", "clippings", "tasks", "suites", "boards"]))
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead.")
def list_(kind, as_json):
    """List what there is."""
    from dpft.harness.runs.catalogue import listing, trouble

    rows = listing(kind)
    for sentence in trouble(kind):
        click.echo(f"dpft: left out: {sentence}", err=True)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(showing.rows(rows))


@click.command()
@click.argument("name", shell_complete=completing("methods", "tasks", "suites"))
@click.option("--set", "given", multiple=True, callback=pairs, metavar="KEY=VALUE", help="A setting of a task.")
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead.")
def describe(name, given, data_dir, as_json):
    """Say what a method, decoder, clipping rule, task or suite is: reference, what it releases, defaults, runs.

    Of a task whose data are here also sizes, classes and an example, word for word: it may be private.
    """
    from dpft.harness.runs.catalogue import description

    found = description(name, given, data_dir)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        if key == "releases" and not isinstance(value, str):
            click.echo("\n".join([f"{key}:", *_steps(value)]))
            continue
        click.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")


def _steps(kinds) -> list[str]:
    """A line for every question of every kind of step."""
    lines = []
    for one in kinds:
        start, end = one["steps"]
        which = f"{one['kind']}, " * bool(one["kind"]) + (
            f"steps {start + 1} to {end}" if len(kinds) > 1 else "every step"
        )
        lines += [
            f"  {which}: {asked['name']} ({asked['share']:.4g} of the budget): {asked['what']}" for asked in one["asks"]
        ]
    return lines
