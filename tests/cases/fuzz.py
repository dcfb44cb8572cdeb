"""`python tests/cases/fuzz.py --cases 5000 --seed 1`: bad input for every border, and a table of what went wrong."""

import faulthandler
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
from bad_input import BORDERS, World, cases, failure
from bad_input.case import LIMIT


@click.command()
@click.option("--cases", "count", default=5000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--only", type=click.Choice(list(BORDERS)), help="One border.")
@click.option("--show", default=40, show_default=True, help="Failures to print, each kind at each place once.")
def main(count: int, seed: int, only: str | None, show: int) -> None:
    """Exit code 1 when a single input ended in a traceback, a hang, an acceptance or a wrong sentence."""
    started, made, found = time.process_time(), Counter(), []
    with tempfile.TemporaryDirectory() as root:
        os.environ["DPFT_CACHE"] = f"{root}/cache"
        os.chdir(root)
        for case in cases(World(Path(root)), count, seed, (only,) if only else tuple(BORDERS)):
            made[case.border] += 1
            faulthandler.dump_traceback_later(3 * LIMIT, exit=True)  # what no signal can interrupt
            if (one := failure(case)) is not None:
                found.append(one)
        faulthandler.cancel_dump_traceback_later()
        os.chdir("/")
    kinds = ("traceback", "hang", "accepted", "sentence", "code")
    from tabulate import tabulate

    counted = Counter((one.case.border, one.kind) for one in found)
    rows = [[border, made[border], *(counted[border, kind] for kind in kinds)] for border in made]
    rows.append(["all", sum(made.values()), *(sum(counted[border, kind] for border in made) for kind in kinds)])
    click.echo(tabulate(rows, headers=("border", "cases", *kinds), tablefmt="github"))
    click.echo(f"{time.process_time() - started:.0f} s of processor time.")
    seen = {(one.kind, one.detail.split(":")[0], one.case.border): one for one in found if one.kind != "hang"}
    seen |= {(one.case.what,): one for one in found if one.kind == "hang"}
    for one in list(seen.values())[:show]:
        click.echo(f"{one.kind}: {one.case.border}: {one.case.what}\n    {one.detail}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
