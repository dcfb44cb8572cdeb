"""Commands about finished runs."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NoReturn

import click

from dpft.harness.cli import showing
from dpft.harness.cli.options import WHERE, Finite, Where, put, skip_damaged
from dpft.harness.errors import BadInput

VIEWS = ("budget-steps", "budget", "compute", "time", "memory")
FILE = Where(dir_okay=False)


@click.command()
@click.argument("folder", type=WHERE, default=Path("results/runs"))
@click.option("-o", "--output", type=WHERE, help="Markdown file with markers; default: print.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when --output is not up to date.")
@click.option("--task", help="Only runs of this task.")
@click.option("--curves", is_flag=True, help="Also the metric by step.")
@click.option("--all-lr", is_flag=True, help="Every learning rate of a grid, not only the best of each method.")
@click.option("--view", type=click.Choice(VIEWS), default=VIEWS[0], show_default=True, help="What is held equal.")
@click.option(
    "--memory-cap", type=Finite(0, min_open=True), metavar="MIB", help="Peak memory that --view memory admits."
)
@click.option("--baseline", metavar="METHOD", help="What others are compared with; default: dp-adam, else dp-sgd.")
@click.option("--figures", type=WHERE, help="Folder for pictures (SVG); they are linked in the text.")
@click.option("--latex", type=FILE, help="Also write the tables to this LaTeX file.")
@click.option("--csv", type=FILE, help="Also write one line per run to this CSV file.")
@click.option("--public", is_flag=True, help="Leave out diagnostics: they come from clean gradients.")
@click.option(
    "--theory", is_flag=True, help="Only what random matrix theory predicts of spectra, beside what was seen."
)
@click.option("--brief", "only", flag_value="brief", help="Only one screen: six columns, all budgets in one table.")
@click.option("--methods", "only", flag_value="overview", help="Only one line a method: what it asks, costs, claims.")
@click.option("--predictions", "only", flag_value="predictions", help="Only what was predicted of these runs.")
@click.option(
    "--board",
    metavar="NAME",
    help="Only the verdicts of this leaderboard (`dpft list boards`); with --brief a sentence each.",
)
@click.option("--html", type=FILE, help="Also write one self-contained page of all runs.")
@click.option("--watch", is_flag=True, help="Rewrite the page of --html while runs are made, until Ctrl-C.")
@click.option("--section", help="Name in the markers, where a file has several: <!-- dpft report NAME: begin -->.")
@skip_damaged
def report(
    folder, output, check, task, figures, latex, csv, theory, only, board, html, watch, section, passed_over, **options
):
    """Print the tables of the runs in FOLDER, or put them between the markers of a markdown file."""
    from dpft.harness import report as reporting
    from dpft.harness.records.store import Store
    from dpft.harness.report.text import markdown

    if check and output is None:
        raise BadInput("--check needs a file to compare with; give it with -o.")
    if theory + (only is not None and (board is None or only != "brief")) + (board is not None) > 1:
        raise BadInput(
            "--theory, --brief, --methods, --predictions and --board are reports of their own; leave out all but one "
            "(--board and --brief go together)."
        )
    if watch and (html is None or any((output, figures, latex, csv, theory, only, board))):
        raise BadInput("--watch keeps one page fresh and makes nothing else; give it --html FILE, and no other report.")
    store, pictures = Store(folder, passed_over, showing.counted), None
    read = functools.cache(lambda: _of(task, reporting.summaries(store)))
    if html is not None:
        from dpft.harness.report import page

        if task is not None and not watch:
            read()
        if watch:
            _follow(html, store, reporting.Options(public=options["public"], baseline=options["baseline"]), task)
        records = (
            record for record in store.sound(store.summary, curves=True) if task in (None, record["spec"]["task"])
        )
        page.write(html, store, records, options["public"], baseline=options["baseline"])
        click.echo(f"{html} was written.", err=True)
        if output is None:
            return 0
    if figures is not None:
        link = os.path.relpath(figures, output.parent if output else ".")
        pictures = reporting.Figures(None if check else figures, Path(link).as_posix())
    if board is not None:
        from dpft.harness.leaderboard import board as boards
        from dpft.harness.leaderboard import driver
        from dpft.harness.report import leaderboards as verdicts

        made = boards.load(board), driver.looking(store)
        parts = verdicts.parts(*made) if only is None else verdicts.answers(*made, pictures)
    elif theory:
        if options["public"] or csv is not None:
            raise BadInput(
                "The theory section is made of diagnostics alone; leave out --public and --csv, or --theory."
            )
        parts = reporting.theory(store, pictures)
    else:
        view = reporting.View(options["view"], options["memory_cap"])
        chosen = reporting.Options(options["curves"], options["all_lr"], options["public"], view, options["baseline"])
        made = reporting.Report(read(), store, chosen)
        drawing = {None: made.parts, "brief": made.brief}
        parts = list(drawing[only](pictures)) if only in drawing else getattr(made, only)()
        if csv is not None and not check:
            made.csv(csv)
            click.echo(f"{csv} was written.", err=True)
    if latex is not None and not check:
        with reporting.atomic(latex) as temporary:
            temporary.write_text(reporting.latex(parts), encoding="utf-8")
        click.echo(f"{latex} was written.", err=True)
    if output is None:
        showing.show(parts)
        return 0
    fresh = put(markdown(parts), output, check, reporting.markers(section))
    return 1 if check and not fresh else 0


def _follow(html: Path, store, options, task: str | None) -> NoReturn:
    from dpft.harness.report.page.follow import follow

    follow(html, store, options, task, lambda runs: click.echo(f"{html}: {runs:,} runs; Ctrl-C ends.", err=True))


def _of(task: str | None, records: list[dict]) -> list[dict]:
    """The records of one task, or all."""
    from dpft.harness.errors import unknown

    known = {record["spec"]["task"] for record in records}
    if task is not None and task not in known:
        raise unknown("task among these runs", task, known)
    return [record for record in records if task in (None, record["spec"]["task"])]


@click.command()
@click.argument("folder", type=WHERE, default=Path("results/runs"))
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead.")
@skip_damaged
def verify(folder, as_json, passed_over):
    """Recompute whatever follows from something else in every record of FOLDER; exit 1 on any mismatch.

    Epsilon follows from the ledger alone; curve, result and chain from the run's settings and each other.
    Records of other programs need privacy.ledger, target, delta and epsilon; only what they declare is checked.
    """
    from dpft.harness.records.verifying import verify_folder

    found = verify_folder(folder, passed_over, showing.counted)
    wrong = sum(bool(one.findings) for one in found.values())
    if as_json:
        click.echo(json.dumps({name: one.findings for name, one in found.items()}, indent=1))
    else:
        for name, one in found.items():
            fine = "fine (of another program: its ledger gives its epsilon)" if one.foreign else "fine"
            noted = f"; {'; '.join(one.notices)}" if one.notices else ""
            click.echo(f"{name}: {' '.join(one.findings) if one.findings else fine + noted}")
        old = sum(any("stream 1" in notice for notice in one.notices) for one in found.values())
        told = f"; noise of stream 1, whose tail ends early: {old}" if old else ""
        click.echo(f"records: {len(found)}; with something wrong: {wrong}{told}.", err=True)
    return 1 if wrong else 0


@click.command()
@click.argument("sources", nargs=-1, required=True, type=WHERE)
@click.argument("target", type=WHERE)
@skip_damaged
def merge(sources, target, passed_over):
    """Copy the runs of the SOURCES folders into TARGET; refuses records that contradict each other.

    A run that failed (oom, timeout, error) gives way to the same run that did not.
    """
    from dpft.harness.records.merging import merge as merge_folders

    done = merge_folders(list(sources), target, passed_over)
    for note in done.notes:
        click.echo(note, err=True)
    click.echo(f"{done.copied} runs copied to {target}, {done.same} were there already.", err=True)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=Where(file_okay=False))
def pack(folders):
    """Put all runs of each of FOLDERS into its records.parquet and curves.parquet, a tenth of the size or less.

    All commands read them like the loose files, which are removed; new runs are loose until it is packed again.
    """
    from dpft.harness.records.packing import pack as pack_folder

    for folder in folders:
        runs, before, after = pack_folder(folder)
        click.echo(f"{folder}: {runs} runs, {before / 1e6:.2f} MB before, {after / 1e6:.2f} MB now.", err=True)


@click.command()
@click.argument("run_id")
@click.option("--results", type=WHERE, default=Path("results/runs"), show_default=True, help="Folder of records.")
@click.option("-o", "--output", type=FILE, required=True, help="Picture to write (SVG).")
def trip(run_id, results, output):
    """Draw the trip of a batch through finished run RUN_ID, with its numbers: who sees examples, and what crosses."""
    from dpft.harness.records.store import Store, atomic
    from dpft.harness.report.trip import picture

    store = Store(results)
    record = store.read(run_id)
    if record is None:
        raise BadInput(f"{results} holds no run {run_id[:40]}; `dpft report {results} --csv runs.csv` lists the ids.")
    with atomic(output) as temporary:
        temporary.write_text(picture(record), encoding="utf-8")
    click.echo(f"{output} was written.", err=True)
