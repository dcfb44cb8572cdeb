"""Commands that say what there is."""

from __future__ import annotations

import json

import click


@click.command("list")
@click.argument("kind", type=click.Choice(["methods", "decoders", "clippings", "tasks", "suites"]))
@click.option("--json", "as_json", is_flag=True)
def list_(kind, as_json):
    """List what there is."""
    from dpft.harness.runs.catalogue import listing

    rows = listing(kind)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from tabulate import tabulate

    click.echo(tabulate(rows, headers="keys", tablefmt="simple"))


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True)
def describe(name, as_json):
    """Say what a method, decoder, clipping rule, task or suite is: reference, what it releases, defaults, runs."""
    from dpft.harness.runs.catalogue import description

    found = description(name)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        click.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
