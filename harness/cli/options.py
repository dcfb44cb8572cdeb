"""Options that commands share."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import click

from dpft.harness.border.documents import Misfit, fitted, parsed
from dpft.harness.border.values import WHOLE, Filled, shown
from dpft.harness.cli.helping import completing


class Finite(click.FloatRange):
    """A number that is one: NaN passes every bound, and infinity those that are not there."""

    name = "number"

    def _describe_range(self) -> str:
        return "" if (self.min, self.max) == (None, None) else super()._describe_range()

    def convert(self, value, parameter, context):
        try:
            found = super().convert(value, parameter, context)
        except click.BadParameter:
            bounds = f" in the range {self._describe_range()}" if (self.min, self.max) != (None, None) else ""
            self.fail(f"{shown(value)} is not a number{bounds}.", parameter, context)
        if not math.isfinite(found):
            self.fail(f"{shown(value)} is not a finite number.", parameter, context)
        return found


class Whole(click.IntRange):
    """A whole number of at most 63 bits, and not less than `min`, default 1."""

    name = "count"

    def __init__(self, min: int = 1, max: int = WHOLE):
        super().__init__(min, max)

    def _describe_range(self) -> str:
        return ""  # of the help: that a count is not negative goes without saying, and what is wrong is said below

    def convert(self, value, parameter, context):
        try:
            return super().convert(value, parameter, context)
        except click.BadParameter:
            self.fail(f"{shown(value)} is not a whole number from {self.min} to {self.max}.", parameter, context)


class Where(click.Path):
    """A path, of a file or a folder that need not be there."""

    def __init__(self, **more):
        super().__init__(path_type=Path, **more)

    def convert(self, value, parameter, context):
        try:
            fitted(os.fspath(value), Filled)
        except Misfit as problem:
            self.fail(f"A path {problem.why}.", parameter, context)
        return super().convert(value, parameter, context)


class Word(click.ParamType):
    """A name or another text of one line."""

    name = "text"

    def convert(self, value, parameter, context):
        try:
            return fitted(value, Filled)
        except Misfit as problem:
            self.fail(f"It {problem.why}.", parameter, context)


def one_line_texts(command: click.Command) -> click.Command:
    """The command, with every text that has no other type as a `Word`."""
    for parameter in command.params:
        if parameter.type is click.STRING and not parameter.callback:
            parameter.type = WORD
    return command


FINITE, WORD, WHERE = Finite(), Word(), Where()


def grid(kind: click.ParamType):
    """A callback that reads `a,b,c` as a grid axis and `a` as a value."""

    def callback(context, parameter, text):
        if text is None:
            return None
        values = [kind.convert(part.strip(), parameter, context) for part in text.split(",")]
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
        if not equals or not key:
            raise click.BadParameter(f"{shown(item)} is not KEY=VALUE.")
        try:
            found[key] = parsed(value)
        except ValueError:
            found[key] = value
    return found


def put(text: str, output: Path, check: bool, section: tuple[str, str]) -> bool:
    """Put `text` between the markers `section` of a markdown file, or only compare, and say which; whether it was up to date."""
    from dpft.harness.report import write

    fresh = write(text, output, check, section)
    click.echo(f"{output} {'is up to date' if fresh else 'is stale' if check else 'was rewritten'}.", err=True)
    return fresh


data_dir_option = click.option("--data-dir", type=WHERE, envvar="DPFT_DATA", help="Local mirror of data sets.")


def spec_options(command):
    """The options that say what to run, collected into one dict `overrides`."""
    options = [
        click.option("--task", type=WORD, shell_complete=completing("tasks"), help="`dpft list tasks`."),
        click.option("--model", type=WORD, help="Packaged name, local folder or hub id."),
        click.option(
            "--method",
            callback=grid(WORD),
            shell_complete=completing("methods"),
            help="One, or several separated by commas.",
        ),
        click.option("--epsilon", callback=grid(FINITE), help="Target epsilon; several separated by commas."),
        click.option("--delta", type=FINITE, help="Default 1/(2N)."),
        click.option("--steps", type=Whole(), help="Logical steps T."),
        click.option("--batch-size", type=Whole(), help="Expected batch size."),
        click.option("--lr", callback=grid(FINITE), help="One, or several separated by commas."),
        click.option("--clip-norm", callback=grid(FINITE), help="One, or several separated by commas."),
        click.option("--seeds", "seed", callback=grid(Whole(0)), help="Seeds separated by commas."),
        click.option(
            "--set", "more", multiple=True, callback=pairs, metavar="KEY=VALUE", help="Any other setting (repeatable)."
        ),
        click.option(
            "--precision", type=click.Choice(["fp32", "bf16"]), help="Of forward and backward passes; sums are fp32."
        ),
        data_dir_option,
        click.option(
            "--results", type=WHERE, default=Path("results/runs"), show_default=True, help="Folder of records."
        ),
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
