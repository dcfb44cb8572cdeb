"""What numbers, texts and names may be, wherever they come from, and how they are shown."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any

from msgspec import Meta

LARGE = 1e300  # beyond it sums and squares overflow
WHOLE = 2**63 - 1

# NaN compares false with everything, so bounds leave it out
Number = Annotated[float, Meta(ge=-LARGE, le=LARGE)]
Positive = Annotated[float, Meta(gt=0, le=LARGE)]
Amount = Annotated[float, Meta(ge=0, le=LARGE)]
Whole = Annotated[int, Meta(ge=-WHOLE, le=WHOLE)]
Count = Annotated[int, Meta(ge=0, le=10**15)]
Seed = Annotated[int, Meta(ge=0, le=WHOLE)]
Step = Annotated[int, Meta(ge=1, le=10**15)]
Name = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}\Z", description="a name of letters, digits and . _ + -")
]
Digits = Annotated[str, Meta(pattern=r"^[0-9]{1,18}\Z", description="a whole number")]
Text = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*\Z", max_length=4096, description="a text of one line")]
Filled = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]+\Z", max_length=4096, description="a text of one line")]
Plain = Annotated[
    str,
    Meta(pattern=r"^[^\x00-\x1f\x7f|`<>\[\]\\]*\Z", max_length=1000, description="a text of one line without markup"),
]
Line = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*\Z", description="a text of one line")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z", description="64 hex digits")]
RunId = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z", description="16 hex digits")]

SHOWN = 60  # characters of a value in a message
BRIEF = reprlib.Repr()  # of a value of any size and depth only the beginning is looked at
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother, BRIEF.maxlong = 3, 2 * SHOWN, 2 * SHOWN, 2 * SHOWN


def shown(value: Any) -> str:
    """A value in a message: on one line, without what a terminal would obey, cut to a length that can be read."""
    if isinstance(value, int) and abs(value) > 10**SHOWN:
        return "a number of more than 60 digits"
    try:
        text = BRIEF.repr(value)
    except ValueError:  # a number of thousands of digits within it
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def one_line(text: str) -> str:
    """A message on one line: line ends become spaces, other characters that do not print their escapes."""
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)
