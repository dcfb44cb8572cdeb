"""The regression gate: `dpft check`."""

from __future__ import annotations

import json

import click

from dpft.harness.cli.options import WHERE, Finite, Where, skip_damaged
from dpft.harness.errors import BadInput

SHARE = Finite(min=0)
SEEDS = 10  # of each configuration of a leaderboard that are blessed: two halves that can reject


@click.command()
@click.argument("folder", required=False, type=WHERE)
@click.option("--baseline", required=True, type=Where(dir_okay=False), help="The JSON file to compare with.")
@click.option("--bless", is_flag=True, help="Write the baseline from FOLDER (or the traces) instead of comparing.")
@click.option(
    "--board", help="With --bless: of this leaderboard's runs, the tests of chosen settings, ten seeds of each."
)
@click.option("--run", is_flag=True, help="Make the runs that FOLDER lacks and that are compared first.")
@click.option(
    "--golden", is_flag=True, help="Trace 20 steps of every method on a tiny CPU task instead of reading FOLDER."
)
@click.option(
    "--level",
    type=Finite(0.001, 0.5),  # tests of more than 12 seeds give no p below 1/4096
    default=0.05,
    show_default=True,
    help="Of each one-sided test.",
)
@click.option(
    "--margin",
    type=SHARE,
    default=0.05,
    show_default=True,
    help="Mean loss that is put up with, as a share of the way from chance to the best of the baseline.",
)
@click.option("--time-margin", "time", type=SHARE, help="Also gate step time: .2 puts up with 20%. Same hardware only.")
@click.option("--memory-margin", "memory", type=SHARE, help="Also gate peak memory, likewise.")
@click.option("--data-dir", type=WHERE, envvar="DPFT_DATA", help="Local mirror of data sets, to confirm.")
@click.option("--device", default="auto", show_default=True, help="Where runs that confirm a suspicion are made.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
@skip_damaged
def check(folder, baseline, bless, board, run, golden, as_json, quiet, data_dir, device, passed_over, **rule):
    """Did a change make a method worse? Compare the runs in FOLDER with a baseline, seed by seed.

    Exit code 0: no; 1: yes; 2: it cannot be told, and why. A suspicion is confirmed on seeds that the baseline keeps back:
    runs of them that FOLDER lacks are made.
    """
    if golden == (folder is not None):
        raise BadInput("Give either a results FOLDER or --golden.")
    if bless and not baseline.absolute().parent.is_dir():
        raise BadInput(f"There is no folder {baseline.parent} for the baseline; make it.")
    if board is not None and not bless or golden and board is not None:
        raise BadInput("--board says what is blessed of a results FOLDER; give it with --bless.")
    if run and (bless or golden):
        raise BadInput("--run makes what a comparison lacks; leave it out with --bless and --golden.")
    if golden:
        return _golden(baseline, bless, as_json, quiet)
    from dpft.harness.records.store import Store

    store = Store(folder, passed_over)
    if bless:
        return _bless(baseline, store, board, as_json)
    from dpft.harness.regression import gate, show
    from dpft.harness.regression.baseline import Configuration, configurations, load
    from dpft.harness.runs.spec import RunSpec

    blessed, limits = load(baseline), gate.Rule(**rule)
    make = _maker(store, data_dir, device, quiet or as_json)
    if run:
        store.open_for_writing()
    now = configurations(store.each())
    if run and (lacking := gate.lacking(blessed, now, limits)):
        make(lacking, f"making {len(lacking)} runs that {folder} lacks.")
        now = configurations(store.each())
    if not now:
        raise BadInput(f"There are no runs in {folder}; make them with `dpft run`, or here with --run.")

    def confirm(specs):
        one = RunSpec(**specs[0])
        make(specs, f"{one.method} on {one.task} seems worse; confirming on {len(specs)} more seeds.")
        return configurations(store.each())[
            Configuration({k: v for k, v in specs[0].items() if k != "seed"}, "", True).key
        ]

    outcomes = gate.check(blessed, now, limits, confirm)
    code = gate.exit_code(outcomes)
    if as_json:
        click.echo(json.dumps(show.document(outcomes, limits, code), indent=1, allow_nan=False))
    else:
        click.echo(show.markdown(outcomes, limits))
    return code


def _bless(path, store, board, as_json):
    from dpft.harness.regression.baseline import bless

    count, left_out = bless(path, store.each() if board is None else _tests(store, board))
    for line in left_out:
        click.echo(f"left out: {line}", err=True)
    click.echo(f"{count} runs were blessed into {path}.", err=True)
    if as_json:
        click.echo(json.dumps({"blessed": count, "left_out": left_out}, indent=1))


def _golden(path, bless, as_json, quiet):
    from dpft.harness.regression import golden

    def observe(method):
        if not quiet:
            click.echo(f"tracing {method}", err=True)

    if bless:
        found = golden.traces(None, observe)
        golden.bless(path, found)
        click.echo(f"{len(found)} traces were blessed into {path}.", err=True)
        if as_json:
            click.echo(json.dumps({"blessed": len(found)}))
        return 0
    verdicts = golden.check(path, observe)
    code = golden.exit_code(verdicts)
    if as_json:
        click.echo(json.dumps({"exit_code": code, "methods": [vars(one) for one in verdicts]}, indent=1))
    else:
        click.echo(golden.markdown(verdicts))
    return code


def _tests(store, name):
    """Records of a leaderboard's tests."""
    from dpft.harness.leaderboard import board, driver, state

    return [store.read(run_id) for run_id in state.tested(board.load(name), driver.looking(store), SEEDS)]


def _maker(store, data_dir, device, quiet):
    """make(specs, text): makes runs into the store, after having said `text`."""

    def make(specs, text):
        from dpft.harness.execution import local as execution
        from dpft.harness.execution import progress
        from dpft.harness.runs.registry import is_current
        from dpft.harness.runs.spec import RunSpec
        from dpft.harness.train.settings import Settings, pick_device

        runs = [RunSpec(**spec) for spec in specs]
        if aged := next((one for one in runs if not is_current(one)), None):
            raise BadInput(f"The runs of {aged.method} are of another version than this dpft has; make them again.")
        reporter = progress.reporter(len(runs), quiet)
        reporter.note(text)
        execution.run_all(runs, store, Settings(data_dir, device=pick_device(device)), execution.Policy(), reporter)

    return make
