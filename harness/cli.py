"""The `dpft` command: parsing and printing only. Everything heavy is imported inside the commands."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import click

from dpft.harness.errors import BadInput

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def main() -> None:
    """Entry point: bad input and a full disk are one sentence and exit code 2, an interrupt is exit code 130."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BadInput as error:
        click.echo(f"dpft: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        click.echo(f"dpft: {error.strerror or error}{place}; finished runs are kept, mend it and run again.", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("dpft: interrupted; finished runs are kept, the same command continues.", err=True)
        sys.exit(130)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="dpft")
@click.option(
    "--plugin", "plugins", multiple=True, metavar="FILE", help="Python file with methods or tasks (repeatable)."
)
def cli(plugins: tuple[str, ...]) -> None:
    """Compare differentially private fine-tuning methods under one matched, PRV-accounted budget."""
    if plugins:
        from dpft.harness.registry import load_plugin

        for plugin in plugins:
            load_plugin(plugin)


def _grid(convert):
    """A callback that reads `a,b,c` as a grid axis and `a` as a value."""

    def callback(context, parameter, text):
        if text is None:
            return None
        try:
            values = [convert(part.strip()) for part in text.split(",")]
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a number or a comma-separated list of numbers.") from None
        return values if len(values) > 1 else values[0]

    return callback


def _pairs(context, parameter, items: tuple[str, ...]) -> dict[str, Any]:
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
        click.option("--method", callback=_grid(str), help="One, or several separated by commas."),
        click.option("--epsilon", callback=_grid(float), help="Target epsilon; several separated by commas."),
        click.option("--delta", type=float, help="Default 1/(2N)."),
        click.option("--steps", type=int),
        click.option("--batch-size", type=int, help="Expected batch size of Poisson sampling."),
        click.option("--lr", callback=_grid(float), help="One, or several separated by commas."),
        click.option("--clip-norm", callback=_grid(float), help="One, or several separated by commas."),
        click.option("--seeds", "seed", callback=_grid(int), help="Seeds separated by commas."),
        click.option(
            "--set", "more", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="Any other setting (repeatable)."
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


def _runs(suite: str | None, overrides: dict[str, Any]):
    from dpft.harness import spec

    if suite is not None:
        return list(spec.load_suite(suite, overrides).runs)
    if "task" not in overrides or "method" not in overrides:
        raise BadInput("Name a suite (`dpft list suites`), or give at least --task and --method.")
    return spec.expand(overrides)


@cli.command()
@click.argument("suite", required=False)
@spec_options
@click.option("--engine", default="factored", show_default=True, help="factored, opacus or reference.")
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto takes a GPU where there is one."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Padded tokens per microbatch."
)
@click.option("--shard", default="1/1", metavar="I/N", help="Make every N-th run, from the I-th.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds per run.")
@click.option(
    "--checkpoint-every", type=float, default=300, show_default=True, help="Seconds between checkpoints of a run."
)
@click.option("--resume/--no-resume", default=True, help="Continue a run from its checkpoint, or start it again.")
@click.option("--retry-failed", is_flag=True, help="Make runs again that ended with a failure.")
@click.option("--overwrite", is_flag=True, help="Make runs again that are there already.")
@click.option("--quiet", is_flag=True)
@click.option("--json", "as_json", is_flag=True, help="Print the records as one JSON document instead of the table.")
def run(suite, overrides, data_dir, results, engine, device, max_tokens, shard, timeout, checkpoint_every, resume,
        retry_failed, overwrite, quiet, as_json):  # fmt: skip
    """Make the missing runs of SUITE (or of --task/--method ...) and print the table."""
    from dpft.harness import engine as engines
    from dpft.harness import execution, progress, report
    from dpft.harness.errors import unknown
    from dpft.harness.run_settings import Settings, pick_device
    from dpft.harness.store import Store

    if engine not in engines.NAMES:
        raise unknown("engine", engine, engines.NAMES)
    runs, store = _runs(suite, overrides), Store(results)
    store.open_for_writing()
    single = suite is None and len(runs) == 1
    policy = execution.Policy(retry_failed or single, overwrite, resume, _shard(shard))
    pending = [s for s in execution.shard(runs, policy.shard) if execution.is_pending(store, s, policy)]
    settings = Settings(
        data_dir, engine, pick_device(device) if pending else "cpu", max_tokens, timeout, checkpoint_every
    )
    records = execution.run_all(runs, store, settings, policy, progress.reporter(len(pending), quiet))
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


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise BadInput(f"--shard {text} is not i/n; write for example --shard 1/4.") from None
    return index, count


@cli.command()
@click.argument("suite", required=False)
@spec_options
@click.option("--json", "as_json", is_flag=True)
def plan(suite, overrides, data_dir, results, as_json):
    """Show every run of SUITE: what it will spend, whether it is there, and what it should cost. Trains nothing."""
    from dpft.harness.planning import overview
    from dpft.harness.store import Store

    rows = overview(_runs(suite, overrides), Store(results), data_dir)
    if as_json:
        click.echo(json.dumps(rows, indent=1, allow_nan=False))
        return
    from tabulate import tabulate

    click.echo(tabulate(rows, headers="keys", tablefmt="github"))


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results/runs"))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Markdown file with markers; default: print.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when --output is not up to date.")
@click.option("--curves", is_flag=True, help="Also the metric by step.")
def report(folder, output, check, curves):
    """Print the tables of the runs in FOLDER, or put them between the markers of a markdown file."""
    from dpft.harness import report as reporting
    from dpft.harness.store import Store

    store = Store(folder)
    text = reporting.markdown(store.records(), store, curves)
    if output is None:
        if check:
            raise BadInput("--check needs a file to compare with; give it with -o.")
        click.echo(text)
        return 0
    fresh = reporting.write(text, output, check)
    click.echo(f"{output} {'is up to date' if fresh else 'is stale' if check else 'was rewritten'}.", err=True)
    return 1 if check and not fresh else 0


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results/runs"))
@click.option("--json", "as_json", is_flag=True)
def verify(folder, as_json):
    """Recompute the epsilon of every record in FOLDER from its ledger alone; exit 1 on any mismatch."""
    from dpft.harness.privacy import verify_record
    from dpft.harness.store import Store

    store, found = Store(folder), {}
    for record in store.records():
        path = store.curve_path(record["run_id"])
        taken = store.curve(record["run_id"]).height if path.exists() else None
        found[record["run_id"]] = verify_record(record, taken if record["status"] == "done" else None)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        for run_id, problems in found.items():
            click.echo(f"{run_id}: {'fine' if not problems else ' '.join(problems)}")
    return 1 if any(found.values()) else 0


@cli.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def merge(sources, target):
    """Copy the runs of the SOURCES folders into TARGET; refuses records that contradict each other."""
    from dpft.harness.store import merge as merge_folders

    copied, same = merge_folders(list(sources), target)
    click.echo(f"{copied} runs copied to {target}, {same} were there already.", err=True)


@cli.command("list")
@click.argument("kind", type=click.Choice(["methods", "tasks", "suites"]))
@click.option("--json", "as_json", is_flag=True)
def list_(kind, as_json):
    """List what there is."""
    from dpft.harness.catalogue import listing

    rows = listing(kind)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from tabulate import tabulate

    click.echo(tabulate(rows, headers="keys", tablefmt="simple"))


@cli.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True)
def describe(name, as_json):
    """Say what a method, task or suite is: reference, what it releases, defaults, runs."""
    from dpft.harness.catalogue import description

    found = description(name)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        click.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
