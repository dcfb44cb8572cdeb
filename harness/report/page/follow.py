"""The page of a folder in which runs are being made: rewritten when records change, and loading itself again meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from dpft.harness.records.packed import RECORDS
from dpft.harness.records.store import Store
from dpft.harness.report import Options
from dpft.harness.report.page import put, settle
from dpft.harness.report.page.data import Builder, Prepared

EVERY = 2.0  # seconds between two looks at the folder; the page loads itself every 5


def follow(
    path: Path,
    store: Store,
    options: Options,
    task: str | None,
    told: Callable[[int], None],
    title: str = "dpft results",
) -> None:
    """Write the page of `store` to `path`, and again whenever a record is new, replaced or gone. Never returns.

    A record is read again only where its file has changed. task: of these runs alone; None: all. told: after each writing, how
    many runs are on the page. However it ends, the page that is left stands still. Raises BadInput for a missing folder or a
    damaged record.
    """
    seen: dict[str, tuple[tuple, Prepared]] = {}
    before: dict[str, tuple] | None = None
    try:
        while True:
            now = _stamps(store)
            if now != before:
                builder = Builder(store, options)
                changed = [run_id for run_id in now if run_id not in seen or seen[run_id][0] != now[run_id]]
                for record in store.sound(store.summary, changed):
                    seen[record["run_id"]] = (now[record["run_id"]], builder.prepare(record))
                runs = [seen[run_id][1] for run_id in sorted(now) if run_id in seen]
                put(path, builder, (r for r in runs if task in (None, r.kept["spec"]["task"])), title, following=True)
                told(len(builder.kept))
                before = now
            time.sleep(EVERY)
    finally:
        settle(path)


def _stamps(store: Store) -> dict[str, tuple]:
    """Run id -> what changes with its record; a packed one has that of its file."""
    ids = store.ids()
    packed = store.folder / RECORDS
    status = packed.stat() if packed.is_file() else None
    common = () if status is None else (status.st_ino, status.st_mtime_ns, status.st_size)
    return dict.fromkeys(ids, common) | store.stamps(ids)
