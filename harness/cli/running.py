"""Commands that make runs or say what they will spend."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from dpft.harness.cli import contests, planning, sharing, showing
from dpft.harness.cli.helping import Grouped, completing
from dpft.harness.cli.options import FINITE, Finite, Whole, skip_damaged, spec_options
from dpft.harness.errors import BadInput


@click.command(cls=Grouped)
@click.argument("suite", required=False, shell_complete=completing("suites", "boards"))
@spec_options
@click.option("--engine", default="factored", show_default=True, help="factored, opacus or reference.")
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto takes a GPU where there is one."
)
@click.option(
    "--max-tokens", type=Whole(1, 10**9), help="Padded tokens per microbatch.  [default: 2048; on CUDA 16384]"
)
@click.option("--shard", default="1/1", metavar="I/N", help="Make every N-th run, from the I-th.")
@click.option(
    "--jobs",
    type=Whole(1, 10**4),
    help="Runs at once, on CUDA on the cards in turn.  [default: 1; on ray as many as there are GPUs, or CPUs]",
)
@click.option(
    "--ranks", type=Whole(1, 10**4), help="Processes that share each run, on CUDA with a card each.  [default: 1]"
)
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Here, or on the Ray cluster of RAY_ADDRESS.",
)
@click.option("--shard-model", is_flag=True, help="With --ranks: each holds a part of the weights that do not train.")
@click.option("--recompute", is_flag=True, help="Run blocks again in the backward pass: less memory, more time.")
@click.option("--timeout", type=Finite(0, 1e9, min_open=True), help="Seconds per run.")
@click.option(
    "--checkpoint-every",
    type=Finite(0, 1e9),
    default=300,
    show_default=True,
    help="Seconds between checkpoints of a run.",
)
@click.option("--resume/--no-resume", default=True, help="Continue a run from its checkpoint, or start it again.")
@click.option("--retry-failed", is_flag=True, help="Make runs again that ended with a failure.")
@click.option("--secure-noise", is_flag=True, help="Batches and noise from the system's entropy; not repeatable.")
@click.option("--overwrite", is_flag=True, help="Make runs again that are there already.")
@click.option("--replay", metavar="ID", help="Make run ID of --results again and compare; exit 1 when it differs.")
@click.option("--budget", metavar="TIME", help="Of a leaderboard: begin no run after this time, as 3h or 90m.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as one JSON document instead of the table.")
@skip_damaged
@sharing.among_ranks
def run(suite, overrides, data_dir, results, engine, device, max_tokens, shard_model, recompute, shard, jobs, start, executor,
        timeout, checkpoint_every, resume, retry_failed, secure_noise, overwrite, replay, budget, quiet, as_json,
        passed_over):  # fmt: skip
    """Make the missing runs of SUITE (a suite, a leaderboard, or --task/--method ...) and print the table."""
    from dpft.harness import engine as engines
    from dpft.harness.errors import unknown
    from dpft.harness.execution import cluster, launching, progress
    from dpft.harness.execution import jobs as processes
    from dpft.harness.execution import local as execution
    from dpft.harness.records.store import Store
    from dpft.harness.runs import preparation, remarks
    from dpft.harness.runs.sources import Sources
    from dpft.harness.train.settings import Settings, pick_device

    if replay is not None:
        if suite is not None or overrides:
            raise BadInput("--replay takes the run's settings from its record; leave out the suite and other settings.")
        return _replay(replay, Store(results), data_dir, progress.reporter(1, quiet), as_json)
    if engine not in engines.NAMES:
        raise unknown("engine", engine, engines.NAMES)
    store = Store(results, passed_over, showing.counted)
    settings = Settings(
        data_dir, engine, device, max_tokens, timeout, checkpoint_every, secure_noise, 1, recompute, shard_model
    )
    if contests.is_board(suite):
        if overwrite or retry_failed or as_json or shard != "1/1":
            raise BadInput(
                "A leaderboard makes what its records lack; leave out --overwrite, --retry-failed, --json and --shard."
            )
        if start:
            return launching.launch(start)
        return _board(suite, overrides, store, settings, resume, jobs, budget, quiet, executor)
    if budget is not None:
        raise BadInput("--budget is an option of leaderboards (`dpft list boards`); leave it out.")
    runs = _runs(suite, overrides, data_dir)
    store.open_for_writing()
    single = suite is None and len(runs) == 1
    seen = processes.seen(store, [spec.run_id for spec in runs])
    policy = execution.Policy(retry_failed or single, overwrite, resume, _shard(shard), seen)
    sources = Sources(data_dir)
    pending = execution.pending(execution.wanted(runs, store, policy), store, policy, sources)
    if executor == "local" and (reason := preparation.none_can_be_made(pending, data_dir)):
        raise BadInput(reason)
    if start and pending:
        return launching.launch(start)
    reporter = progress.reporter(len(pending), quiet)
    for text in remarks.of_changes(runs, store):
        reporter.note(text)
    for text in remarks.of_data(pending, sources):
        reporter.note(text, trouble=False)
    if executor == "ray":
        records = cluster.run_all(runs, store, settings, policy, reporter, jobs, _plugins(), sources)
    else:
        with processes.siblings(min(jobs or 1, max(1, len(pending))), sys.argv[1:], seen):
            settings = dataclasses.replace(settings, device=pick_device(device) if pending else "cpu")
            processes.take_card(settings.device)
            records = execution.run_all(runs, store, settings, policy, reporter, sources)
    failed = [r for r in records if r["status"] not in ("done", "skipped")]
    if as_json:
        click.echo(json.dumps([store.read(record["run_id"]) for record in records], indent=1, allow_nan=False))
    elif not (single and failed):
        from dpft.harness import report

        showing.show(list(report.Report(records, store, report.Options()).parts()))
    if failed:
        click.echo(
            f"dpft: {failed[0]['error']}" if single else f"dpft: {len(failed)} of {len(records)} runs failed.", err=True
        )
    return (2 if single else 1) if failed else 0


def _plugins() -> tuple[str, ...]:
    return click.get_current_context().find_root().params.get("plugins", ())


def _board(name, overrides, store, settings, resume, jobs, budget, quiet, executor) -> int:
    from dpft.harness.execution import cluster, local, progress
    from dpft.harness.execution import jobs as processes
    from dpft.harness.leaderboard import board, driver
    from dpft.harness.runs import preparation
    from dpft.harness.runs.sources import Sources
    from dpft.harness.train.settings import pick_device

    made, seconds = board.load(name, overrides), contests.seconds_of(budget)
    store.open_for_writing()
    policy, sources, compared = local.Policy(resume=resume), Sources(settings.data_dir), set()
    look = driver.looking(store)  # once: it serves the runs, the text and the count of failures
    processes.seen(store, [])  # a sibling leaves with its parent
    begin = time.time()
    elsewhere = executor == "ray"
    with processes.siblings(1 if elsewhere else jobs or 1, sys.argv[1:], {}, table=False):
        if not elsewhere:
            settings = dataclasses.replace(settings, device=pick_device(settings.device))
            processes.take_card(settings.device)

        def make(specs, up) -> None:
            reporter = progress.reporter(len(specs), quiet)
            if elsewhere:
                cluster.run_all(specs, store, settings, policy, reporter, jobs, _plugins(), sources, up)
            else:
                preparation.refuse(specs, settings.data_dir)
                local.run_all(specs, store, settings, policy, reporter, sources, up, compared)

        finished = contests.run(made, look, make, begin + seconds)
    if not quiet:
        click.echo(contests.text(made, look))
    if not finished:
        click.echo("dpft: the time is up; the same command goes on.", err=True)
    if failed := contests.failed(made, look):
        click.echo(f"dpft: {failed} runs failed.", err=True)
    return 1 if failed else 0


def _replay(run_id: str, store, data_dir, reporter, as_json: bool) -> int:
    from dpft.harness.records.replay import replay

    found = replay(store, run_id, data_dir, reporter)
    if as_json:
        click.echo(json.dumps({"run_id": run_id, **dataclasses.asdict(found)}, indent=1))
        return 1 if found.verdict == "different" else 0
    where = "after the last step" if found.step is None else f"step {found.step}"
    difference = f"{where}: {found.difference}."
    because = f" ({'; '.join(found.apart)})" if found.apart else ""
    if found.verdict == "equal":
        click.echo(f"{run_id}: equal bit for bit{because}.")
    elif found.verdict == "close":
        click.echo(
            f"{run_id}: equal within the tolerance for another place{because}. Bit for bit it parts at {difference}"
        )
    else:
        click.echo(f"{run_id}: different{because}. {difference[0].upper()}{difference[1:]}")
    return 1 if found.verdict == "different" else 0


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise BadInput(f"--shard {text} is not i/n; write for example --shard 1/4.") from None
    return index, count


@click.command(cls=Grouped)
@click.argument("suite", required=False, shell_complete=completing("suites", "boards"))
@spec_options
@click.option(
    "--tries", type=FINITE, metavar="MEAN", help="Also what releasing the best of a random number of tries costs."
)
@click.option("--what-if", is_flag=True, help="Instead: what more data, batch, steps or epsilon would buy in noise.")
@click.option("--samplers", is_flag=True, help="Instead: what each way to draw batches costs or buys in noise.")
@click.option("--users", is_flag=True, help="Instead: what protecting users costs, whole or by their examples.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead.")
@skip_damaged
def plan(suite, overrides, data_dir, results, tries, what_if, samplers, users, as_json, passed_over):
    """Show every run of SUITE: what it will spend, whether it is there, what it should cost, and what would stop it.

    Trains nothing and loads no weights. Exit code 2 where something would fail.
    """
    from dpft.harness.privacy.selection import check_tries
    from dpft.harness.records.store import Store
    from dpft.harness.runs.forecast import estimated, overview, stopped, table, there, to_fetch
    from dpft.harness.runs.rehearsal import rehearse

    if tries is not None:
        check_tries(tries)
    store = Store(results, passed_over, showing.counted)
    if contests.is_board(suite):
        rows = contests.plan(suite, overrides, store)
        click.echo(json.dumps(rows, indent=1) if as_json else showing.grid(rows))
        return 0
    runs = _runs(suite, overrides, data_dir)
    if what_if or samplers:
        return planning.noise(runs, "--what-if" if what_if else "--samplers", data_dir, as_json)
    if users:
        return planning.users(runs, data_dir, as_json)
    records = there(store)
    rows = overview(runs, store, records, data_dir, tries)
    pending = [spec for spec, row in zip(runs, rows, strict=True) if not row["state"].startswith(("done", "skipped"))]
    found = rehearse(pending, store, data_dir)
    problems, stopping = {}, found.by_run()
    for row in rows:
        said = dict.fromkeys([*filter(None, [row["problem"]]), *stopping.get(row["run"], ())])
        row["problem"] = " ".join(said) or None
        for sentence in said:
            problems.setdefault(sentence, []).append(row["run"])
    rows = estimated(rows, runs, records)
    if as_json:
        click.echo(json.dumps(rows, indent=1, allow_nan=False))
    else:
        click.echo(showing.grid(table(rows)))
        skips = {sentence: [spec.run_id for spec in skipped] for sentence, skipped in found.skips.items()}
        for line in (*to_fetch(found.fetches), *stopped(skips, len(rows), "be skipped"), *stopped(problems, len(rows))):
            click.echo(f"\n{line}")
    if problems:
        concerned = {run for ids in problems.values() for run in ids}
        click.echo(f"dpft: {len(concerned)} of {len(rows)} runs would fail; what stops them is in the plan.", err=True)
    return 2 if problems else 0


@click.command(cls=Grouped)
@click.argument("suite", required=False, shell_complete=completing("suites", "boards"))
@spec_options
@click.option("--dry-run", is_flag=True, help="Only say what would be fetched.")
def prepare(suite, overrides, data_dir, results, dry_run):
    """Fetch the models and data of SUITE, and tokenise them, so that everything after it runs offline."""
    from dpft.harness.runs.forecast import to_fetch
    from dpft.harness.runs.preparation import fetch, lacking, read

    runs = _runs(suite, overrides, data_dir)
    fetches = lacking(runs, data_dir)
    for line in to_fetch(fetches) or ["Nothing is to be fetched."]:
        click.echo(line)
    if dry_run:
        return
    fetch(fetches, lambda text: click.echo(text, err=True))
    read(runs, data_dir, lambda text: click.echo(text, err=True))


def _runs(suite: str | None, overrides: dict[str, Any], data_dir: Path | None):
    from dpft.harness.runs import suites

    return suites.asked(suite, overrides, data_dir, "--task and --method")
