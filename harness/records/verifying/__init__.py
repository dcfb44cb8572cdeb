"""Every record of a folder verified: whatever follows from something else in it is computed again. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpft.harness.border.documents import parsed
from dpft.harness.errors import BadInput
from dpft.harness.privacy import units
from dpft.harness.privacy.claims_alike import Claims
from dpft.harness.privacy.recompute import is_foreign
from dpft.harness.records import looks
from dpft.harness.records.damaged import Counted, PassedOver, readable
from dpft.harness.records.schema import SCHEMA, check
from dpft.harness.records.store import Store
from dpft.harness.records.verifying import asked, chains, curves, declared, known, layout, results, tails


@dataclass
class Verdict:
    """findings: what is wrong, one sentence each; notices: what a reader should know of a record that is fine, ends of a
    sentence; foreign: another program made it."""

    findings: list[str]
    notices: list[str] = field(default_factory=list)
    foreign: bool = False


def verify_folder(folder: Path, passed_over: PassedOver = None, counted: Counted = iter) -> dict[str, Verdict]:
    """The verdict on every record, by file stem. counted: as of a store.

    A file of another program needs a `privacy` section with `ledger`, `target`, `delta` and `epsilon`. Raises BadInput for a
    missing folder, a folder without records, and, unless `passed_over` is there to be told, files that are no JSON, no records at
    all or of a newer dpft.
    """
    store = Store(folder)
    ids = store.ids() if folder.is_dir() else None
    if not ids:
        what = "no results folder" if ids is None else "no record (*.json) in"
        raise BadInput(f"There is {what} {folder}; name a folder of records, or make one with `dpft run`.")
    found, twins, claims = {}, _Twins(), Claims()
    each = store.ahead.each(ids, counted, whole=True)
    for name, record in readable(each, lambda name: (name, _read(store, name)), passed_over):
        if is_foreign(record):
            found[name] = Verdict(claims.findings(record), foreign=True)
            continue
        rows, problems = _curve(store, name, record)
        verdict = found[name] = verify_run(record, rows, claims)
        verdict.findings[:0] = problems
        if record.get("run_id") != name:
            verdict.findings.append(f"The file is called {name}, but the record is of run {record.get('run_id')!r}.")
        if not verdict.findings:
            verdict.findings += twins.findings(record, rows)
    return found


def verify_run(record: dict[str, Any], rows: curves.Rows | None, claims: Claims | None = None) -> Verdict:
    """The verdict on a record of ours; rows: of its curve, None where there is none; claims: of the records before it.

    Never raises for what they hold.
    """
    try:
        return _verify(record, rows, claims or Claims())
    except Exception as problem:  # what confuses a verifier is not fine
        return Verdict([f"The record cannot be verified ({type(problem).__name__}: {problem})."])


def _verify(record: dict[str, Any], rows: curves.Rows | None, claims: Claims) -> Verdict:
    found = list(layout.findings(record))
    done = record.get("status") == "done"
    epsilon = [row.get("epsilon") for row in rows] if rows and done and record.get("privacy") is not None else None
    found += claims.findings(record, len(rows) if rows is not None and done else None, epsilon)
    if found or record["status"] not in ("done", "diverged", "timeout"):
        return Verdict(found)
    run = asked.read(record)
    verdict = Verdict([*found, *run.findings], run.notices)
    if verdict.findings or not done:
        return verdict
    verdict.findings += _private(record, run)
    if not verdict.findings:
        verdict.findings += [*known.findings(record), *results.findings(record, run)]
        verdict.findings += curves.findings(record, run, rows) if rows else ["The record has no curve beside it."]
    if not verdict.findings:
        verdict.findings += [*results.against_curve(record, run, rows), *declared.findings(record, run)]
        verdict.findings += chains.findings(record, rows)
    verdict.notices += [*chains.notices(record), *tails.notices(record)]
    return verdict


def _private(record: dict[str, Any], run: asked.Asked) -> Iterator[str]:
    if (record["privacy"] is None) != (run.spec.epsilon is None):
        has = "no privacy section" if record["privacy"] is None else "a privacy section"
        yield f"The record has {has}, but its spec has epsilon {run.spec.epsilon!r}."


def _read(store: Store, name: str) -> Any:
    """A JSON object: a record of ours, damaged or not, or of another program, with a privacy section."""
    where = store.where(name)
    text = store.text(name)
    try:
        try:
            content = parsed(text)  # three times as fast, and NaN is none for it
        except ValueError:
            content = json.loads(text)
    except (ValueError, RecursionError) as error:  # NaN is no JSON, but a finding
        raise BadInput(f"The record {where} is damaged ({error}); delete it or get it again.") from error
    if is_foreign(content) and (not isinstance(content, dict) or "privacy" not in content):
        check(content if isinstance(content, dict) and "schema" in content else None, where)
    if isinstance(content, dict) and type(content.get("schema")) is int and content["schema"] > SCHEMA:
        check(content, where)  # of a newer dpft
    return content


def _curve(store: Store, name: str, record: dict[str, Any]) -> tuple[curves.Rows | None, list[str]]:
    """(rows of a run's curve, None where it has none; what is wrong with the file). `record` gets the diagnostics beside it."""
    rows, problems = None, []
    try:
        rows = store.curve(name, whole=True).rows(named=True) if store.has_curve(name) else None
        if record.get("schema") != 1 and isinstance(record.get("diagnostics"), dict):
            record["diagnostics"] |= looks.of(rows or [], name)
    except BadInput as problem:
        problems.append(str(problem))
    if rows is None or record.get("status") != "done":
        return None, problems
    return [{key: value for key, value in row.items() if key != looks.COLUMN} for row in rows], problems


class _Twins:
    """Runs of one folder that cannot both be what they say."""

    def __init__(self) -> None:
        self._curves: dict[str, tuple[str, tuple]] = {}
        self._sizes: dict[tuple, tuple[str, int]] = {}

    def findings(self, record: dict[str, Any], rows: curves.Rows | None) -> Iterator[str]:
        """Of a record that is fine alone: another seed's or method's losses, another N of the same data."""
        if not rows or record["status"] != "done":
            return
        spec, run_id = record["spec"], record["run_id"]
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        if record["privacy"] is not None and len(losses) > 1:  # without noise, on whole batches, seeds may be alike
            key = hashlib.sha256(repr(losses).encode()).hexdigest()
            what = tuple(spec.get(name) for name in ("task", "seed", "model", "method", "batch_size"))
            other, theirs = self._curves.setdefault(key, (run_id, what))
            differ = [i for i, (a, b) in enumerate(zip(what, theirs, strict=True)) if a != b]
            # a decoder that did nothing leaves another method's curve as it is
            if differ and (differ != [3] or spec.get("decoder", "mean") == "mean"):
                yield f"The losses of its curve are those of run {other}, which is of another task, seed, model or method."
        if record["privacy"] is not None:
            privacy = record["privacy"]
            claimed, counted = privacy["num_examples"], (units.of(privacy), privacy.get("group_size"))
            options = json.dumps(spec.get("task_options"), sort_keys=True)  # who the users are
            key = (record["provenance"]["data_fingerprint"], *counted, options if units.of(privacy) == "user" else "")
            other, theirs = self._sizes.setdefault(key, (run_id, claimed))
            if theirs != claimed:
                yield f"num_examples is {claimed}, but run {other} on the same data has {theirs}."
