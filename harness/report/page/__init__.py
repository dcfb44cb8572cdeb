"""One self-contained HTML file of a folder of runs: no network, works from file://, nothing in a record is ever run as code."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpft.harness.records.store import Store, atomic
from dpft.harness.report import Options
from dpft.harness.report.page.data import Builder, Prepared, packed

STYLES = ("page.css", "paper.css")
SCRIPTS = (
    "data.js",
    "address.js",
    "drawing.js",
    "answers.js",
    "scatter.js",
    "table.js",
    "csv.js",
    "chart.js",
    "matrix.js",
    "details.js",
    "main.js",
)
FOLLOWING = ' data-follow="yes"'  # the mark of a page that loads itself again while its file is rewritten


def write(
    path: Path,
    store: Store,
    records: Iterable[dict[str, Any]],
    public: bool = False,
    title: str = "dpft results",
    baseline: str | None = None,
) -> None:
    """Write the page of `records` to `path`, as a whole or not at all; the same file for the same records.

    records: read once, in order, and not kept. public: leave out diagnostics, here the training losses, alignments and
    clipped shares of curves and runs. baseline: whom verdicts are against, default dp-adam, else dp-sgd. Raises BadInput for a
    run whose curve is missing.
    """
    builder = Builder(store, Options(public=public, baseline=baseline))
    put(path, builder, map(builder.prepare, records), title)


def put(path: Path, builder: Builder, runs: Iterable[Prepared], title: str, following: bool = False) -> None:
    """Write the page of prepared runs; following: it loads itself again until `settle` is called."""
    before, after = _template(title, FOLLOWING if following else "")
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.write(before)
        for number, block in enumerate(builder.blocks(runs)):
            out.write(_data(f"block-{number}", block))
        out.write(_data("index", packed(builder.index())))
        out.write(after)


def settle(path: Path) -> None:
    """The page, if it is there, no longer loads itself again."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        with atomic(path) as temporary:
            temporary.write_text(text.replace(FOLLOWING, "", 1), encoding="utf-8")


def _data(name: str, text: str) -> str:
    return f'<script type="application/octet-stream" id="{name}">{text}</script>\n'


def _template(title: str, mark: str) -> tuple[str, str]:
    """The page before and after its data. The browser runs exactly this script: its hash is in the page's policy."""
    folder = files(__name__)

    def text(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    style, script = "\n".join(map(text, STYLES)), '"use strict";\n' + "\n".join(map(text, SCRIPTS))
    page = text("page.html").replace("{{title}}", html.escape(title)).replace("{{mark}}", mark)
    page = page.replace("{{style-hash}}", _hash(style)).replace("{{script-hash}}", _hash(script))
    before, after = page.replace("{{style}}", style).split("{{data}}")
    return before, after.replace("{{script}}", script)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
