"""Commands that measure speed and memory."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from dpft.harness.cli.options import WHERE, Whole
from dpft.harness.errors import BadInput


@click.command()
@click.option("--model", default="minilm-l6", show_default=True, help="Packaged name, local folder or hub id.")
@click.option("--cells", help="B32T64,B64T128 (examples, tokens), or all.  [default: three small ones]")
@click.option("--engines", help="Separated by commas.  [default: all but opacus and reference]")
@click.option("--rounds", type=Whole(1, 10**4), default=3, show_default=True, help="Processes per engine and cell.")
@click.option("--steps", type=Whole(1, 10**4), help="Timed steps per process.  [default: 2, of --run 16]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--training", type=click.Choice(["full", "lora"]), default="full", show_default=True)
@click.option("--logical", type=Whole(1, 10**6), help="Examples per step, in microbatches of B; noise and update once.")
@click.option(
    "--methods",
    is_flag=False,
    flag_value="all",
    help="Rows are methods instead of engines: these, or all private ones.",
)
@click.option("--decoders", is_flag=True, help="Rows are the decoders of a DP step, against the plain one.")
@click.option("--noise", is_flag=True, help="Rows are ways to draw noise: how far each reaches, and its time.")
@click.option("--text", is_flag=True, help="Rows are padded and bucketed batches of real sentences.")
@click.option("--run", is_flag=True, help="Rows are whole runs on real sentences: plain PyTorch, dpft, Opacus.")
@click.option(
    "--task", default="sentences", show_default=True, help="Where --text and --run have their sentences from."
)
@click.option("--data-dir", type=WHERE, envvar="DPFT_DATA", help="Local mirror of data sets.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
@click.option("-o", "--output", type=WHERE, help="Markdown file with markers for the table.")
@click.pass_context
def bench(context, as_json, output, rounds, cells, **options):
    """Measure step time and peak memory of engines and peers side by side, as ratios to the non-private step."""
    from dpft.harness import report
    from dpft.harness.bench import launch, table
    from dpft.harness.bench.cells import DEFAULT_CELLS, interleave, parse_cells
    from dpft.harness.records import provenance
    from dpft.harness.train.settings import Settings

    if options.pop("noise"):
        from dpft.harness.bench import draws

        rows = draws.compare(rounds)
        click.echo(json.dumps(rows, indent=1) if as_json else draws.markdown(rows))
        return 0
    single = options["text"] or options["run"] or options["methods"] or options["decoders"]
    grid = parse_cells(cells or ("B32T64" if single else DEFAULT_CELLS))
    rows = _rows(options, context.find_root().params.get("plugins", ()))
    if output is not None:
        report.write("", output, check=True, markers=table.MARKERS)  # a file that cannot be written is found now
    records, interrupted = launch.run_all(interleave(rows, grid, rounds))
    machine = provenance.collect(Settings(device=rows[0].device))
    baseline = rows[0].row
    text = table.markdown(records, baseline, machine)
    if as_json:
        document = {
            "machine": {key: machine[key] for key in ("git", "versions", "hardware")},
            "baseline": baseline,
            "rows": [{**asdict(entry), "cell": entry.cell.name} for entry in table.aggregate(records, baseline)],
            "processes": [record.to_dict() for record in records],
            "interrupted": interrupted,
        }
        click.echo(json.dumps(document, indent=1, allow_nan=False))
    elif output is None or interrupted:
        click.echo(text)
    if interrupted:
        click.echo("dpft: interrupted; what was finished is printed.", err=True)
        return 130
    if output is not None:
        report.write(text, output, check=False, markers=table.MARKERS)
    return 0 if any(r.job.row == baseline and r.result["status"] == "done" for r in records) else 1


def _rows(options, plugins):
    """The jobs of one round of one cell, the baseline first. Raises BadInput before anything is measured."""
    from dpft.harness.bench import cells
    from dpft.harness.runs import registry
    from dpft.harness.train.settings import pick_device
    from dpft.tasks import models

    chosen = [options["engines"], options["methods"], *(options[name] or None for name in ("decoders", "text", "run"))]
    if sum(choice is not None for choice in chosen) > 1:
        raise BadInput("--engines, --methods, --decoders, --text and --run choose different rows; give one of them.")
    real = options["text"] or options["run"]
    if options["run"] and options["training"] == "lora":
        raise BadInput("--run compares full fine-tuning, which all of its rows can do; leave out --training lora.")
    engines = cells.parse_engines(options["engines"])
    models.resolve(options["model"])
    base = cells.Job(
        row=cells.BASELINE,
        engine=cells.BASELINE,
        batch_size=0,
        length=0,
        model=options["model"],
        training=options["training"],
        device=pick_device(options["device"]),
        precision=options["precision"],
        steps=options["steps"] or (16 if options["run"] else 2),
        logical=options["logical"] or (256 if real or options["decoders"] else None),
        task=options["task"] if real else None,
        data_dir=None if options["data_dir"] is None else str(options["data_dir"]),
        plugins=tuple(plugins),
    )
    if real:
        registry.task(options["task"])
        return cells.run_rows(base) if options["run"] else cells.text_rows(base)
    if options["methods"]:
        names = [name for name, method in registry.methods().items() if method.private]
        if options["methods"] != "all":
            names = [registry.method(name.strip()).name for name in options["methods"].split(",")]
        return cells.method_rows(base, names)
    if options["decoders"]:
        return cells.decoder_rows(base, list(registry.decoders()))
    return cells.engine_rows(base, engines)
