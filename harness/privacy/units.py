"""Whose contribution a budget covers: what a `privacy` section says of its unit, and what follows from it.

Of an example the section says nothing. Of a user (harness/runs/users.py) it has `unit`, `user_sampling`, `group_size`,
`num_users` and `user_is`, who one is; `num_examples` are the examples that count, and delta is held against the number of users.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

UNITS, USER_SAMPLINGS = ("example", "user"), ("uls", "els")
ADJACENCY = {"example": "zero-out, public N", "user": "zero-out of a user, public numbers of users and examples"}
KEYS = ("user_sampling", "group_size", "num_users")
SETTINGS = {
    "sampler": "poisson",
    "unit": "example",
    "user_sampling": "uls",
    "group_size": None,
}  # that say how batches are drawn


def of(privacy: Mapping[str, Any]) -> str:
    """The unit of a section."""
    return privacy.get("unit", "example")


def section(unit: str, user_sampling: str, group_size: int | None, num_users: int | None, who: str) -> dict[str, Any]:
    """What the section of such a run says beside N, q and the rest. who: a user is, in words."""
    if unit == "example":
        return {}
    return {
        "unit": unit,
        "user_sampling": user_sampling,
        "group_size": group_size,
        "num_users": num_users,
        "user_is": who,
    }


def sampling_of(sampler: str, unit: str, user_sampling: str, group_size: int | None) -> str:
    """The kind of sampling (harness/privacy/samplings.py) of a run with these settings."""
    return "grouped" if unit == "user" and user_sampling == "els" and (group_size or 1) > 1 else sampler


def sampled(privacy: Mapping[str, Any]) -> tuple[str, Any]:
    """(key, value) of the number of what batches are drawn of: examples, or whole users."""
    whole = of(privacy) == "user" and privacy["user_sampling"] == "uls"
    key = "num_users" if whole else "num_examples"
    return key, privacy.get(key)


def protected(privacy: Mapping[str, Any]) -> tuple[str, Any]:
    """(key, value) of the number of what is protected."""
    key = "num_examples" if of(privacy) == "example" else "num_users"
    return key, privacy.get(key)


def shape(privacy: Mapping[str, Any]) -> Iterator[str]:
    """What is missing or of the wrong type."""
    unit = of(privacy)
    if unit not in UNITS:
        yield f"unit is {unit!r}; only {' and '.join(UNITS)} are known."
    elif unit == "example":
        yield from (f"{key} belongs to unit user, which the record does not have." for key in KEYS if key in privacy)
    elif lacking := [key for key in (*KEYS, "num_examples") if key not in privacy]:
        yield f"The privacy section is of users, but lacks {', '.join(lacking)}."
    else:
        if privacy["user_sampling"] not in USER_SAMPLINGS:
            yield f"user_sampling is {privacy['user_sampling']!r}; only {' and '.join(USER_SAMPLINGS)} are known."
        for key in ("group_size", "num_users"):
            if type(privacy[key]) is not int or not 1 <= privacy[key] <= 10**15:
                yield f"{key} must be a whole number of at least 1, not {privacy[key]!r}."


def declared(privacy: Mapping[str, Any]) -> Iterator[str]:
    """What cannot be; of a section whose `shape` is right."""
    if of(privacy) == "user":
        users, examples, most = (privacy[key] for key in ("num_users", "num_examples", "group_size"))
        if not users <= examples <= users * most:
            yield f"{users} users of at most {most} examples each cannot have num_examples = {examples}."


def asked(privacy: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    """The unit against what the run's spec asked for."""
    wanted = {"unit": spec.get("unit", "example")}
    if wanted["unit"] == "user":
        wanted |= {"user_sampling": spec.get("user_sampling", "uls"), "group_size": spec.get("group_size")}
    found = {"unit": of(privacy), **{key: privacy.get(key) for key in wanted if key != "unit"}}
    for key, value in wanted.items():
        if found[key] != value:
            yield f"{key} is {found[key]!r}, but the spec asks for {value!r}."


def compared(privacy: Mapping[str, Any], keys: Sequence[str], free: Sequence[str] = ()) -> dict[str, Any]:
    """What must be equal in rows that are ranked together, of the section's `keys`.

    Two ways to sample, and numbers of examples that count, are means to one promise: of users their number must be the same, and
    how many examples a step is expected to take; not N and q.
    """
    found = {"unit": of(privacy), **{key: privacy[key] for key in keys if key not in free}}
    if of(privacy) == "example":
        return found
    for key in ("num_examples", "sampling_probability"):
        found.pop(key, None)
    if found.get("sampling") == "grouped":
        found["sampling"] = "poisson"
    found["num_users"] = privacy["num_users"]
    if "sampling_probability" not in free:
        found["examples a step"] = privacy["sampling_probability"] * privacy["num_examples"]
    return found


def same(key: str, one: Any, other: Any, slack: float) -> bool:
    """Whether two values of `compared` are equal; of examples a step, as nearly as whole users allow."""
    if key == "examples a step":
        return math.isclose(one, other, rel_tol=slack)
    if isinstance(one, float) or isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return one == other


def told(privacies: Sequence[Mapping[str, Any]]) -> str:
    """For a caption: who is protected, where it is a user; rows of one table have one number of users."""
    privacy = privacies[0]
    if of(privacy) == "example":
        return ""
    sizes = ", ".join(map(str, sorted({one["group_size"] for one in privacies})))
    who = privacy.get("user_is") or "nobody says who"
    return f"the unit is a user ({who}), U = {privacy['num_users']:,}, k = {sizes} examples at most"
