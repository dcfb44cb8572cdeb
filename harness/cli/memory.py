"""The command that predicts memory."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dpft.harness.cli.options import WHERE, Whole, pairs
from dpft.harness.errors import BadInput


@click.command()
@click.option("--model", default="minilm-l6", show_default=True, help="A built-in shape, short name, folder or hub id.")
@click.option(
    "--method",
    "methods",
    default="non-private,materialised,ghost,dp-adam,dp-lora,dp-grape,dp-zo,inference",
    show_default=True,
    help="Registered methods and the rows non-private, materialised, ghost, inference; several separated by commas.",
)
@click.option("--batch", type=Whole(1, 10**6), default=32, show_default=True, help="Examples at once.")
@click.option("--length", type=Whole(2, 10**6), default=128, show_default=True, help="Tokens (images have their own).")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--head", help="classes or tokens.  [default: what the architecture is for]")
@click.option(
    "--logits",
    type=click.Choice(["pieces", "whole"]),
    default="pieces",
    show_default=True,
    help="Of language models: as dpft trains them, or all at once, which materialised and ghost always have.",
)
@click.option("--set", "more", multiple=True, callback=pairs, metavar="KEY=VALUE", help="Any setting of the method.")
@click.option("--fits", metavar="SIZE", help="Also the largest batch within this memory, for example 80GiB.")
@click.option("--claims", is_flag=True, help="Instead: the claims of DP-GRAPE, tested on three models.")
@click.option("-o", "--output", type=WHERE, help="With --claims: markdown file with markers.")
@click.option("--figures", type=WHERE, help="With --claims: folder for the picture.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
def memory(model, methods, batch, length, precision, head, logits, more, fits, claims, output, figures, as_json):
    """Predict the peak memory of one training step by category, from shapes alone: no weights, no GPU, no data."""
    if claims:
        return _claims(output, figures, as_json)
    if output is not None or figures is not None:
        raise BadInput("-o and --figures go with --claims; leave them out, or add --claims.")
    from dpft.harness.memory import configs

    configs.found(model)  # before torch: whoever has no network hears of it at once
    from dpft.harness.memory.largest import largest, parse_size
    from dpft.harness.memory.prediction import Question, predict

    limit = None if fits is None else parse_size(fits)
    found = []
    for name in (part.strip() for part in methods.split(",")):
        click.echo(f"predicting {model}, {name}", err=True)
        question = Question(model, name, batch, length, precision, head, dict(more), logits)
        answer = predict(question)
        found.append(
            {
                "model": model,
                "method": name,
                "batch": batch,
                "length": length,
                "precision": precision,
                "parameters": answer.parameters,
                "trainable": answer.trainable,
                "peak_bytes": answer.peak,
                "total_bytes": answer.total,
                **({} if limit is None else {"largest_batch": largest(question, limit)[0]}),
            }
        )
    if as_json:
        click.echo(json.dumps(found, indent=1, allow_nan=False))
    else:
        click.echo(_table(found, fits))
    return 0


def _table(found: list[dict], fits: str | None) -> str:
    from tabulate import tabulate

    from dpft.harness.memory.prediction import CATEGORIES

    mib = 2**20
    used = [c for c in CATEGORIES if any(c in row["peak_bytes"] for row in found)]
    lines = [
        [
            row["method"],
            f"{row['trainable']:,}",
            f"{row['total_bytes'] / mib:,.0f}",
            *(f"{row['peak_bytes'].get(c, 0) / mib:,.0f}" for c in used),
            *([] if fits is None else [row["largest_batch"]]),
        ]
        for row in found
    ]
    headers = ["method", "trainable", "peak, MiB", *(c.replace("_", " ") for c in used)]
    headers += [] if fits is None else [f"largest batch in {fits}"]
    first = found[0]
    title = (
        f"{first['model']} ({first['parameters']:,} parameters with the head), B = {first['batch']}, "
        f"T = {first['length']}, {first['precision']}: live bytes at the peak of one step. Not counted: what an allocator "
        "loses, the CUDA context, workspaces of libraries."
    )
    return title + "\n\n" + tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _claims(output: Path | None, figures: Path | None, as_json: bool) -> int:
    from dpft.harness import report
    from dpft.harness.memory import claims
    from dpft.harness.report.figures import Figures

    markers = report.markers("memory")
    if output is not None:
        report.write("", output, check=True, markers=markers)  # a file that cannot be written is found now
    answers = claims.ask_all(claims.CASES, lambda text: click.echo(f"predicting {text}", err=True))
    if as_json:
        rows = [
            {"model": case.model, "batch": case.batch, "length": case.length, "row": row, "peak_bytes": answer.peak}
            for case, found in answers.items()
            for row, answer in found.items()
        ]
        click.echo(json.dumps(rows, indent=1, allow_nan=False))
        return 0
    picture = Figures(figures, str(figures or "results/figures")).draw(
        "memory-claims.svg", claims.bars(answers), (len(answers), 1), (8.0, 2.9 * len(answers))
    )
    text = claims.markdown(answers, picture) + "\n\n" + claims.state("roberta-large")
    if output is None:
        click.echo(text)
    else:
        report.write(text, output, check=False, markers=markers)
    return 0
