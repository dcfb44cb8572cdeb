"""Made-up users, for studies on tasks whose rows are nobody's: a public grouping that the settings of a run name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

from dpft.harness.errors import BadInput

SALT = "dpft users\n"  # apart from the hashes that hold rows out


class MadeUp:
    """Of a task that can make users up, before its base: the option `user_rows`, and in `made_up` who a user of {} rows is."""

    options: ClassVar[dict[str, Any]] = {"user_rows": 0}  # how many rows make a user; 0: none are made up
    made_up: ClassVar[str] = "nobody real: every {0} rows in the order of their hashes (user_rows={0})"

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__(options)
        if count := self.settings["user_rows"]:
            self.users = self.made_up.format(count)

    def validate(self) -> None:
        """Raises BadInput for a number of rows that no user has."""
        if (count := self.settings["user_rows"]) < 0:
            raise BadInput(f"user_rows must be a number of rows of a made-up user, or 0, not {count}; correct it.")


def by_hash(keys: Sequence[str], rows: int) -> list[str]:
    """The user of each row: every `rows` of them in the order of the hashes of their keys; the last user may have fewer."""
    order = sorted(range(len(keys)), key=lambda i: (hashlib.sha256((SALT + keys[i]).encode()).digest(), i))
    place = {row: number // rows for number, row in enumerate(order)}
    return [str(place[row]) for row in range(len(keys))]
