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
from dpft.harness.report.page.data import Builder, packed

SCRIPTS = ("data.js", "table.js", "chart.js", "details.js", "main.js")


def write(
    path: Path, store: Store, records: Iterable[dict[str, Any]], public: bool = False, title: str = "dpft results"
) -> None:
    """Write the page of `records` to `path`, as a whole or not at all; the same file for the same records.

    records: read once, in order, and not kept. public: leave out diagnostics, here the training losses, alignments and
    clipped shares of curves and runs. Raises BadInput for a run whose curve is missing.
    """
    before, after = _template(title)
    builder = Builder(store, public)
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.write(before)
        for number, block in enumerate(builder.blocks(records)):
            out.write(_data(f"block-{number}", block))
        out.write(_data("index", packed(builder.index())))
        out.write(after)


def _data(name: str, text: str) -> str:
    return f'<script type="application/octet-stream" id="{name}">{text}</script>\n'


def _template(title: str) -> tuple[str, str]:
    """The page before and after its data. The browser runs exactly this script: its hash is in the page's policy."""
    folder = files(__name__)

    def text(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    style, script = text("page.css"), '"use strict";\n' + "\n".join(map(text, SCRIPTS))
    page = text("page.html").replace("{{title}}", html.escape(title))
    page = page.replace("{{style-hash}}", _hash(style)).replace("{{script-hash}}", _hash(script))
    before, after = page.replace("{{style}}", style).split("{{data}}")
    return before, after.replace("{{script}}", script)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
