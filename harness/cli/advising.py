"""The command that says what to run."""

from __future__ import annotations

from pathlib import Path

import click

from dpft.harness.cli.options import WHERE, Finite, Whole
from dpft.harness.errors import BadInput


@click.command()
@click.option("--task", required=True, help="What you train on, or a task of its kind.")
@click.option("--model", help="Packaged name, local folder or hub id.  [default: that of the evidence]")
@click.option("--examples", type=Whole(2, 10**12), help="Training examples.  [default: as in the evidence]")
@click.option("--epsilon", type=Finite(0, 1e6, min_open=True), default=8.0, show_default=True)
@click.option("--memory", metavar="SIZE", help="Only methods whose step fits, for example 24GiB, by `dpft memory`.")
@click.option("--board", "name", default="leaderboard", show_default=True, help="Whose records are the evidence.")
@click.option("--results", type=WHERE, default=Path("results/leaderboard"), show_default=True)
def advise(task, model, examples, epsilon, memory, name, results):
    """Say which method to run, by the nearest records of a leaderboard, and print the command to start from.

    It refuses where there are none: no advice without evidence.
    """
    from dpft.harness.leaderboard import advice, board, driver
    from dpft.harness.memory.largest import parse_size
    from dpft.harness.records.store import Store
    from dpft.harness.report import leaderboards

    made, look = board.load(name), driver.looking(Store(results))
    limit = None if memory is None else parse_size(memory)
    question = advice.Question(task, model, examples, epsilon)
    found = advice.advise(made, look, question)
    apart = f"; {', '.join(found.apart)}" if found.apart else ", just what was asked"
    click.echo(f"Nearest evidence: {found.contest.title} of {results}{apart}.")
    click.echo(leaderboards.answer(found.contest, made.rules, found.found))
    ranked = sorted(found.level, key=leaderboards.step_time)
    chosen = ranked[0] if limit is None else _fitting(ranked, question, limit, memory)
    if found.plain is not None:
        gain = chosen.mean - found.plain.mean
        click.echo(
            f"{chosen.arm.name} is {abs(gain):.3f} {'better' if gain > 0 else 'worse'} than training without privacy there."
        )
    if found.apart:
        click.echo(
            "Settings carry over only roughly: try a few learning rates around it (`dpft plan --tries` says what that costs)."
        )
    click.echo(f"\n{advice.command(chosen, question)}")
    return 0


def _fitting(ranked, question, limit: int, memory: str):
    """The first whose step on one example fits; the others are named with the reason."""
    from dpft.harness.memory.prediction import Question, predict

    for one in ranked:
        spec = one.spec
        try:
            needed = predict(
                Question(question.model or spec.model, spec.method, 1, spec.max_length, spec.precision)
            ).total
        except BadInput as reason:
            click.echo(f"{one.arm.name}: its memory cannot be predicted ({reason})", err=True)
            continue
        if needed <= limit:
            click.echo(
                f"{one.arm.name} takes {needed / 2**20:,.0f} MiB for one example of {spec.max_length} tokens: it fits."
            )
            return one
        click.echo(f"{one.arm.name} takes {needed / 2**20:,.0f} MiB for one example: more than {memory}.", err=True)
    raise BadInput(
        f"None of the methods that lead there is known to fit into {memory}; see `dpft memory --fits {memory}`."
    )
