"""Tables in a terminal: as wide as it is. In a file or a pipe they are whole."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dpft.harness.report.text import Part, Table


def show(parts: Sequence[Part]) -> None:
    """Print a report; where a terminal is too narrow for a table its columns drop, and a line below says which."""
    from dpft.harness.report.text import markdown

    width = _width()
    click.echo(markdown(parts if width is None else [piece for part in parts for piece in fitting(part, width)]))


def grid(lines: Sequence[dict[str, Any]]) -> str:
    """Rows of figures as a table, narrowed like those of a report."""
    from tabulate import tabulate

    if (width := _width()) is None or not lines:
        return tabulate(lines, headers="keys", tablefmt="github")
    from dpft.harness.report.text import Table, markdown

    cells = [{key: "" if value is None else str(value) for key, value in line.items()} for line in lines]
    return markdown(fitting(Table(cells, names_left=True), width))


def rows(lines: Sequence[dict[str, Any]]) -> str:
    """Rows of text, the last column wrapped to the terminal."""
    from tabulate import tabulate

    if (width := _width()) is None or not lines:
        return tabulate(lines, headers="keys", tablefmt="simple")
    *others, last = lines[0]
    left = sum(max(len(key), *(len(str(line[key])) for line in lines)) + 2 for key in others)
    room = max(24, width - left - 2)
    wrapped = [{**line, last: "\n".join(textwrap.wrap(str(line[last]), room)) or ""} for line in lines]
    return tabulate(wrapped, headers="keys", tablefmt="simple")


def fitting(part: Part, width: int) -> list[Part]:
    """The part, or a narrower table and what it leaves out: columns that say the same in all rows, then those to the right."""
    from dpft.harness.report.text import Table

    if not isinstance(part, Table) or not part.cells or _wide(part) <= width:
        return [part]
    cells, said = part.cells, []
    if len(cells) > 1:
        same = {key: value for key, value in cells[0].items() if all(line[key] == value for line in cells)}
        cells = [{key: value for key, value in line.items() if key not in same} for line in cells]
        if same:
            said.append(f"In all rows: {', '.join(f'{key} {value}' for key, value in same.items())}.")
    dropped: list[str] = []
    while len(cells[0]) > 2 and _wide(Table(cells, part.names_left)) > width:
        dropped.insert(0, list(cells[0])[-1])
        cells = [{key: value for key, value in line.items() if key != dropped[0]} for line in cells]
    if dropped:
        said.append(f"Too wide for this terminal: {', '.join(dropped)}; a pipe or a file has them.")
    return [Table(cells, part.names_left), " ".join(said)]


def _wide(table: Table) -> int:
    return max(map(len, table.markdown().splitlines()))


def _width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def counted(run_ids: Sequence[str]) -> Iterator[str]:
    """The ids one by one; in a terminal, where that takes more than a second, with how many of them have been read."""
    begin, shown = time.monotonic(), False
    for number, run_id in enumerate(run_ids):
        if number % 100 == 0 and time.monotonic() - begin > 1 and sys.stderr.isatty():
            click.echo(f"\r{number:,} of {len(run_ids):,} records read", nl=False, err=True)
            shown = True
        yield run_id
    if shown:
        click.echo("\r\033[K", nl=False, err=True)
