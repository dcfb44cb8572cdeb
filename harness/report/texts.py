"""Tables of what was generated: metrics of the texts, and the texts of a few fixed inputs before and after training."""

from __future__ import annotations

from dpft.harness.report.rows import Row
from dpft.harness.report.tables import spread
from dpft.harness.report.text import Part, Table
from dpft.harness.report.views import Group

SCORES = ("loss_per_token", "perplexity", "bleu", "rouge_l", "nist")
WIDEST = 300  # characters of a cell


def comparison(group: Group, public: bool = False) -> list[Part]:
    """The metrics of each row, their definitions, and the samples of each row's first seed.

    Nothing where no text was made. public: without the samples, which hold validation rows word for word.
    """
    written = [(name, row) for name, row in zip(group.names, group.rows, strict=True) if _wrote(row)]
    if not written:
        return []
    scores = [{"method": name, "lr": f"{row.spec['lr']:g}", **_scores(row)} for name, row in written]
    definitions = written[0][1].records[0]["result"].get("definitions", {})
    parts: list[Part] = ["Generated texts.", Table(scores)]
    if definitions:
        parts.append("\n".join(f"- {key}: {text}" for key, text in definitions.items()))
    shown = [(name, row) for name, row in written if _samples(row)]
    if public or not shown:
        return parts
    parts.append("The same prompts before and after training (the first seed of each row):")
    parts.append(Table(_beside(shown)))
    return parts


def _wrote(row: Row) -> bool:
    return any(row.records[0]["result"].get(key) for key in ("definitions", "samples"))


def _samples(row: Row) -> dict[str, list[dict[str, str]]]:
    found = row.records[0]["result"].get("samples", {})
    return found if found.get("after") else {}


def _scores(row: Row) -> dict[str, str]:
    found = {}
    for key in SCORES:
        values = [r["result"]["all_metrics"].get(key) for r in row.records]
        found[key] = "-" if None in values else spread(values)
    return found


def _beside(written: list[tuple[str, Row]]) -> list[dict[str, str]]:
    """One line per text: each prompt with a reference, what came before training, and what each row's model makes of it."""
    cells = []
    first = _samples(written[0][1])
    for i, sample in enumerate(first["before"]):
        cells.append({"prompt": _cell(sample["prompt"]), "by": "a reference", "text": _cell(sample["reference"])})
        cells.append({"prompt": "", "by": "before training", "text": _cell(sample["output"])})
        for name, row in written:
            after = _samples(row)["after"]
            if i < len(after) and after[i]["prompt"] == sample["prompt"]:
                cells.append({"prompt": "", "by": name, "text": _cell(after[i]["output"])})
    return cells


def _cell(text: str) -> str:
    """Text that cannot break out of its cell."""
    text = " ".join(text.split())[:WIDEST]
    for mark in "\\|`*_[]<>":
        text = text.replace(mark, f"\\{mark}")
    return text or "(nothing)"
