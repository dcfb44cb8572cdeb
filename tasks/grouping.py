"""Made-up users, for studies on tasks whose rows are nobody's: a public grouping that the settings of a run name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dpft.harness.errors import BadInput

OPTION = {"user_rows": 0}  # how many rows make a user; 0: none are made up
SALT = "dpft users\n"  # apart from the hashes that hold rows out


def check(rows: int) -> None:
    """Raises BadInput for a number of rows that no user has."""
    if rows < 0:
        raise BadInput(f"user_rows must be a number of rows of a made-up user, or 0, not {rows}; correct it.")


def said(rows: int) -> str:
    """Who such a user is."""
    return f"nobody real: every {rows} rows in the order of their hashes (user_rows={rows})"


def by_hash(keys: Sequence[str], rows: int) -> list[str]:
    """The user of each row: every `rows` of them in the order of the hashes of their keys; the last user may have fewer."""
    order = sorted(range(len(keys)), key=lambda i: (hashlib.sha256((SALT + keys[i]).encode()).digest(), i))
    place = {row: number // rows for number, row in enumerate(order)}
    return [str(place[row]) for row in range(len(keys))]
