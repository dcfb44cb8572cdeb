"""dpft from Python: what the commands `run`, `plan` and `report` do, for a notebook.

Settings are those of the commands, with underscores; a list spans a grid. What is wrong raises BadInput, one sentence; a run
that fails is a row with a status and an error, like in the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars

    from dpft.harness.runs.spec import RunSpec

RUNS = "results/runs"


def run(
    suite: str | None = None,
    *,
    results: str | Path = RUNS,
    data_dir: str | Path | None = None,
    device: str = "auto",
    engine: str = "factored",
    secure_noise: bool = False,
    overwrite: bool = False,
    retry_failed: bool = False,
    plugins: Sequence[str | Path] = (),
    quiet: bool = True,
    **settings: Any,
) -> polars.DataFrame:
    """Make the missing runs of a suite, or of `task=`, `method=`, ..., and return them all, one row a run (see `records`).

    results: the folder of records; the same call again only reads them. data_dir: a local mirror of data sets. engine, device,
    secure_noise, overwrite, retry_failed: as the options of `dpft run`. plugins: files with methods or tasks of your own. quiet:
    no progress. settings: `task`, `model`, `method`, `epsilon`, `steps`, `batch_size`, `lr`, `seed` and all others.

    Raises BadInput for settings that cannot be, and CannotRun where data or a model are out of reach.
    """
    from dpft.harness import engine as engines
    from dpft.harness.errors import unknown
    from dpft.harness.execution import local, progress
    from dpft.harness.records.store import Store
    from dpft.harness.runs.sources import Sources
    from dpft.harness.train.settings import Settings, pick_device

    if engine not in engines.NAMES:
        raise unknown("engine", engine, engines.NAMES)
    runs = _runs(suite, settings, data_dir, plugins)
    store, sources = Store(Path(results)), Sources(_path(data_dir))
    store.open_for_writing()
    policy = local.Policy(retry_failed, overwrite)
    pending = local.pending(local.wanted(runs, store, policy), store, policy, sources)
    made = Settings(_path(data_dir), engine, pick_device(device) if pending else "cpu", secure_noise=secure_noise)
    found = local.run_all(runs, store, made, policy, progress.reporter(len(pending), quiet), sources)
    return _frame(found, store)


def plan(
    suite: str | None = None,
    *,
    results: str | Path = RUNS,
    data_dir: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    **settings: Any,
) -> polars.DataFrame:
    """What every run would spend, whether it is there, and what it should take: the rows of `dpft plan`. Trains nothing."""
    import polars

    from dpft.harness.records.store import Store
    from dpft.harness.runs.forecast import estimated, overview, there

    runs, store = _runs(suite, settings, data_dir, plugins), Store(Path(results))
    records = there(store)
    rows = estimated(overview(runs, store, records, _path(data_dir)), runs, records)
    flat = [{key: value for key, value in row.items() if not isinstance(value, (dict, list))} for row in rows]
    return polars.DataFrame(flat, infer_schema_length=None)


def records(folder: str | Path = RUNS) -> polars.DataFrame:
    """One row a run of `folder`: settings, budget, result, cost, steps to the threshold of its table; failed runs, too.

    The columns are those of `dpft report --csv`: run_id, status, task, method, epsilon, seed, certified_epsilon, final and more.
    """
    from dpft.harness.records.store import Store
    from dpft.harness.report.reading import summaries

    store = Store(Path(folder))
    return _frame(summaries(store), store)


def report(folder: str | Path = RUNS, *, brief: bool = False, baseline: str | None = None, curves: bool = False) -> str:
    """The tables of the runs in `folder` as markdown, as `dpft report` prints them. brief: one screen."""
    from dpft.harness.records.store import Store
    from dpft.harness.report import Options, Report, summaries
    from dpft.harness.report.text import markdown

    store = Store(Path(folder))
    made = Report(summaries(store), store, Options(curves=curves, baseline=baseline))
    return markdown(made.brief() if brief else list(made.parts()))


def _runs(suite: str | None, settings: dict[str, Any], data_dir, plugins) -> list[RunSpec]:
    from dpft.harness.runs import registry, suites

    for plugin in plugins:
        registry.load_plugin(str(plugin))
    settings = {key: list(value) if isinstance(value, (tuple, range)) else value for key, value in settings.items()}
    return suites.asked(suite, settings, _path(data_dir), "task= and method=")


def _path(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder)


def _frame(found: list[dict[str, Any]], store) -> polars.DataFrame:
    from dpft.harness.report import Options, Report

    return Report(found, store, Options()).frame()
