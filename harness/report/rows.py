"""Records -> rows: one configuration with its seeds; groups of rows that may be compared; the best learning rate of each."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpft.harness.privacy import matched
from dpft.harness.report import origins
from dpft.harness.report.text import told
from dpft.harness.runs import registry

BASELINES = ("dp-sgd", "dp-adam")  # the target of steps-to-threshold is the best of these
SETTING = ("task", "task_version", "task_options", "model", "head", "max_length", "split")


@dataclass(frozen=True)
class Row:
    """One configuration: the records of its seeds.

    grid: the learning rates of which this row has the best, those at which every seed failed (`lost`) among them; chosen: the
    settings that this choice was over. failed: records of seeds that ended without a result; spare: finished seeds that the
    table does not rank on. flaws: why this row cannot be ranked, whatever the others are; lacks: which seeds it has not run.
    """

    spec: dict[str, Any]
    records: list[dict[str, Any]]
    grid: tuple[float, ...] = ()
    chosen: tuple[str, ...] = ()
    failed: tuple[dict[str, Any], ...] = ()
    spare: tuple[dict[str, Any], ...] = ()
    lost: tuple[float, ...] = ()
    flaws: tuple[str, ...] = ()
    lacks: str | None = None

    @property
    def method(self) -> str:
        return self.spec["method"]

    @property
    def private(self) -> bool:
        return self.spec["epsilon"] is not None

    @property
    def competes(self) -> bool:
        """Whether this row is of a method that competes: private, and no control. A method this dpft does not know competes."""
        known = registry.methods().get(self.method)
        return self.private and not (known is not None and known.control)

    @property
    def ranked(self) -> bool:
        """Whether this row may have a rank: it competes, all its seeds are there, and nothing is wrong with its records."""
        return self.competes and not self.flaws and self.lacks is None

    @property
    def baseline(self) -> bool:
        """Whether others are measured against this row."""
        return self.competes and self.method in BASELINES and self.spec["decoder"] == "mean"

    @property
    def whole(self) -> Row:
        """This row with all its finished seeds, those that the table does not rank on among them."""
        return replace(self, records=sorted([*self.records, *self.spare], key=_seed), spare=())

    @property
    def runs(self) -> str:
        """How many seeds finished, of how many."""
        finished = len(self.records) + len(self.spare)
        return f"{finished}/{finished + len(self.failed)}"

    @property
    def final(self) -> float:
        return statistics.mean(r["result"]["final"] for r in self.records)

    @property
    def higher_is_better(self) -> bool:
        return self.records[0]["result"]["higher_is_better"]

    @property
    def finals(self) -> dict[int, float]:
        """Seed -> final metric."""
        return {r["spec"]["seed"]: r["result"]["final"] for r in self.records}

    @property
    def peak_bytes(self) -> float:
        """Median over seeds of the peak memory."""
        return statistics.median(sum(r["cost"]["peak_bytes"].values()) for r in self.records)

    @property
    def step_s(self) -> float | None:
        """Median over seeds of the time of a step; None where runs were too short to tell."""
        return self._median_cost("step_s")

    @property
    def step_cpu_s(self) -> float | None:
        """The same in processor seconds; None where records are older than these."""
        return self._median_cost("step_cpu_s")

    def _median_cost(self, key: str) -> float | None:
        known = [value for r in self.records if (value := r["cost"].get(key)) is not None]
        return statistics.median(known) if known else None


def groups(records: list[dict[str, Any]]) -> list[list[Row]]:
    """Rows that may stand in one table: one setting, budget, stream of noise and sampler; what is not private stands in all.

    records: finished runs, and those that ended without a result, which rows count and are no rows by themselves.
    """
    cells: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        cells[json.dumps({**record["spec"], "seed": None}, sort_keys=True)].append(record)
    made = [_row(sorted(group, key=_seed)) for group in cells.values()]
    lost: dict[str, list[float]] = defaultdict(list)  # configuration -> the rates at which every seed failed
    for row in made:
        if not row.records:
            lost[_but_rate(row)].append(row.spec["lr"])
    rows = [replace(row, lost=tuple(lost[_but_rate(row)])) if lost else row for row in made if row.records]
    settings: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        settings[tuple(json.dumps(row.spec[key], sort_keys=True) for key in SETTING)].append(row)
    found = []
    for _, members in sorted(settings.items()):
        budgets = sorted({_budget(row) for row in members if row.private}) or [None]
        controls = [row for row in members if not row.private]
        found += [[row for row in members if row.private and _budget(row) == b] + controls for b in budgets]
    return found


def _seed(record: dict[str, Any]) -> int:
    return record["spec"]["seed"]


def _budget(row: Row) -> tuple[float, bool, int, str, str]:
    """Pure epsilon is another promise than that with a delta, a user's than an example's; other samplers have other batches."""
    promised = row.spec["epsilon"], row.spec.get("delta") == 0, origins.noise_stream(row.spec)
    return *promised, origins.sampler(row.spec), origins.unit(row.spec)


def _row(records: list[dict[str, Any]]) -> Row:
    done = [r for r in records if r["status"] == "done"]
    failed = tuple(r for r in records if r["status"] not in ("done", "skipped"))
    flaws = []
    if failed:
        why = ", ".join(f"seed {_seed(r)}: {r['status']}" for r in failed)
        flaws.append(f"{len(failed)} of {len(done) + len(failed)} seeds failed ({why})")
    rejected = [r for r in done if r.get("rejected")]
    if rejected:
        more = f" (and {len(rejected) - 1} more)" if len(rejected) > 1 else ""
        flaws.append(
            f"run {rejected[0]['run_id']}{more} does not verify: {told(rejected[0]['rejected'][0].rstrip('.'))}"
        )
    return Row(records[0]["spec"], done, failed=failed, flaws=tuple(flaws))


def _but_rate(row: Row) -> str:
    return json.dumps({**row.spec, "seed": None, "lr": None}, sort_keys=True)


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Best first, then competing rows that cannot be ranked, controls last."""
    sign = 1 if rows[0].higher_is_better else -1
    return sorted(rows, key=lambda row: (row.ranked, row.competes, sign * row.final), reverse=True)


def alike(rows: Sequence[Row], free: Sequence[str] = ("lr",)) -> list[list[Row]]:
    """Rows that differ in nothing but the settings `free`, together."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[json.dumps({**row.spec, "seed": None, **dict.fromkeys(free)}, sort_keys=True)].append(row)
    return list(found.values())


def finished(rows: Sequence[Row]) -> list[Row]:
    """Of rows that are alike those that may be chosen among: none that is flawed while others are not, all on one set of seeds.

    The set is that of the rows with the most seeds: a rate that has seen fewer is not finished, and one that failed on some
    is judged by the seeds that survived.
    """
    sound = [row for row in rows if not row.flaws] or list(rows)
    sets = Counter(tuple(row.finals) for row in sound)
    largest = max(sets, key=lambda seeds: (len(seeds), sets[seeds], [-seed for seed in seeds]))
    return [row for row in sound if tuple(row.finals) == largest]


def complete(rows: Sequence[Row], free: Sequence[str] = ("lr",)) -> list[list[Row]]:
    """Of every competing configuration the `finished` rows, where they have no flaws."""
    return [kept for grid in alike(rows, free) if (kept := finished(grid)) and kept[0].competes and not kept[0].flaws]


def best_rates(rows: Sequence[Row], free: Sequence[str] = ("lr",), baselines: bool = False) -> list[Row]:
    """Of rows that differ in the learning rate (or the settings `free`) alone, the one with the best mean.

    Baselines keep all theirs unless `baselines`: a method whose steps come out longer at equal lr must be compared with the
    baseline at a larger one, too.
    """
    kept = []
    for grid in alike(rows, free):
        rates = tuple(sorted({row.spec["lr"] for row in grid} | set(grid[0].lost)))
        if len(grid) == 1 or (grid[0].baseline and not baselines):
            kept += [replace(row, grid=rates if len(rates) > 1 else ()) for row in grid]
        else:
            best = ordered(finished(grid))[0]
            chosen = tuple(key for key in free if len({row.spec[key] for row in grid}) > 1)
            kept.append(replace(best, grid=rates if len(rates) > 1 else (), chosen=chosen))
    return kept


def on_equal_seeds(rows: Sequence[Row]) -> tuple[list[Row], tuple[int, ...]]:
    """(rows, seeds): ranked rows cut to the seeds that more than half of them have; those that lack one say so."""
    ranked = [row for row in rows if row.ranked]
    counts = Counter(seed for row in ranked for seed in row.finals)
    seeds = tuple(sorted(seed for seed, count in counts.items() if 2 * count > len(ranked)))
    return [on(row, seeds) if row.ranked else row for row in rows], seeds


def on(row: Row, seeds: Sequence[int]) -> Row:
    """The row on these seeds alone; where it lacks one, the row itself, which then says so."""
    theirs, kept = row.finals, set(seeds)
    missing = [seed for seed in seeds if seed not in theirs]
    if not seeds:
        return replace(row, lacks="no seed is shared by most rows")
    if missing:
        return replace(row, lacks=f"seed{'s' if len(missing) > 1 else ''} {said(missing)} not run")
    if len(row.records) == len(seeds):
        return row
    return replace(
        row,
        records=[r for r in row.records if _seed(r) in kept],
        spare=tuple(r for r in row.records if _seed(r) not in kept),
    )


def over(seeds: Sequence[int]) -> str:
    """What the ranks rest on, in one sentence."""
    return f"Ranks are over seed{'s' if len(seeds) > 1 else ''} {said(seeds)}."


def said(seeds: Sequence[int]) -> str:
    """`0 to 9`, or `0, 2, 5`."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def places(
    rows: Sequence[Row], free: Sequence[str] = (), settings: Sequence[str] = ("lr",)
) -> tuple[list[int | None], str | None]:
    """The rank of each of the `ordered` rows of one group, None where it has none, and why nothing is ranked (or None).

    Of rows that differ in `settings` alone only the best has a rank. free: keys of the privacy section that need not be the
    same in all rows.
    """
    counted = [
        (name, r)
        for name, row in zip(names(rows), rows, strict=True)
        if row.private and not row.flaws
        for r in row.records
    ]
    reason = None
    if counted:
        called, records = zip(*counted, strict=True)
        reason = matched([r["privacy"] for r in records], called, free) or origins.difference(records, called)
    competing = [row for row in rows if row.ranked]
    best = {id(grid[0]) for grid in alike(competing, settings)}
    ranks = itertools.count(1)
    return [next(ranks) if reason is None and row.ranked and id(row) in best else None for row in rows], reason


def names(rows: Sequence[Row]) -> list[str]:
    """For each row the method, with the settings that tell its rows in this table apart."""
    values: dict[str, dict[tuple[str, str], set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for kind, settings in (("spec", row.spec), ("option", row.spec["options"])):
            for key, value in settings.items():
                values[row.method][kind, key].add(repr(value))
    options = {method: {key for kind, key in found if kind == "option"} for method, found in values.items()}
    for row in rows:  # an option that a row leaves at its default is another value
        for key in options[row.method] - row.spec["options"].keys():
            values[row.method]["option", key].add("")
    return [_name(row, values[row.method]) for row in rows]


def _name(row: Row, values: dict[tuple[str, str], set[str]]) -> str:
    own = row.spec["options"]
    varying = [key for key in row.spec if key not in ("seed", "options") and len(values["spec", key]) > 1]
    varying += [key for key in own if len(values["option", key]) > 1]
    varying += [key for key in row.chosen if key not in varying]
    if not varying:
        return row.method
    return f"{row.method} ({', '.join(f'{told(key)}={told(own.get(key, row.spec.get(key)))}' for key in varying)})"


def name_of(row: Row, rows: Sequence[Row]) -> str:
    """The name of one of `rows`; `names` has all of them in one go."""
    return next(name for name, other in zip(names(rows), rows, strict=True) if other is row)
