"""Tables about decoders: what they did to alignment, speed of learning and step time, and theory against measurement."""

from __future__ import annotations

from typing import Any

from dpft.harness.records.store import Store
from dpft.harness.report.reading import Curves, Target, spikes
from dpft.harness.report.rows import Row
from dpft.harness.report.tables import median, spread, target_of
from dpft.harness.report.text import Part, Table
from dpft.harness.report.views import Group
from dpft.harness.runs import registry

FRACTIONS = (0.9, 0.95)


def comparison(group: Group, curves: Curves, store: Store, public: bool = False) -> list[Part]:
    """Every private row beside the baseline; nothing where all rows take the release as it is."""
    private = [(name, row) for name, row in zip(group.names, group.rows, strict=True) if row.private]
    if all(row.spec["decoder"] == "mean" for _, row in private):
        return []
    targets = [target_of(group.rows, curves, fraction) for fraction in FRACTIONS]
    baselines = [row for _, row in private if row.baseline and row.ranked]
    first = [_first(baselines, curves, target) for target in targets]
    cells = []
    for name, row in private:
        cells.append(
            {
                "method": name,
                "lr": f"{row.spec['lr']:g}",
                "final": spread([r["result"]["final"] for r in row.records]),
                **({} if public else _diagnostics(row, store)),
                **{
                    f"steps to {fraction:.0%} (ratio)": _ratio(row, curves, target, base)
                    for fraction, target, base in zip(FRACTIONS, targets, first, strict=True)
                },
                "decode": median([_decode_share(r["cost"]) for r in row.records], "{:.1%}"),
            }
        )
    text = (
        "Decoders. Steps: to that share of the way from chance to where the curve of the best baseline ends, median over seeds; "
        "–: the evaluations cannot tell; ratio: steps of the fastest baseline over these; decode: share of the step time."
    )
    return [text, Table(cells)]


def _diagnostics(row: Row, store: Store) -> dict[str, str]:
    alignment = [r["diagnostics"]["alignment"] for r in row.records]
    return {
        "alignment noisy": median([a["noisy"] for a in alignment], "{:.3f}"),
        "decoded": median([a["decoded"] for a in alignment], "{:.3f}"),
        "spikes per matrix": _spikes(row, store),
    }


def _first(rows: list[Row], curves: Curves, target: Target | None) -> float:
    found = [curves.median_reached(row, target) for row in rows]
    return min((one.step for one in found if one is not None), default=float("inf"))


def _ratio(row: Row, curves: Curves, target: Target | None, base: float) -> str:
    found = curves.median_reached(row, target)
    if found is None:
        return "–"
    if found.step == float("inf"):
        return f"> {row.spec['steps']}"
    return f"{found.step:g}" + (f" ({base / found.step:.2f})" if base < float("inf") else "")


def _spikes(row: Row, store: Store) -> str:
    """Mean number of singular values that survived, over matrices, evaluated steps and seeds."""
    if row.spec["decoder"] != "rmt":
        return "–"
    found = [count for record in row.records for count in spikes(store, record)]
    return f"{sum(found) / len(found):.2f}" if found else "–"


def _decode_share(cost: dict[str, Any]) -> float | None:
    total = sum(cost["phase_s"].values())
    return cost["phase_s"].get("decode", 0.0) / total if total else None


def theory(records: list[dict[str, Any]]) -> list[Part]:
    """What the clean spectrum and the noise level predict of a release and of its shrinkage, beside what was seen.

    One line per recorded matrix and step of every run whose decoder shrinks plain releases in the way the theory is about.
    """
    cells = [cell for record in records if in_theory(record) for cell in _predictions(record)]
    if not cells:
        return []
    cells.sort(key=lambda cell: tuple(cell.pop("order")))
    text = (
        "x1: the largest singular value of the clean gradient, in units of the detection threshold s (mn)^(1/4), below which it "
        "leaves no trace (BBP). y1: the largest of the release, in units of the edge of the noise. Predicted (1103.2221, "
        "1405.7511) / seen; cosines to the clean gradient, of the release and of the decoded matrix. First seed."
    )
    return ["### Theory against measurement", text, Table(cells)]


def in_theory(record: dict[str, Any]) -> bool:
    """Whether the run shrinks plain releases in the way the theory is about, and its spectra were recorded."""
    spec = record["spec"]
    if spec["decoder"] != "rmt" or spec["seed"] != 0 or not record["diagnostics"].get("spectra"):
        return False
    if spec["method"] not in registry.methods():
        return False
    given = {**registry.defaults_of(registry.method(spec["method"]), registry.decoder("rmt")), **spec["options"]}
    plain = {"input": "release", "shrinker": "frobenius", "threshold": "tracy-widom", "gate": False}
    return all(given[key] == value for key, value in plain.items())


def _predictions(record: dict[str, Any]) -> list[dict[str, Any]]:
    from dpft.methods.decoders.spectral import bulk_edge, detection_threshold

    spec, diagnostics, cells = record["spec"], record["diagnostics"], []
    cosines = {row["step"]: row for row in diagnostics["alignment_by_parameter"]}
    seen = {row["step"]: row for row in diagnostics["decoder_by_parameter"]}
    for taken in diagnostics["spectra"]:
        step = taken["step"]
        for name, matrix in taken["matrices"].items():
            (m, n), s, said = matrix["shape"], matrix["noise_std"], matrix["predicted"]
            cosine = cosines.get(step, {}).get(name)
            if said["first"] is None or cosine is None:
                continue
            edge = bulk_edge(m, n, s)
            kept = seen.get(step, {}).get(name, {}).get("spikes")
            cells.append(
                {
                    "order": (spec["task"], spec["epsilon"], spec["method"], spec["lr"], step),
                    "task": spec["task"],
                    "ε": f"{spec['epsilon']:g}",
                    "lr": f"{spec['lr']:g}",
                    "step": step,
                    "matrix": name.removesuffix(".weight"),
                    "x1": f"{matrix['clean'][0] / detection_threshold(m, n, s):.2f}",
                    "spikes": f"{said['spikes']} / {'–' if kept is None else kept}",
                    "y1": f"{said['first'] / edge:.3f} / {matrix['noisy'][0] / edge:.3f}",
                    "cosine noisy": _pair(said["cosine_noisy"], cosine["noisy"]),
                    "cosine decoded": _pair(said["cosine_decoded"], cosine["decoded"]),
                }
            )
    return cells


def _pair(said: float | None, seen: float | None) -> str:
    return f"{said:.3f} / {0.0 if seen is None else seen:.3f}"
