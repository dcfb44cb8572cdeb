"""What a gate compares with: baseline files, and the configurations that a folder of records holds. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dpft.harness.border.documents import Misfit, fitted, parsed, sentence
from dpft.harness.border.files import content, shown_path
from dpft.harness.border.values import Amount, Count, Digits, Number, Plain, Step, shown
from dpft.harness.errors import BadInput
from dpft.harness.records.schema import fitted_spec
from dpft.harness.records.store import atomic
from dpft.harness.runs.spec import completed

SCHEMA = 1
PACKAGES = ("torch", "transformers", "peft", "numpy", "evaluate")  # those that can change what a run comes to
SETTINGS = ("engine", "max_tokens")  # part of the hardware id: they change time and memory, not the result
HINT = {"golden": "give it with --golden", "quality": "give it without --golden"}


@dataclass(frozen=True)
class Run:
    """One finished run.

    final: the metric on the whole validation split; steps_to_threshold: None when not reached, or when that is not known;
    censored: whether it is known not to be reached (None: not known, as by rule 1 of harness/statistics/thresholds.py,
    which cannot tell the two apart); step_s: median seconds of a step, None where too few were timed; peak_bytes;
    made_with: versions of the key packages and fingerprints of data and model; hardware: machine and settings, which only
    time and memory depend on.
    """

    final: float
    steps_to_threshold: int | None
    step_s: float | None
    peak_bytes: int
    made_with: dict[str, Any]
    hardware: dict[str, Any]
    censored: bool | None = None


class BlessedRun(msgspec.Struct, forbid_unknown_fields=True):
    """A run as a baseline file has it; environment: its place in the file's list."""

    final: Number
    steps_to_threshold: Step | None
    step_s: Amount | None
    peak_bytes: Count
    environment: int
    censored: bool | None = None


class Environment(msgspec.Struct, forbid_unknown_fields=True):
    made_with: dict[str, str | None]
    hardware: dict[str, Any]


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    spec: dict[str, Any]
    metric: Plain
    higher_is_better: bool
    runs: Annotated[dict[Digits, BlessedRun], msgspec.Meta(min_length=1)]
    chance: Number | None = None


class Blessed(msgspec.Struct):
    """A whole baseline file of the quality of runs."""

    environments: list[Environment]
    configurations: Annotated[list[Entry], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class Configuration:
    """One spec without its seed, its runs by seed, and by seed why others have no result.

    chance: the metric of an uninformed model; None in baselines that are older than it.
    """

    spec: dict[str, Any]
    metric: str
    higher_is_better: bool
    runs: dict[int, Run] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    chance: float | None = None

    @property
    def key(self) -> str:
        return json.dumps(self.spec, sort_keys=True)


def configurations(records: Iterable[dict[str, Any]]) -> dict[str, Configuration]:
    """The configurations of `records` by key. Skipped runs are left out; failed ones keep their reason."""
    found: dict[str, Configuration] = {}
    for record in records:
        if record["status"] == "skipped":
            continue
        spec = completed(record["spec"])
        seed, result = spec.pop("seed"), record["result"]
        metric, higher = (result["metric"], result["higher_is_better"]) if result else ("", True)
        chance = result["chance"] if result else None
        new = Configuration(spec, metric, higher, chance=chance)
        one = found.get(new.key)
        if one is None or (result and not one.metric):
            known = (one.runs, one.failed) if one else ({}, {})
            one = found[new.key] = Configuration(spec, metric, higher, *known, chance)
        if result is None:
            one.failed[seed] = f"{record['status']}: {record['error']}"
        else:
            one.runs[seed] = _run(record)
    return found


def _run(record: dict[str, Any]) -> Run:
    source = record["provenance"]
    ranks = source["settings"].get("ranks", 1)  # older records have one, and do not say so
    return Run(
        final=record["result"]["final"],
        steps_to_threshold=record["result"]["steps_to_threshold"],
        step_s=record["cost"]["step_s"],
        peak_bytes=sum(record["cost"]["peak_bytes"].values()),
        made_with={
            **{name: source["versions"].get(name) for name in PACKAGES},
            **{key: source[key] for key in ("data_fingerprint", "model_fingerprint")},
        },
        censored=_censored(record["result"]),
        hardware={
            **source["hardware"],
            **{key: source["settings"].get(key) for key in SETTINGS},
            **({} if ranks == 1 else {"ranks": ranks}),
            **{how: True for how in ("recompute", "shard_model") if source["settings"].get(how)},
        },
    )


def _censored(result: dict[str, Any]) -> bool | None:
    """Whether a run is known not to have reached the task's threshold; None where its rule could not tell."""
    if result["steps_to_threshold"] is not None:
        return False
    return True if result.get("threshold_rule", 1) >= 2 and result["censored"] else None


def bless(path: Path, records: Iterable[dict[str, Any]]) -> tuple[int, list[str]]:
    """Write the finished runs of `records` to `path`; returns (how many runs, which had no result and were left out).

    Raises BadInput when none is finished.
    """
    environments: list[dict[str, Any]] = []
    entries, left_out = [], []
    for one in configurations(records).values():
        left_out += [
            f"{one.spec['task']}/{one.spec['method']} seed {s}: {why}" for s, why in sorted(one.failed.items())
        ]
        runs = {}
        for seed, run in sorted(one.runs.items()):
            environment = {"made_with": run.made_with, "hardware": run.hardware}
            if environment not in environments:
                environments.append(environment)
            numbers = {k: v for k, v in vars(run).items() if k not in environment}
            runs[str(seed)] = {**numbers, "environment": environments.index(environment)}
        if runs:
            entries.append(
                {
                    "spec": one.spec,
                    "metric": one.metric,
                    "higher_is_better": one.higher_is_better,
                    "chance": one.chance,
                    "runs": runs,
                }
            )
    if not entries:
        raise BadInput("There is no finished run to bless; make some with `dpft run`.")
    write(path, "quality", {"environments": environments, "configurations": entries})
    return sum(len(entry["runs"]) for entry in entries), left_out


def load(path: Path) -> dict[str, Configuration]:
    """The configurations that were blessed into `path`. Raises BadInput when it is missing, damaged or of another kind."""
    document = read(path, "quality")
    try:
        blessed = fitted(document, Blessed)
        found = [
            _configuration(entry, blessed.environments, f"configurations[{i}]")
            for i, entry in enumerate(blessed.configurations)
        ]
    except Misfit as problem:
        raise damaged(path, sentence(problem)) from None
    return {one.key: one for one in found}


def _configuration(entry: Entry, environments: list[Environment], where: str) -> Configuration:
    runs = {}
    for seed, run in entry.runs.items():
        if not 0 <= run.environment < len(environments):
            raise Misfit(f"{where}.runs.{seed}.environment", f"is {run.environment}, and there are {len(environments)}")
        numbers = {key: getattr(run, key) for key in run.__struct_fields__ if key != "environment"}
        runs[int(seed)] = Run(**numbers, **msgspec.structs.asdict(environments[run.environment]))
    spec = completed({**entry.spec, "seed": 0})
    fitted_spec(spec, f"{where}.spec")
    del spec["seed"]
    return Configuration(spec, entry.metric, entry.higher_is_better, runs, chance=entry.chance)


def write(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Replace `path` by a baseline file of `kind`."""
    text = json.dumps({"schema": SCHEMA, "kind": kind, **content}, indent=1, allow_nan=False, ensure_ascii=False)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read(path: Path, kind: str) -> dict[str, Any]:
    """The baseline file at `path`. Raises BadInput unless it is one of `kind` and of this schema."""
    try:
        document = parsed(content(path, "The baseline", "make it with --bless"))
    except ValueError as error:
        raise damaged(path, str(error)) from None
    if not isinstance(document, dict) or document.get("kind") not in tuple(HINT):
        raise BadInput(f"The file {shown_path(path)} is no baseline of dpft check; make one with --bless.")
    if document.get("schema") != SCHEMA:
        raise BadInput(
            f"The baseline {shown_path(path)} has schema {shown(document.get('schema'))}, not {SCHEMA}; bless it anew."
        )
    if document["kind"] != kind:
        raise BadInput(f"The baseline {shown_path(path)} is a {document['kind']} one; {HINT[document['kind']]}.")
    return document


def damaged(path: Path, why: str) -> BadInput:
    """The error for a baseline that cannot be understood."""
    return BadInput(f"The baseline {shown_path(path)} is damaged ({why}); restore it or bless it anew.")
