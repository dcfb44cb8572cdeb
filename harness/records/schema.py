"""What a record holds, section by section, as types: whoever reads one may rely on these, whatever program or hand wrote it.

Entries that a newer dpft adds are let pass. `dpft verify` reads for itself, and says more of what does not hold together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from dpft.harness.border.documents import Misfit, fitted, sentence
from dpft.harness.border.values import Amount, Count, Line, Number, Plain, Step, Text, shown
from dpft.harness.errors import BadInput
from dpft.harness.runs.spec import RunSpec, completed, types

SCHEMA = 2
READ = (1, SCHEMA)  # 1 has in itself what 2 has beside its curve (looks.py)
STATUSES = ("done", "diverged", "oom", "timeout", "error", "skipped")
SECTIONS = ("schema", "run_id", "status", "spec", "privacy", "result", "cost", "diagnostics", "provenance", "error")
Values = Annotated[list[Number], msgspec.Meta(min_length=1)]


class Sample(msgspec.Struct):
    """A text that was generated."""

    prompt: str
    output: str
    reference: str = ""


class Result(msgspec.Struct):
    """Of a run that is done; steps_to_threshold: null where it was not reached."""

    metric: Plain
    higher_is_better: bool
    chance: Number
    final: Number
    all_metrics: dict[str, Number]
    best_step: Step
    threshold: Number
    steps_to_threshold: Step | None
    censored: bool
    threshold_rule: Step = 1
    chance_is: Plain = ""
    definitions: dict[Plain, Line] = {}
    samples: dict[str, list[Sample]] = {}


class Cost(msgspec.Struct):
    """Seconds, bytes and counts of any run; null where it ended too early to say."""

    total_s: Amount
    train_s: Amount
    eval_s: Amount
    step_s: Amount | None
    phase_s: dict[str, Amount]
    peak_bytes: dict[Plain, Count]
    example_gradients: Count
    trainable_parameters: Count | None
    step_cpu_s: Amount | None = None


class FullCost(Cost):
    trainable_parameters: Count


class Alignment(msgspec.Struct):
    noisy: Number | None
    decoded: Number | None
    snr: Number | None = None


class Diagnostics(msgspec.Struct):
    """What every table needs of them."""

    alignment: Alignment
    clipped_fraction: Number | None


class Predicted(msgspec.Struct):
    spikes: Count | None
    first: Number | None
    cosine_noisy: Number | None
    cosine_decoded: Number | None


class Matrix(msgspec.Struct):
    """Singular values of a release, of the clean sum and of what was decoded, and the standard deviation of the noise."""

    shape: tuple[Step, Step]
    noise_std: Annotated[float, msgspec.Meta(gt=0, le=1e300)]
    clean: Values
    noisy: Values
    predicted: Predicted
    decoded: list[Number] | None = None


class Spectrum(msgspec.Struct):
    step: Step
    matrices: dict[str, Matrix]


class Bulk(Diagnostics):
    """All that is looked at by matrix and step; each row has `step` beside the names of parameters."""

    alignment_by_parameter: list[dict[str, Alignment | int]] = []
    decoder_by_parameter: list[dict[str, dict[str, Any] | int]] = []
    spectra: list[Spectrum] = []


class Hardware(msgspec.Struct):
    device: Text
    cpu: str
    threads: Count
    gpu: str | None = None


class Provenance(msgspec.Struct):
    """Where a run was made, and of what; fingerprints are null where it ended before it had read them."""

    versions: dict[str, str | None]
    hardware: Hardware
    settings: dict[str, Any]
    data_fingerprint: str | None
    model_fingerprint: str | None
    model_files: str | None = None


class Record(msgspec.Struct):
    """A run that ended without a result, and what all have. Whether a budget holds, `harness/privacy` says."""

    schema: int
    run_id: str
    status: Literal[STATUSES]
    spec: dict[str, Any]
    privacy: dict[str, Any] | None
    result: Result | None
    cost: Cost
    diagnostics: dict[str, Any]
    provenance: Provenance
    error: Line | None


class Failed(Record):
    result: None
    error: Line


class Done(Record):
    result: Result
    cost: FullCost
    diagnostics: Diagnostics
    error: None


def check(record: Any, where: str) -> None:
    """Raises BadInput unless `record` is one of this schema. where: `the record PATH`, as it stands in a sentence."""
    if not isinstance(record, dict) or "schema" not in record:
        raise BadInput(f"The file {where} is no dpft record; take it out of the results folder.")
    if record["schema"] not in READ:
        raise BadInput(
            f"The record {where} has schema {shown(record['schema'])}, not {SCHEMA}; read it with the dpft that wrote it."
        )
    try:
        fitted(
            record, Record if record.get("status") not in STATUSES else Done if record["status"] == "done" else Failed
        )
        fitted_spec(record["spec"])
    except Misfit as problem:
        raise BadInput(f"The record {where} is damaged: {sentence(problem)}; delete it and run again.") from None


def check_place(record: Any, run_id: str, where: str) -> None:
    """Raises BadInput unless `record`, found at `where`, is one, and of the run that it is kept as."""
    check(record, where)
    if record["run_id"] != run_id:
        raise BadInput(f"The record {where} is of run {shown(record['run_id'])}; rename or delete it.")


def fitted_spec(stored: dict[str, Any], where: str = "spec") -> None:
    """Raises Misfit, naming the setting, unless these are the settings of a run."""
    whole = completed(stored)
    if unknown := sorted(whole.keys() - types().keys()):
        raise Misfit(where, f"has {shown(unknown[0])}, which this dpft does not know")
    try:
        fitted(whole, RunSpec)
    except Misfit as problem:
        raise Misfit(f"{where}.{problem.where}".rstrip("."), problem.why) from None


def bulk(record: dict[str, Any]) -> dict[str, Any]:
    """The diagnostics of a run that is done, by matrix and step. Raises BadInput."""
    try:
        fitted(record["diagnostics"], Bulk)
    except Misfit as problem:
        raise BadInput(
            f"The diagnostics of run {record['run_id']} are damaged: {sentence(problem)}; run it again."
        ) from None
    return record["diagnostics"]
