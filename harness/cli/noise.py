"""The command that compares noise mechanisms on paper: what each needs at one certified budget, what a published one leaks."""

from __future__ import annotations

import json
import math

import click

from dpft.harness.cli.options import grid
from dpft.harness.errors import BadInput


@click.command()
@click.option("--epsilon", callback=grid(float), default="0.3,3", show_default=True, help="Separated by commas.")
@click.option(
    "--dimension", callback=grid(int), default="770,22566146", show_default=True, help="Trainable parameters."
)
@click.option("--examples", type=click.IntRange(1), default=18348, show_default=True, help="N of the training set.")
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Expected batch size.")
@click.option("--steps", type=click.IntRange(1), default=4, show_default=True)
@click.option("--delta", type=float, help="Default 1/(2N).")
@click.option("--search", is_flag=True, help="The laws that the offline search certified, instead of the comparison.")
@click.option(
    "--published", metavar="LAW", help="Cost of noise with this law drawn and accounted as published for LMO-DP."
)
@click.option("--json", "as_json", is_flag=True)
def noise(epsilon, dimension, examples, batch_size, steps, delta, search, published, as_json):
    """Noise that mechanisms need at one certified budget; with --published, what a published way of drawing it leaks."""
    delta = 1 / (2 * examples) if delta is None else delta
    if batch_size > examples:
        raise BadInput(f"The batch size {batch_size} is larger than the {examples} examples; choose a smaller one.")
    if published is not None:
        rows = _published(published, batch_size / examples, steps, delta)
    else:
        budgets, sizes = (value if isinstance(value, list) else [value] for value in (epsilon, dimension))
        make = _searched if search else _compared
        rows = [row for e in budgets for row in make(e, sizes, batch_size / examples, steps, delta)]
    if as_json:
        click.echo(json.dumps([{k: _finite(v) for k, v in row.items()} for row in rows], indent=1, allow_nan=False))
        return
    from tabulate import tabulate

    cells = [
        {k: f"{v:.3f}" if isinstance(v, float) else "–" if v is None else v for k, v in row.items()} for row in rows
    ]
    click.echo(tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True))


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _compared(epsilon, sizes, q, steps, delta):
    """One row per mechanism: sigma by dimension, and its ratio to the Gaussian's."""
    from dpft.harness.privacy.calibration import PUBLISHED_LAW, Wanted, fit

    wanted = Wanted(epsilon, delta, q, steps)
    least = fit(wanted, "gaussian", "spherical", None, None).noise_multiplier
    for name, mechanism, shape, law in (
        ("gaussian", "gaussian", "spherical", None),
        ("laplace, spherical", "laplace", "spherical", None),
        ("laplace, coordinates", "laplace", "coordinates", None),
        ("plrv, searched law", "plrv", "spherical", None),
        ("lmo, searched law", "lmo", "spherical", None),
        ("lmo, published law", "lmo", "spherical", PUBLISHED_LAW),
    ):
        row = {"ε": f"{epsilon:g}", "mechanism": name}
        for size in sizes:
            sigma = fit(wanted, mechanism, shape, law, size).noise_multiplier
            row |= {f"σ, d = {size:,}": sigma, f"over Gaussian, d = {size:,}": sigma / least}
        yield row


def _searched(epsilon, sizes, q, steps, delta):
    """One row per certified law of the offline search."""
    from dpft.harness.privacy.calibration import Wanted, search

    for mechanism in ("plrv", "lmo"):
        for size in sizes:
            for law, found in search(Wanted(epsilon, delta, q, steps), mechanism, size):
                yield {
                    "ε": f"{epsilon:g}",
                    "mechanism": mechanism,
                    "d": f"{size:,}",
                    "law of u, up to scale": law,
                    "σ": found.noise_multiplier,
                }


def _published(text, q, steps, delta):
    from dpft.harness.privacy import published
    from dpft.harness.privacy.mechanisms import family_law

    try:
        law = family_law("lmo", text)
    except ValueError as problem:
        raise BadInput(f"--published cannot be used: {problem}.") from None
    if not 0 < delta < 1:
        raise BadInput(f"delta must lie between 0 and 1, not {delta}.")
    return published.study(law, published.swapped(law), q, steps, delta)
