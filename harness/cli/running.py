"""Commands that make runs or say what they will spend."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import click

from dpft.harness.cli.options import skip_damaged, spec_options
from dpft.harness.errors import BadInput


@click.command()
@click.argument("suite", required=False)
@spec_options
@click.option("--engine", default="factored", show_default=True, help="factored, opacus or reference.")
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto takes a GPU where there is one."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Padded tokens per microbatch.  [default: 2048; on CUDA 16384]"
)
@click.option("--shard", default="1/1", metavar="I/N", help="Make every N-th run, from the I-th.")
@click.option(
    "--jobs", type=click.IntRange(1), help="Runs at once.  [default: 1; on ray as many as there are GPUs, or CPUs]"
)
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Here, or on the Ray cluster of RAY_ADDRESS.",
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds per run.")
@click.option(
    "--checkpoint-every", type=float, default=300, show_default=True, help="Seconds between checkpoints of a run."
)
@click.option("--resume/--no-resume", default=True, help="Continue a run from its checkpoint, or start it again.")
@click.option("--retry-failed", is_flag=True, help="Make runs again that ended with a failure.")
@click.option("--secure-noise", is_flag=True, help="Batches and noise from the system's entropy; not repeatable.")
@click.option("--overwrite", is_flag=True, help="Make runs again that are there already.")
@click.option("--replay", metavar="ID", help="Make run ID of --results again and compare; exit 1 when it differs.")
@click.option("--quiet", is_flag=True)
@click.option("--json", "as_json", is_flag=True, help="Print the records as one JSON document instead of the table.")
@skip_damaged
def run(suite, overrides, data_dir, results, engine, device, max_tokens, shard, jobs, executor, timeout,
        checkpoint_every, resume, retry_failed, secure_noise, overwrite, replay, quiet, as_json, passed_over):  # fmt: skip
    """Make the missing runs of SUITE (or of --task/--method ...) and print the table."""
    from dpft.harness import engine as engines
    from dpft.harness import report
    from dpft.harness.errors import unknown
    from dpft.harness.execution import cluster, progress
    from dpft.harness.execution import jobs as processes
    from dpft.harness.execution import local as execution
    from dpft.harness.records.store import Store
    from dpft.harness.runs.sources import Sources
    from dpft.harness.train.settings import Settings, pick_device

    if replay is not None:
        if suite is not None or overrides:
            raise BadInput("--replay takes the run's settings from its record; leave out the suite and other settings.")
        return _replay(replay, Store(results), data_dir, progress.reporter(1, quiet), as_json)
    if engine not in engines.NAMES:
        raise unknown("engine", engine, engines.NAMES)
    runs, store = _runs(suite, overrides), Store(results, passed_over)
    store.open_for_writing()
    single = suite is None and len(runs) == 1
    seen = processes.seen(store, [spec.run_id for spec in runs])
    policy = execution.Policy(retry_failed or single, overwrite, resume, _shard(shard), seen)
    sources = Sources(data_dir)
    pending = execution.pending(execution.wanted(runs, store, policy), store, policy, sources)
    settings = Settings(data_dir, engine, device, max_tokens, timeout, checkpoint_every, secure_noise)
    reporter = progress.reporter(len(pending), quiet)
    if executor == "ray":
        plugins = click.get_current_context().find_root().params.get("plugins", ())
        records = cluster.run_all(runs, store, settings, policy, reporter, jobs, plugins, sources)
    else:
        with processes.siblings(min(jobs or 1, max(1, len(pending))), sys.argv[1:], seen):
            settings = dataclasses.replace(settings, device=pick_device(device) if pending else "cpu")
            records = execution.run_all(runs, store, settings, policy, reporter, sources)
    failed = [r for r in records if r["status"] not in ("done", "skipped")]
    if as_json:
        click.echo(json.dumps(records, indent=1, allow_nan=False))
    elif not (single and failed):
        click.echo(report.markdown(records, store))
    if failed:
        click.echo(
            f"dpft: {failed[0]['error']}" if single else f"dpft: {len(failed)} of {len(records)} runs failed.", err=True
        )
    return (2 if single else 1) if failed else 0


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


@click.command()
@click.argument("suite", required=False)
@spec_options
@click.option(
    "--tries", type=float, metavar="MEAN", help="Also what releasing the best of a random number of tries costs."
)
@click.option("--json", "as_json", is_flag=True)
@skip_damaged
def plan(suite, overrides, data_dir, results, tries, as_json, passed_over):
    """Show every run of SUITE: what it will spend, whether it is there, what it should cost, and what would stop it.

    Trains nothing and loads no weights. Exit code 2 where something would fail.
    """
    from dpft.harness.privacy.selection import check_tries
    from dpft.harness.records.store import Store
    from dpft.harness.runs.forecast import overview, stopped, table, to_fetch
    from dpft.harness.runs.rehearsal import rehearse

    if tries is not None:
        check_tries(tries)
    runs, store = _runs(suite, overrides), Store(results, passed_over)
    rows = overview(runs, store, data_dir, tries)
    pending = [spec for spec, row in zip(runs, rows, strict=True) if not row["state"].startswith(("done", "skipped"))]
    found = rehearse(pending, store, data_dir)
    problems: dict[str, list[str]] = {}
    for spec, row in zip(runs, rows, strict=True):
        said = dict.fromkeys([*filter(None, [row["problem"]]), *found.of(spec)])
        row["problem"] = " ".join(said) or None
        for sentence in said:
            problems.setdefault(sentence, []).append(row["run"])
    if as_json:
        click.echo(json.dumps(rows, indent=1, allow_nan=False))
    else:
        from tabulate import tabulate

        click.echo(tabulate(table(rows), headers="keys", tablefmt="github"))
        for line in (*to_fetch(found.fetches), *stopped(problems, len(rows))):
            click.echo(f"\n{line}")
    return 2 if problems else 0


@click.command()
@click.argument("suite", required=False)
@spec_options
@click.option("--dry-run", is_flag=True, help="Only say what would be fetched.")
def prepare(suite, overrides, data_dir, results, dry_run):
    """Fetch the models and data of SUITE, and tokenise them, so that everything after it runs offline."""
    from dpft.harness.runs.forecast import to_fetch
    from dpft.harness.runs.preparation import fetch, lacking, read

    runs = _runs(suite, overrides)
    fetches = lacking(runs, data_dir)
    for line in to_fetch(fetches) or ["Nothing is to be fetched."]:
        click.echo(line)
    if dry_run:
        return
    fetch(fetches, lambda text: click.echo(text, err=True))
    read(runs, data_dir, lambda text: click.echo(text, err=True))


def _runs(suite: str | None, overrides: dict[str, Any]):
    from dpft.harness.runs import suites

    if suite is not None:
        return list(suites.load_suite(suite, overrides).runs)
    if "task" not in overrides or "method" not in overrides:
        raise BadInput("Name a suite (`dpft list suites`), or give at least --task and --method.")
    return suites.expand(overrides)
