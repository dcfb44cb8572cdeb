"""What is known, without reading them, of data that tasks fetch: so that a record cannot claim other rows, or more of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpft.harness.privacy import units


@dataclass(frozen=True)
class Known:
    """fingerprint of the rows, their numbers; pinned: the task reads nothing else, it checks a hash."""

    fingerprint: str
    train: int
    validation: int
    pinned: bool = True


# (task, version), with the task's default options; low-rank is drawn, and its last bits are the processor's
DATA = {
    ("sentences", 1): Known("f08a1b7be56b0eff5e9fd7f4f2776d6c37b5c5a84d571832f6c8cc59af48029c", 18348, 1000),
    ("reviews", 1): Known("a754c9b925120bb1bcc76dcdef344ddb34d7787fe684bf46a02ccfb8abefbc33", 4000, 1000),
    ("digits", 1): Known("ab1e09b0b5747f664362730e30a896193122e2f71259ef2130d7794ad1c49fdc", 800, 277),
    ("sst2", 1): Known("3375cbcb0d724ce5b8069ef23bdbd343b81a0b025242fe3d76f2bf763864f08e", 67349, 872, pinned=False),
}
MODELS = {"minilm-l6": "9f0e28288552addec6d7dad9065e00208c8b4f0ca60565ca1eff897e680ea4f5"}


def of(record: dict[str, Any]) -> Known | None:
    """What is known of a record's data; None where its task reads what the user has."""
    spec = record["spec"]
    key = (spec.get("task"), spec.get("task_version"))
    return None if spec.get("task_options") else DATA.get(key)


def findings(record: dict[str, Any]) -> Iterator[str]:
    """Fingerprints and N of a run that is done, against what is known of its data and model."""
    spec, provenance, known = record["spec"], record["provenance"], of(record)
    claimed = record["privacy"]["num_examples"] if record["privacy"] is not None else None
    if known is not None:
        same = provenance["data_fingerprint"] == known.fingerprint
        if not same and (known.pinned or claimed == known.train):
            yield f"The data fingerprint is not that of task {spec['task']} version {spec['task_version']}."
        elif claimed is not None and (same or known.pinned) and not _of(claimed, known.train, record["privacy"]):
            yield f"num_examples is {claimed}, but the training data of {spec['task']} have {known.train} rows."
    stated = provenance.get("train_examples", claimed)
    if claimed is not None and stated != claimed:
        yield f"num_examples is {claimed}, but {stated!r} training examples were loaded."
    if MODELS.get(spec["model"], provenance["model_fingerprint"]) != provenance["model_fingerprint"]:
        yield f"The model fingerprint is not that of {spec['model']}."


def _of(claimed: int, train: int, privacy: dict[str, Any]) -> bool:
    """Whether so many training rows can be those that count: all, or where users are protected so many of each at most."""
    return claimed == train if units.of(privacy) == "example" else claimed <= train


def validation_size(record: dict[str, Any]) -> int | None:
    """How many validation examples the final value is over; None where nobody says."""
    stated = record["provenance"].get("validation_examples")
    if type(stated) is int:
        return stated
    known = of(record)
    return None if known is None or record["provenance"]["data_fingerprint"] != known.fingerprint else known.validation
