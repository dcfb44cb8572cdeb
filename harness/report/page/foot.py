"""The foot of the page: when, from which commits and with which versions the records were made."""

from __future__ import annotations

from collections import Counter
from typing import Any

SHOWN = ("dpft", "python", "torch", "transformers", "opacus", "prv-accountant")  # versions; a run has all of them
AT_MOST = 4  # commits


def made(records: list[dict[str, Any]]) -> list[str]:
    """A sentence each; nothing that the records do not say."""
    sections = [_dict(record["provenance"]) for record in records]
    days = sorted({str(one["started"])[:10] for one in sections if one.get("started")})
    commits = Counter(_commit(one["git"]) for one in sections if _dict(one.get("git")))
    found = []
    if days:
        found.append(f"Records made {days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}.")
    if commits:
        names = [name for name, _ in commits.most_common()]
        more = f" and {len(names) - AT_MOST} more" if len(names) > AT_MOST else ""
        found.append(f"Commit{'s' if len(names) > 1 else ''}: {', '.join(names[:AT_MOST])}{more}.")
    versions = {name: {str(v) for one in sections if (v := _dict(one.get("versions")).get(name))} for name in SHOWN}
    told = [f"{name} {', '.join(sorted(found))}" for name, found in versions.items() if found]
    return found + ([f"Versions: {'; '.join(told)}."] if told else [])


def _dict(value: Any) -> dict[str, Any]:
    """Records of other programs may have anything here."""
    return value if isinstance(value, dict) else {}


def _commit(git: dict[str, Any]) -> str:
    return str(git.get("sha"))[:10] + (" with changes" if git.get("dirty") else "")
