"""Bad values: as a user types them, and as a file holds them."""

from __future__ import annotations

import random
from typing import Any

NO_NUMBER = (
    "nan",
    "NaN",
    "inf",
    "Infinity",
    "-inf",
    "-Infinity",
    "1e999",
    "-1e999",
    "",
    " ",
    "one",
    "[]",
    "{}",
    "true",
    "1,,2",
    "0x1p3",
    "1" * 5000,
)
HUGE = ("-1", "1e300", "-1e300", "99999999999999999999", "1e30")
NO_WHOLE = (*NO_NUMBER, "1.5", "1e-3", "-1e300")
NAMES = (
    "",
    " ",
    "../../etc/passwd",
    "a/b",
    "a\nb",
    "a\rb",
    "a|b",
    "a`b",
    "<script>alert(1)</script>",
    "\x1b[31mred",
    "a\u202eb",
    "a\u0000b",
    "x" * 5000,
    "[a](b)",
    "con:aux",
    ".",
    "..",
    "~",
    "%s%n",
    "a - at `$.b`",
)
NESTED = "[" * 3000
JSON = (
    None,
    "",
    "x",
    [],
    {},
    [None],
    {"a": 1},
    True,
    False,
    -1,
    0,
    1.5,
    -1e9,
    1e308,
    2**64,
    10**400,
    float("nan"),
    float("inf"),
    float("-inf"),
    "a\nb|<b>`",
    [[[]]],
    "x" * 5000,
)


def other_type(old: Any, rng: random.Random) -> Any:
    """A value that what holds `old` cannot hold: of another type, or no number that is one."""
    kinds = {
        bool: (None, "x", [], {}, 1.5, 7),
        int: (None, "x", [], {}, 1.5, True, float("nan"), float("inf")),
        float: (None, "x", [], {}, True, float("nan"), float("-inf")),
        str: (None, [], {}, 1.5, 7, True),
        list: (None, "x", {}, 1.5, 7, True),
        dict: (None, "x", [], 1.5, 7, True),
        type(None): ([], {"a": 1}),
    }
    return rng.choice(kinds[type(old)])


def at(document: Any, way: tuple) -> Any:
    for key in way:
        document = document[key]
    return document
