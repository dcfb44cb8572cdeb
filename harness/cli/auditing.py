"""The command that audits methods."""

from __future__ import annotations

import json

import click

from dpft.harness.cli.options import WHERE, Finite, Whole, pairs, put
from dpft.harness.errors import BadInput


@click.command()
@click.argument("method", required=False)
@click.option("--epsilon", type=Finite(0, min_open=True), default=4.0, show_default=True, help="Certified.")
@click.option("--delta", type=Finite(0, 1, min_open=True, max_open=True), default=1e-5, show_default=True)
@click.option("--steps", type=Whole(2, 10**7), default=200, show_default=True)
@click.option(
    "--sampling-rate",
    type=Finite(0, 1, min_open=True),
    default=0.125,
    show_default=True,
    help="Expected batch size over canaries.",
)
@click.option("--canaries", type=Whole(24, 10**5), default=64, show_default=True, help="All examples are canaries.")
@click.option("--seed", type=Whole(0), default=0, show_default=True)
@click.option("--engine", default="factored", show_default=True, help="factored, opacus or reference.")
@click.option(
    "--set", "changes", multiple=True, callback=pairs, metavar="KEY=VALUE", help="Any setting of `dpft run --set`."
)
@click.option("--one-run", is_flag=True, help="Black box: guess from the final losses who was in the data.")
@click.option(
    "--repeat",
    type=Whole(1, 10**5),
    metavar="N",
    help="Audit METHOD,... N times each, by seeds from --seed: false alarms.",
)
@click.option("--planted", is_flag=True, help="Audit known bugs, planted in the code, and print the table.")
@click.option("--only", help="Of --planted: names of bugs, separated by commas.")
@click.option("-o", "--output", type=WHERE, help="Markdown file with markers for the table.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when --output is not up to date.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def audit(method, one_run, repeat, planted, only, output, check, quiet, as_json, **asked):
    """Attack METHOD as it really runs: a lower bound on epsilon, and checks of noise, sensitivity, sampling and leaks.

    Exit code 1 when what is seen contradicts the certificate (with --repeat: when false alarms are too many).
    """
    if planted == (method is not None):
        raise BadInput("Name one method to audit (`dpft list methods`), or give --planted for the table of bugs.")
    if (output is not None or check or only) and not planted:
        raise BadInput("-o, --check and --only belong to --planted; leave them out, or add it.")
    if repeat is not None and (planted or one_run):
        raise BadInput("--repeat repeats audits by canaries; leave out --planted and --one-run.")
    if check and output is None:
        raise BadInput("--check needs a file to compare with; give it with -o.")
    from dpft.harness import engine as engines
    from dpft.harness.audit import report
    from dpft.harness.audit.subject import Question
    from dpft.harness.errors import unknown

    if asked["engine"] not in engines.NAMES:
        raise unknown("engine", asked["engine"], engines.NAMES)
    if repeat is not None:
        return _repeated(
            Question(method="", **asked), [name.strip() for name in method.split(",")], repeat, quiet, as_json
        )
    question = Question(method=method or "dp-adam", **asked)
    progress = report.progress_line(quiet)
    if planted:
        return _planted(question, only, output, check, quiet, as_json)
    if one_run:
        from dpft.harness.audit.one_run import one_run as attack

        found = attack(question, progress)
        text = report.of_one_run(found)
    else:
        from dpft.harness.audit.audit import audit as attack

        found = attack(question, progress)
        text = report.of_audit(found)
    click.echo(json.dumps(found.to_dict(), indent=1, allow_nan=False) if as_json else text)
    return 0 if found.verdict == "consistent" else 1


def _repeated(question, methods, times, quiet, as_json):
    """How often correct methods alarm; exit code 1 when the stated level or the validity of p-values is contradicted."""
    from dpft.harness.audit import repeated, report

    for asked in repeated.questions(question, methods, 1):
        asked.spec()  # a name that is unknown is found before the first audit
    done = 0

    def progress(asked, found):
        nonlocal done
        done += 1
        if not quiet and (found.violations or done % 10 == 0 or done == times * len(methods)):
            click.echo(
                f"    {done}/{times * len(methods)}: {asked.method}, seed {asked.seed}: {found.verdict}", err=True
            )

    found = repeated.repeated(question, methods, times, progress)
    click.echo(
        json.dumps(found.to_dict(), indent=1, allow_nan=False) if as_json else report.of_repeated(found, methods)
    )
    return 0 if found.as_stated else 1


def _planted(question, only, output, check, quiet, as_json):
    """The table; exit code 1 when a bug is not caught, the honest method is accused, or the file is stale."""
    from dpft.harness import report as reporting
    from dpft.harness.audit import planted, report
    from dpft.harness.records import provenance
    from dpft.harness.train.settings import Settings

    bugs = planted.choose(only)
    if output is not None:
        reporting.write("", output, check=True, markers=report.MARKERS)  # a file without markers is found now
    rows = []
    for found in planted.audits(question, bugs):
        rows.append(found)
        if not quiet:
            click.echo(f"    {found.name}: {found.audit.verdict}", err=True)
    right = all(row.caught for row in rows)
    if as_json:
        click.echo(
            json.dumps(
                [{"bug": r.name, "caught": r.caught, **r.audit.to_dict()} for r in rows], indent=1, allow_nan=False
            )
        )
    text = report.planted([(row.about, row.audit) for row in rows], provenance.collect(Settings())["versions"])
    if output is None:
        if not as_json:
            click.echo(text)
        return 0 if right else 1
    fresh = put(text, output, check, report.MARKERS)
    return 0 if right and (fresh or not check) else 1
