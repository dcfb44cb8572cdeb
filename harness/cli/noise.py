"""The command that compares noise mechanisms on paper: what each needs at one certified budget, what a published one leaks."""

from __future__ import annotations

import json
import math
import sys

import click

from dpft.harness.cli.options import WHERE, Finite, Whole, grid
from dpft.harness.errors import BadInput
from dpft.harness.privacy.noise_kinds import MAX_DIMENSION
from dpft.harness.runs.spec import NOISE_STREAM


@click.command()
@click.option(
    "--epsilon",
    callback=grid(Finite(0, 1e6, min_open=True)),
    default="0.3,3",
    show_default=True,
    help="Separated by commas.",
)
@click.option(
    "--dimension",
    callback=grid(Whole(1, MAX_DIMENSION)),
    default="770,22566146",
    show_default=True,
    help="Trainable parameters.",
)
@click.option("--examples", type=Whole(1, 10**12), default=18348, show_default=True, help="N of the training set.")
@click.option("--batch-size", type=Whole(1, 10**12), default=256, show_default=True, help="Expected batch size.")
@click.option("--steps", type=Whole(1, 10**7), default=4, show_default=True)
@click.option("--delta", type=Finite(0, 1, min_open=True, max_open=True), help="Default 1/(2N).")
@click.option("--search", is_flag=True, help="The laws that the offline search certified, instead of the comparison.")
@click.option(
    "--published", metavar="LAW", help="Cost of noise with this law drawn and accounted as published for LMO-DP."
)
@click.option(
    "--tail", is_flag=True, help="Where the Gaussian draws of this machine's libraries end, and the delta it costs."
)
@click.option("--draws", type=Whole(1, 2**40), default=2**28, show_default=True, help="Of --tail, from each library.")
@click.option("-o", "--output", type=WHERE, help="Markdown file with markers for the table of --tail.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead.")
def noise(epsilon, dimension, examples, batch_size, steps, delta, search, published, tail, draws, output, as_json):
    """Noise that mechanisms need at one certified budget; with --published, what a published way of drawing it leaks."""
    delta = 1 / (2 * examples) if delta is None else delta
    if batch_size > examples:
        raise BadInput(f"The batch size {batch_size} is larger than the {examples} examples; choose a smaller one.")
    if output is not None and not tail:
        raise BadInput("-o is for the table of --tail; give both, or leave it out.")
    if tail:
        rows = _tails(epsilon, batch_size / examples, steps, delta, draws)
    elif published is not None:
        rows = _published(published, batch_size / examples, steps, delta)
    else:
        budgets, sizes = (value if isinstance(value, list) else [value] for value in (epsilon, dimension))
        make = _searched if search else _compared
        rows = [row for e in budgets for row in make(e, sizes, batch_size / examples, steps, delta)]
    if as_json:
        click.echo(json.dumps([{k: _finite(v) for k, v in row.items()} for row in rows], indent=1, allow_nan=False))
        return
    from tabulate import tabulate

    if tail:
        return _show_tails(rows, output)
    cells = [
        {k: f"{v:.3f}" if isinstance(v, float) else "–" if v is None else v for k, v in row.items()} for row in rows
    ]
    click.echo(tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True))


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _compared(epsilon, sizes, q, steps, delta):
    """One row per mechanism: sigma by dimension, and its ratio to the Gaussian's."""
    from dpft.harness.privacy.calibration import PUBLISHED_LAW, Wanted, fit

    wanted = Wanted(epsilon, delta, q, steps, NOISE_STREAM)
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
            for law, found in search(Wanted(epsilon, delta, q, steps, NOISE_STREAM), mechanism, size):
                yield {
                    "ε": f"{epsilon:g}",
                    "mechanism": mechanism,
                    "d": f"{size:,}",
                    "law of u, up to scale": law,
                    "σ": found.noise_multiplier,
                }


def _tails(epsilon, q, steps, delta, draws):
    """One row per way of drawing: where it ends, what was seen, and the least delta that this costs at each epsilon."""
    from dpft.harness.bench.draws import largest, libraries
    from dpft.harness.privacy.calibration import Wanted, fit
    from dpft.harness.privacy.tail import LEGACY_REACH, shortfall

    found = []
    budgets = epsilon if isinstance(epsilon, list) else [epsilon]
    sigmas = [
        fit(Wanted(e, delta, q, steps, NOISE_STREAM), "gaussian", "spherical", None, None).noise_multiplier
        for e in budgets
    ]
    for way in libraries():
        with click.progressbar(length=draws, label=way.name, file=sys.stderr) as bar:
            seen = largest(way, draws, bar.update)
        row = {"library": way.name, "draws by": way.how, "largest possible": way.reach, f"largest of {draws:.2g}": seen}
        for budget, sigma in zip(budgets, sigmas, strict=True):
            event = {
                "step_from": 0,
                "step_to": steps,
                "sampling_probability": q,
                "releases": [{"noise_multiplier": sigma}],
            }
            row[f"δ lost / δ, ε = {budget:g}"] = shortfall([event], way.reach, None) / delta
        found.append(row)
    end = LEGACY_REACH["cpu"]
    head = (
        f"q = {q:.4g}, {steps} steps, δ = {delta:.3g}; "
        + ", ".join(f"ε = {e:g}: σ = {s:.3f}" for e, s in zip(budgets, sigmas, strict=True))
        + f". Of {draws:.2g} true Gaussian draws {draws * math.erfc(end / math.sqrt(2)):.2g} lie beyond {end:.2f}."
    )
    return [{"head": head, **row} for row in found]


TAIL_MARKERS = ("<!-- dpft noise tail: begin -->", "<!-- dpft noise tail: end -->")


def _show_tails(rows, output):
    from importlib.metadata import version
    from importlib.util import find_spec

    from tabulate import tabulate

    from dpft.harness import report

    here = [name for name in ("torch", "opacus", "numpy", "jax") if find_spec(name)]
    packages = ", ".join(f"{name} {version(name)}" for name in here)
    cells = [
        {
            k: v if isinstance(v, str) else f"{v:.2f}" if "largest" in k else f"{v:.2g}"
            for k, v in row.items()
            if k != "head"
        }
        for row in rows
    ]
    text = (
        f"{rows[0]['head']} {packages}.\n\n{tabulate(cells, headers='keys', tablefmt='github', disable_numparse=True)}"
    )
    if output is None:
        click.echo(text)
    else:
        report.write(text, output, check=False, markers=TAIL_MARKERS)
        click.echo(f"{output} was rewritten.", err=True)


def _published(text, q, steps, delta):
    from dpft.harness.privacy import published
    from dpft.harness.privacy.noise_kinds import family_law

    try:
        law = family_law("lmo", text)
    except ValueError as problem:
        raise BadInput(f"--published cannot be used: {problem}.") from None
    if not 0 < delta < 1:
        raise BadInput(f"delta must lie between 0 and 1, not {delta}.")
    return published.study(law, published.swapped(law), q, steps, delta)
