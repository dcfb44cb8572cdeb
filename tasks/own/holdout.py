"""Which rows are held out for validation: each row's own content says so, and nothing else does."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import TypeVar

from dpft.harness.errors import BadInput, CannotRun

Row = TypeVar("Row")
SALT = b"dpft validation\n"  # who made the file may have chosen its rows by a plain hash of theirs, as the task sentences does


def normalised(text: str) -> str:
    """The form in which two texts count as the same: no case, single spaces."""
    return " ".join(text.casefold().split())


def fraction(setting: str) -> float | None:
    """The share of rows that a setting `validation` holds out; None where it names a file. Raises BadInput."""
    try:
        share = float(setting)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise BadInput(f"validation must be a share between 0 and 1, or a file, not {setting}; correct it.")
    return share


def held_out(rows: Sequence[Row], keys: Sequence[bytes], share: float, where: str) -> tuple[list[Row], list[Row]]:
    """(train, validation): a row is held out where a salted sha256 of its key is below `share` of all that there are.

    So order, other rows and seeds have no part in it: rows with one key stay together, and where rows are added or taken away
    the others stay where they are. Raises CannotRun where one of the two is empty.
    """
    bound = int(share * 2**64)
    chosen = [int.from_bytes(hashlib.sha256(SALT + key).digest()[:8], "big") < bound for key in keys]
    train, validation = ([row for row, out in zip(rows, chosen, strict=True) if out is held] for held in (False, True))
    if not train or not validation:
        raise CannotRun(
            f"validation={share:g} holds out {len(validation)} of the {len(rows)} rows of {where}; give another share, or a file."
        )
    return train, validation


def shared(train: Collection[bytes], validation: Sequence[bytes]) -> int:
    """How many rows of validation are in train, too."""
    seen = set(train)
    return sum(key in seen for key in validation)
