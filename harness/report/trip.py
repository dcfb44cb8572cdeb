"""The trip of a batch through a finished run, as a picture: who sees examples, and what crosses to the other side."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from dpft.harness.errors import BadInput

WIDTH, BOX, GAP, LEFT, HIGH, LINE = 960, 168, 20, 20, 108, 17  # px
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 } .zone { font-size: 14px; font-weight: 600 } .note { font-size: 12px }
.box { fill: #ffffff; stroke: #8c959f } .private { fill: #fff1e5 } .released { fill: #e6f4ea }
.arrow { fill: none; stroke: #57606a; stroke-width: 1.5 } .tip { fill: #57606a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .box { fill: #161b22; stroke: #6e7681 } .private { fill: #3b2414 } .released { fill: #12301d }
  .arrow { stroke: #9198a1 } .tip { fill: #9198a1 }
}
"""
TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="tip" d="M0,0 L8,4 L0,8 z"/></marker>'
)


def picture(record: Mapping[str, Any]) -> str:
    """An SVG of 960 pixels that follows light and dark. Raises BadInput for a run that did not finish."""
    if record.get("status") != "done":
        raise BadInput(f"Run {record.get('run_id')} did not finish, so it has no numbers; name one that is done.")
    if lacking := sorted({"spec", "cost", "result"} - set(record)):
        raise BadInput(f"Run {record.get('run_id')} has no {lacking[0]}, as another program made it; name one of dpft.")
    top, bottom = 38, 246
    zone = f'x="4" width="{WIDTH - 8}" height="{HIGH + 68}" rx="8"'
    crossing = LEFT + 4 * (BOX + GAP) + BOX // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + HIGH + 38}" role="img" '
        f'aria-label="The trip of a batch through run {record["run_id"]}">',
        f"<style>{STYLE}</style>",
        f"<defs>{TIP}</defs>",
        f'<rect class="private" y="4" {zone}/>',
        f'<rect class="released" y="{bottom - 34}" {zone}/>',
        _text(LEFT, 26, "The core: sees examples", "zone"),
        _text(LEFT, bottom - 12, "The method: sees noisy sums", "zone"),
        *_row(_private(record), top),
        *_row(_released(record)[::-1], bottom, back=True),
        _text(LEFT, top + HIGH + 22, _beside(record), "note"),
        _text(LEFT, bottom + HIGH + 22, _again(record), "note"),
        _arrow(f"M{crossing},{top + HIGH} V{bottom - 3}"),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _private(record: Mapping[str, Any]) -> list[tuple[str, Sequence[str]]]:
    """(title, lines) of each box, in the order of the trip."""
    spec, cost, privacy = record["spec"], record["cost"], record.get("privacy") or {}
    count, q = privacy.get("num_examples"), privacy.get("sampling_probability")
    unit = "user" if spec.get("unit") == "user" and spec.get("user_sampling") != "els" else "example"
    drawn = [f"each {unit} with", f"probability {q:.4f}"] if q is not None else []
    noise = ["none: a control", "without privacy"]
    if spec["epsilon"] is not None:
        noise = [f"σ C = {privacy['noise_multiplier']:.3g} × {spec['clip_norm']:g}", "on every number", "of the sum"]
    return [
        ("Data", [spec["task"], *([f"{count:,} examples"] if count else []), _short(spec["model"])]),
        ("Batch", [f"{spec['batch_size']:,} expected", *drawn, *_sampler(privacy)]),
        (
            "Gradients",
            [
                f"of each {unit}, by",
                f"{cost['trainable_parameters']:,} numbers",
                "of the model's",
                f"{cost['total_parameters']:,}",
            ],
        ),
        ("Clip and add", _clipped(record)),
        ("Noise", noise),
    ]


def _released(record: Mapping[str, Any]) -> list[tuple[str, Sequence[str]]]:
    spec, privacy, result = record["spec"], record.get("privacy") or {}, record["result"]
    booked = ["nothing is promised"]
    if spec["epsilon"] is not None:
        booked = [
            "booked in the ledger:",
            f"ε ≤ {privacy['epsilon'][-1]:.3f} at the end,",
            f"δ = {privacy['delta']:.3g}",
        ]
    return [
        ("Noisy sum", booked),
        ("Method", [spec["method"], "makes updates of it,", f"decoder {spec.get('decoder', 'mean')}"]),
        ("Optimizer", [spec["optimizer"], f"rate {spec['lr']:g}", f"schedule {spec['schedule']}"]),
        ("Model", ["next step, next batch"]),
        ("Result", [f"{result['metric']} {result['final']:.3f}", f"(chance {result['chance']:.3f})"]),
    ]


def _sampler(privacy: Mapping[str, Any]) -> list[str]:
    name = privacy.get("sampling")
    return [f"by {name} sampling".replace("poisson", "Poisson")] if isinstance(name, str) else []


def _again(record: Mapping[str, Any]) -> str:
    return f"{record['spec']['steps']:,} steps, {record['cost']['example_gradients']:,} gradients in all."


def _clipped(record: Mapping[str, Any]) -> list[str]:
    spec = record["spec"]
    if spec["epsilon"] is None or spec["clip_norm"] is None:
        return ["added as they are"]
    share = (record.get("diagnostics") or {}).get("clipped_fraction")
    longer = [f"({share:.0%} were longer)"] if isinstance(share, float) else []
    return [f"each to C = {spec['clip_norm']:g}", *longer, "then one sum"]


def _beside(record: Mapping[str, Any]) -> str:
    noisy = ((record.get("diagnostics") or {}).get("alignment") or {}).get("noisy")
    told = f", alignment with the clean sum ({noisy:.2f} here)" if isinstance(noisy, float) else ""
    return f"Beside it, never fed back: times, memory{told}. Only the noisy sum goes on, once a step."


def _row(boxes: Sequence[tuple[str, Sequence[str]]], top: int, back: bool = False) -> list[str]:
    """Boxes from left to right, the arrows between them the other way where the trip goes `back`."""
    parts = []
    for i, (title, lines) in enumerate(boxes):
        x, middle = LEFT + i * (BOX + GAP), top + HIGH // 2
        parts.append(f'<rect class="box" x="{x}" y="{top}" width="{BOX}" height="{HIGH}" rx="6"/>')
        parts.append(_text(x + 12, top + 23, title, "title"))
        parts += [_text(x + 12, top + 25 + LINE * (n + 1), line) for n, line in enumerate(lines)]
        if i:
            parts.append(_arrow(f"M{x},{middle} H{x - GAP + 2}" if back else f"M{x - GAP},{middle} H{x - 2}"))
    return parts


def _arrow(path: str) -> str:
    return f'<path class="arrow" marker-end="url(#tip)" d="{path}"/>'


def _text(x: float, y: float, content: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text{mark} x="{x:g}" y="{y:g}">{html.escape(content)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"
