"""Options that commands share."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import click


def grid(convert):
    """A callback that reads `a,b,c` as a grid axis and `a` as a value."""

    def callback(context, parameter, text):
        if text is None:
            return None
        try:
            values = [convert(part.strip()) for part in text.split(",")]
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a number or a comma-separated list of numbers.") from None
        twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
        if twice is not None:
            raise click.BadParameter(f"{text!r} names {twice} twice; give each value once.")
        return values if len(values) > 1 else values[0]

    return callback


def skip_damaged(command):
    """The option --skip-damaged; the command gets `passed_over`, for Store."""

    @functools.wraps(command)
    def wrapper(skip_damaged, **given):
        return command(passed_over=functools.cache(_pass_over) if skip_damaged else None, **given)

    return click.option("--skip-damaged", is_flag=True, help="Name damaged or newer records, and go on without them.")(
        wrapper
    )


def _pass_over(why: str) -> None:
    from dpft.harness.execution.jobs import is_sibling

    if not is_sibling():  # its parent says it
        click.echo(f"dpft: passed over: {why}", err=True)


def pairs(context, parameter, items: tuple[str, ...]) -> dict[str, Any]:
    """A callback that reads KEY=VALUE items; values as JSON where they are."""
    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise click.BadParameter(f"{item!r} is not KEY=VALUE.")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def spec_options(command):
    """The options that say what to run, collected into one dict `overrides`."""
    options = [
        click.option("--task"),
        click.option("--model", help="Packaged name, local folder or hub id."),
        click.option("--method", callback=grid(str), help="One, or several separated by commas."),
        click.option("--epsilon", callback=grid(float), help="Target epsilon; several separated by commas."),
        click.option("--delta", type=float, help="Default 1/(2N)."),
        click.option("--steps", type=int),
        click.option("--batch-size", type=int, help="Expected batch size of Poisson sampling."),
        click.option("--lr", callback=grid(float), help="One, or several separated by commas."),
        click.option("--clip-norm", callback=grid(float), help="One, or several separated by commas."),
        click.option("--seeds", "seed", callback=grid(int), help="Seeds separated by commas."),
        click.option(
            "--set", "more", multiple=True, callback=pairs, metavar="KEY=VALUE", help="Any other setting (repeatable)."
        ),
        click.option("--precision", type=click.Choice(["fp32", "bf16"])),
        click.option(
            "--data-dir", type=click.Path(path_type=Path), envvar="DPFT_DATA", help="Local mirror of data sets."
        ),
        click.option("--results", type=click.Path(path_type=Path), default=Path("results/runs"), show_default=True),
    ]
    keys = (
        "task",
        "model",
        "method",
        "epsilon",
        "delta",
        "steps",
        "batch_size",
        "lr",
        "clip_norm",
        "seed",
        "precision",
    )

    @functools.wraps(command)
    def wrapper(**given):
        overrides = {key: given.pop(key) for key in keys}
        overrides = {key: value for key, value in (overrides | given.pop("more")).items() if value is not None}
        return command(overrides=overrides, **given)

    return functools.reduce(lambda f, option: option(f), reversed(options), wrapper)
