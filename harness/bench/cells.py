"""What is measured, and in which order: one job is one fresh process. Needs no torch."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace

from dpft.harness.errors import BadInput, unknown

BASELINE = "non-private"
WARMUP = 3  # the first step makes the optimizer's state; engines that hold tensors until the clip settle in memory by the third
# Engine -> about how many non-private steps one of its steps takes: the weights of the progress bar, nothing else.
ENGINES = {
    BASELINE: 1.0,
    "factored": 1.2,
    "opacus": 5.0,
    "reference": 20.0,
    "opacus-hooks": 4.0,
    "opacus-ghost": 1.9,
}
DEFAULT_ENGINES = (BASELINE, "factored", "opacus-hooks", "opacus-ghost")
START_SECONDS = 6.0  # imports and loading a model
SECONDS_PER_TOKEN = 6e-4  # a non-private step of MiniLM-L6 on two cores; replaced by the first measurement


@dataclass(frozen=True)
class Cell:
    """Examples per microbatch and tokens per example."""

    batch_size: int
    length: int

    @property
    def name(self) -> str:
        return f"B{self.batch_size}T{self.length}"


CELLS = tuple(Cell(batch_size, length) for length in (64, 128) for batch_size in (32, 64, 128))
DEFAULT_CELLS = "B32T64,B64T64,B64T128"


@dataclass(frozen=True)
class Job:
    """One process: `row` (line of the table) of `cell`, in `round`.

    engine: key of ENGINES; method: a registered method in the engine's place (`--methods`); decoder: another than the method's;
    training: full or lora; steps: timed ones, after WARMUP others; logical: examples per step, in microbatches; task: real
    sentences of this task instead of random tokens; bucketed: microbatches of like length, else padded to the longest of the
    logical batch; whole: a run of `steps` steps from loading to evaluation, without warm-up (whole.py); plugins: files to load
    first; optimizer: adamw, or sgd for comparing updates.
    """

    row: str
    engine: str
    batch_size: int
    length: int
    round: int = 0
    model: str = "minilm-l6"
    training: str = "full"
    method: str | None = None
    decoder: str | None = None
    device: str = "cpu"
    precision: str = "fp32"
    steps: int = 2
    logical: int | None = None
    task: str | None = None
    data_dir: str | None = None
    bucketed: bool = False
    whole: bool = False
    plugins: tuple[str, ...] = ()
    noise_multiplier: float = 1.0
    clip_norm: float = 1.0
    optimizer: str = "adamw"
    lr: float = 1e-4

    @property
    def cell(self) -> Cell:
        return Cell(self.batch_size, self.length)

    @property
    def examples(self) -> int:
        """Examples per step."""
        return self.logical or self.batch_size

    def expected_seconds(self, seconds_per_token: float) -> float:
        """About how long the process takes."""
        step = ENGINES[self.engine] * self.examples * self.length * seconds_per_token
        return START_SECONDS + (self.steps + (0 if self.whole else WARMUP)) * step

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**{**fields, "plugins": tuple(fields["plugins"])})


def parse_cells(text: str) -> list[Cell]:
    """`B32T64,B64T128`, or `all`. Raises BadInput."""
    if text == "all":
        return list(CELLS)
    found = [re.fullmatch(r"B([1-9]\d*)T([1-9]\d*)", part.strip()) for part in text.split(",")]
    if not all(found):
        wrong = next(part.strip() for part, match in zip(text.split(","), found, strict=True) if not match)
        raise BadInput(f"There is no cell {wrong!r}; write all, or examples and tokens such as B32T64,B64T128.")
    return list(dict.fromkeys(Cell(int(match[1]), int(match[2])) for match in found))


def parse_engines(text: str | None) -> list[str]:
    """Engine names separated by commas, the baseline first, also where it is not named. Raises BadInput."""
    names = DEFAULT_ENGINES if text is None else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in ENGINES:
            raise unknown("engine", name, ENGINES)
    return list(dict.fromkeys([BASELINE, *names]))


def engine_rows(base: Job, engines: list[str]) -> list[Job]:
    """One row per engine."""
    return [replace(base, row=name, engine=name) for name in engines]


def method_rows(base: Job, methods: list[str]) -> list[Job]:
    """One row per method, against non-private full fine-tuning."""
    return [base, *(replace(base, row=name, engine="factored", method=name) for name in methods)]


def decoder_rows(base: Job, decoders: list[str]) -> list[Job]:
    """One row per decoder of full fine-tuning; the first, against which the others are measured, takes the release as it is."""
    names = ["mean", *(name for name in decoders if name != "mean")]
    return [replace(base, row=name, engine="factored", method="dp-adam", decoder=name) for name in names]


def text_rows(base: Job) -> list[Job]:
    """Padded and bucketed microbatches of real sentences, non-private and factored; the baseline is padded."""
    return [
        replace(base, row=f"{engine}, {'buckets' if bucketed else 'padded'}", engine=engine, bucketed=bucketed)
        for engine in (BASELINE, "factored")
        for bucketed in (False, True)
    ]


def run_rows(base: Job) -> list[Job]:
    """Whole runs: plain PyTorch first, dpft, Opacus."""
    whole = replace(base, whole=True)
    names = {BASELINE: BASELINE, "dpft": "factored", "opacus-hooks": "opacus-hooks", "opacus-ghost": "opacus-ghost"}
    return [replace(whole, row=row, engine=engine) for row, engine in names.items()]


def interleave(rows: list[Job], cells: list[Cell], rounds: int) -> list[Job]:
    """Every row of every cell once per round, the order rotated by one each round: no row always comes first."""
    return [
        replace(row, batch_size=cell.batch_size, length=cell.length, round=number)
        for number in range(rounds)
        for cell in cells
        for row in rows[number % len(rows) :] + rows[: number % len(rows)]
    ]
