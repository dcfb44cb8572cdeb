"""A committed run made again from its record alone, and compared with it: bit for bit where that can be, else to a tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpft.harness.errors import BadInput
from dpft.harness.execution.local import Reporter
from dpft.harness.records.store import Store
from dpft.harness.records.verifying.curves import COLUMNS
from dpft.harness.records.verifying.layout import findings
from dpft.harness.regression.golden import changes
from dpft.harness.runs import registry
from dpft.harness.runs.spec import NOISE_STREAM, RunSpec, completed
from dpft.harness.train.settings import Settings

NOISE_STREAMS = range(1, NOISE_STREAM + 1)  # versions of the noise stream that this code can draw
# Elsewhere sums are rounded differently, and training carries that on: relative to the value, and absolute near zero.
TOLERANCE = {"epsilon": 1e-4, "loss": 0.02, "metric": 0.02, "lr": 1e-9}


@dataclass(frozen=True)
class Verdict:
    """verdict: `equal` (bit for bit), `close` (within TOLERANCE) or `different`; apart: why not bit for bit, in words;
    step: the first that differs; difference: what, in words; None where nothing does."""

    verdict: str
    apart: list[str]
    step: int | None = None
    difference: str | None = None


def replay(store: Store, run_id: str, data_dir: Path | None, reporter: Reporter) -> Verdict:
    """Make run `run_id` of `store` again, in memory, and compare. Nothing is written.

    Raises BadInput where there is no such record, or the run cannot be made again: one that is not done, secure noise, another
    version of task, method or decoder, an unknown noise stream, other data or another model.
    """
    record = store.read(run_id)
    if record is None:
        raise BadInput(f"There is no record of run {run_id} in {store.folder}; name its folder with --results.")
    spec = _spec(record)
    rows = store.curve(run_id).rows(named=True)
    if lacking := [name for name in COLUMNS if any(name not in row for row in rows[:1])]:
        raise BadInput(f"The curve of run {run_id} lacks the columns {', '.join(lacking)}; see `dpft verify`.")
    settings = _settings(record, data_dir)
    _same("data", record, registry.task(spec.task)(spec.task_options).load(data_dir).fingerprint)
    from dpft.harness.train.run import execute

    with _threads(record["provenance"]["hardware"].get("threads")), reporter.run(spec) as observe:
        apart = differing(record["provenance"], settings)
        again, curve = execute(spec, settings, observe)
    if again["status"] == "diverged":
        return Verdict("different", apart, len(curve) + 1, f"the run diverged ({again['error']})")
    if again["status"] != "done":
        raise BadInput(f"Run {run_id} cannot be made again here: {again['error']}")
    _same("model", record, again["provenance"]["model_fingerprint"])
    return compare(record, rows, again, curve, apart)


def compare(
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    again: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]],
    apart: list[str],
) -> Verdict:
    """The verdict on two runs of one spec; apart: how the places they were made in differ.

    Bit for bit first. A run that is not so is `close` only where something can explain it: another platform or other code.
    """
    exact = first_difference(record, rows, again, curve, exact=True)
    if exact is None:
        return Verdict("equal", apart)
    code = [*apart, *_code(record["provenance"], again["provenance"])]
    if not code:
        return Verdict("different", apart, *exact)
    rough = first_difference(record, rows, again, curve, exact=False)
    if rough is None:
        return Verdict("close", code, *exact)
    return Verdict("different", code, *rough)


def first_difference(
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    again: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]],
    exact: bool,
) -> tuple[int | None, str] | None:
    """(step, what differs in words) of the first difference, the result's after the last step; None: nothing differs."""
    if len(rows) != len(curve):
        return min(len(rows), len(curve)) + 1, f"there are {len(curve)} steps, the record has {len(rows)}"
    for old, new in zip(rows, curve, strict=True):
        for name in old if exact else TOLERANCE:
            if not _equal(old.get(name), new.get(name), None if exact else TOLERANCE[name]):
                return new["step"], f"{name} {new.get(name)!r}, the record has {old.get(name)!r}"
    old, new = record["result"], again["result"]
    for name in [key for key in old if key in new] if exact else ["final"]:
        if not _equal(old[name], new[name], None if exact else TOLERANCE["metric"]):
            return None, f"{name} of the result is {new[name]!r}, the record has {old[name]!r}"
    chains = [one.get("chain") for one in (record, again)]
    if exact and chains[0] is not None and chains[0] != chains[1]:
        return None, f"the chain ends at {chains[1]!r}, the record has {chains[0]!r}"
    return None


def _equal(old: Any, new: Any, tolerance: float | None) -> bool:
    if old == new or tolerance is None or not all(isinstance(one, (int, float)) for one in (old, new)):
        return old == new
    return math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance / 10)


def differing(was: Mapping[str, Any], settings: Settings) -> list[str]:
    """How this platform differs from a record's, in words, in what decides how sums are rounded (as golden traces have it)."""
    from dpft.harness.records import provenance
    from dpft.harness.regression.golden import platform

    now = provenance.collect(settings)
    if settings.device != "cpu":
        return ["sums on a GPU are not made in a fixed order"]
    hardware, versions = was["hardware"], was["versions"]
    old = {"torch": versions.get("torch"), "numpy": versions.get("numpy")}
    old |= {key: hardware.get(key) for key in ("device", "cpu", "capability", "threads")}
    old |= {"ranks": was["settings"].get("ranks", 1)}
    new = {**platform(), "device": "cpu", "threads": _thread_count(), "ranks": settings.ranks}
    if old["capability"] is None:  # records older than it
        del old["capability"], new["capability"]
    new["numpy"] = now["versions"]["numpy"]
    return changes(old, new)


def _code(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How the code differs: the commit where both have one that was clean, else dpft's and transformers' versions."""
    commits = [(one.get("git") or {}) for one in (was, now)]
    if commits[0].get("sha") != commits[1].get("sha"):
        return [f"the commit is {commits[1].get('sha')}, was {commits[0].get('sha')}"]
    if any(one.get("dirty") for one in commits):
        return ["the code was changed since its commit"]
    versions = [{name: one["versions"].get(name) for name in ("dpft", "transformers", "peft")} for one in (was, now)]
    return changes(*versions)


def _spec(record: Mapping[str, Any]) -> RunSpec:
    """The spec, of a run that this code can make again."""
    run_id = record["run_id"]
    if record["status"] != "done":
        raise BadInput(f"Run {run_id} ended as {record['status']}; only a run that is done can be compared.")
    problem = next(findings(record), None)
    if problem is not None:
        raise BadInput(f"Run {run_id} cannot be made again from its record, which `dpft verify` refuses: {problem}")
    private = record["privacy"] if isinstance(record["privacy"], dict) else {}
    if record["provenance"]["settings"].get("secure_noise") or private.get("noise_seed") == "os":
        raise BadInput(f"Run {run_id} took its noise from the operating system, so nobody can make it again.")
    spec = RunSpec(**completed(record["spec"]))
    if spec.run_id != run_id:
        raise BadInput(f"The spec in the record of run {run_id} is that of run {spec.run_id}; see `dpft verify`.")
    stream = getattr(spec, "noise_stream", 1)
    if spec.epsilon is not None and stream not in NOISE_STREAMS:
        raise BadInput(
            f"Run {run_id} has noise stream {stream}, which this dpft does not draw; use the one that made it."
        )
    for kind, made in (("task", registry.task), ("method", registry.method), ("decoder", registry.decoder)):
        name, then = getattr(spec, kind), getattr(spec, f"{kind}_version")
        now = made(name).version
        if now != then:
            raise BadInput(
                f"Run {run_id} has version {then} of {kind} {name}, this dpft version {now}; use the one that made it."
            )
    return spec


def _settings(record: Mapping[str, Any], data_dir: Path | None) -> Settings:
    """As recorded, where it matters to what is computed; the recorded device where it is here, else the CPU."""
    from dpft.harness import engine
    from dpft.harness.errors import unknown
    from dpft.harness.train.settings import pick_device

    was = record["provenance"]["settings"]
    name, tokens, device = was.get("engine", "factored"), was.get("max_tokens"), str(was.get("device", "cpu"))
    if name not in engine.NAMES:
        raise unknown("engine", str(name), engine.NAMES)
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise BadInput(f"The record of run {record['run_id']} has max_tokens {tokens!r}; see `dpft verify`.")
    try:
        device = pick_device(device)
    except BadInput:
        device = "cpu"
    return Settings(data_dir, name, device, tokens)


def _same(what: str, record: Mapping[str, Any], now: str | None) -> None:
    was = record["provenance"].get(f"{what}_fingerprint")
    if was != now:
        raise BadInput(
            f"The {what} here {'are' if what == 'data' else 'is'} not what run {record['run_id']} was made with "
            f"(fingerprint {str(now)[:12]}, the record has {str(was)[:12]}); name the right --data-dir."
        )


def _thread_count() -> int:
    import torch

    return torch.get_num_threads()


@contextmanager
def _threads(count: Any) -> Iterator[None]:
    """As many threads as the run had: they decide how sums are cut."""
    import torch

    before = torch.get_num_threads()
    if type(count) is int and 1 <= count <= 1024:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
