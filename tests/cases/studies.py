"""The committed studies of results/ as loose files, for tests that change or copy some."""

import functools
import tempfile
from pathlib import Path

from dpft.harness.records.store import Store

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.parent.name for path in (ROOT / "results").glob("*/records.parquet"))
_KEPT = tempfile.TemporaryDirectory()  # as long as this process


@functools.cache
def loose(study):
    """A folder with the record and the curve of every run of results/`study`; read it only."""
    packed, folder = Store(ROOT / "results" / study), Path(_KEPT.name) / study
    folder.mkdir()
    for run_id in packed.ids():
        (folder / f"{run_id}.json").write_bytes(packed.text(run_id))
        if packed.has_curve(run_id):
            packed.curve(run_id, whole=True).write_parquet(folder / f"{run_id}.parquet")
    return folder
