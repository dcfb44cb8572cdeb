"""Do the memory claims of DP-GRAPE (2506.15588) hold, and against what? Predictions for three models, and a picture of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpft.harness.memory.prediction import CATEGORIES, INFERENCE, Answer, Question, predict

GIB = 2**30
BASELINES = ("materialised", "dp-adam")  # what the paper compares with, and this harness's own engine
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#999999", "#DDDDDD")


@dataclass(frozen=True)
class Case:
    """One model of the paper: what is claimed, and at which size it is looked at. rank: the paper's for this model."""

    model: str
    batch: int
    length: int
    rank: int
    claim: str
    head: str = "classes"
    image: bool = False

    @property
    def title(self) -> str:
        return f"{self.model}, B = {self.batch}" + ("" if self.image else f", T = {self.length}")

    def questions(self) -> dict[str, Question]:
        """Row -> what is asked."""

        def ask(method: str, **options: Any) -> Question:
            return Question(self.model, method, self.batch, self.length, "fp32", self.head, options)

        rows = {name: ask(name) for name in ("non-private", "materialised", "ghost", "dp-adam", "dp-lora")}
        rows[f"dp-grape, rank {self.rank}"] = ask("dp-grape", rank=self.rank)
        if not self.image:  # of an image model the patch embedding is projected in any case
            rows[f"dp-grape, rank {self.rank}, embeddings projected"] = ask(
                "dp-grape", rank=self.rank, embeddings="projected"
            )
        return {**rows, "dp-zo": ask("dp-zo", directions=1), INFERENCE: ask(INFERENCE)}


CASES = (
    Case("roberta-large", 40, 256, 16, "over 70% below DP-Adam"),
    Case("opt-6.7b", 8, 256, 64, "trains on one large GPU"),
    Case("vit-b16", 64, 197, 64, "over 63% below DP-Adam", image=True),
)
RANKS = (4, 16, 64, 256)


def ask_all(cases: tuple[Case, ...], told: Callable[[str], None]) -> dict[Case, dict[str, Answer]]:
    """Every row of every case; `told` hears what is being predicted."""
    found: dict[Case, dict[str, Answer]] = {}
    for case in cases:
        found[case] = {}
        for row, question in case.questions().items():
            told(f"{case.title}: {row}")
            found[case][row] = predict(question)
    return found


def markdown(answers: dict[Case, dict[str, Answer]], picture: str) -> str:
    """The tables, one per case, the picture and what ranks make of the state."""
    parts = [
        "Peak live bytes of one step in fp32 (AdamW or the method's Adam; flat clipping), GiB, by what holds them then. "
        "`materialised`: all per-example gradients at once, as the paper's DP-Adam; `ghost`: two passes; `dp-adam`: this "
        "harness's one pass; `inference`: one forward pass and nothing else."
    ]
    parts += [_table(case, rows) for case, rows in answers.items()]
    return "\n\n".join([*parts, f"![Peak memory of one step by category]({picture})"])


def _table(case: Case, rows: dict[str, Answer]) -> str:
    from tabulate import tabulate

    used = [c for c in CATEGORIES if any(c in a.peak for a in rows.values())]
    lines = []
    for name, answer in rows.items():
        ratios = [f"{answer.total / rows[base].total:.2f}" for base in BASELINES]
        held = [f"{answer.peak.get(c, 0) / GIB:.2f}" for c in used]
        lines.append([name, f"{answer.trainable / 1e6:,.1f} M", f"{answer.total / GIB:.2f}", *ratios, *held])
    headers = ["", "trainable", "GiB", "/ materialised", "/ dp-adam", *(c.replace("_", " ") for c in used)]
    shown = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    return f"#### {case.title}\n\nClaimed of DP-GRAPE: {case.claim}.\n\n{shown}"


def state(model: str, head: str | None = None) -> str:
    """How much of dp-adam's sum and moments dp-grape keeps of the matrices it projects, by rank."""
    import torch
    from tabulate import tabulate
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dpft.harness.memory import skeletons
    from dpft.harness.query.preview import first_questions
    from dpft.harness.runs import registry

    lines = []
    for rank in RANKS:
        with FakeTensorMode(allow_non_fake_inputs=True):
            net = skeletons.build(model, head)
        method = registry.make("dp-grape", "mean", {"rank": rank})
        method.prepare(net, torch.Generator())
        encodings = first_questions(method, 0)["gradient"].encodings
        full = kept = least = 0
        for name, p in net.named_parameters():
            if name in method.sides:
                full += p.numel()
                kept += torch.Size(encodings[name].shape(p.shape)).numel()
                least += p.numel() * rank // min(p.shape[0], p.shape[1:].numel())
        if not method.sides:  # no matrix has more than `rank`
            continue
        lines.append([rank, len(method.sides), f"{full / 1e6:.1f} M", f"{kept / full:.4f}", f"{least / full:.4f}"])
    headers = ["rank", "matrices", "entries", "kept of sum and of each moment", "r / min(m, n), weighted"]
    return f"{model}:\n\n" + tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def bars(answers: dict[Case, dict[str, Answer]]) -> Callable[[Any], None]:
    """Draws stacked bars, one panel per case, on axes [1, cases]."""

    def draw(axes: Any) -> None:
        for axis, (case, rows) in zip(axes[:, 0], answers.items(), strict=True):
            names = list(rows)[::-1]
            left = [0.0] * len(names)
            for colour, category in zip(COLOURS, CATEGORIES, strict=True):
                sizes = [rows[name].peak.get(category, 0) / GIB for name in names]
                axis.barh(names, sizes, left=left, color=colour, label=category.replace("_", " "), height=0.7)
                left = [a + b for a, b in zip(left, sizes, strict=True)]
            for y, total in enumerate(left):
                axis.text(total, y, f" {total:.1f}", va="center", fontsize=7)
            axis.set(title=case.title, xlabel="GiB")
            axis.margins(x=0.08)
            axis.grid(axis="y", visible=False)
        axes[0, 0].legend(fontsize=7, ncols=2, loc="lower right")

    return draw
