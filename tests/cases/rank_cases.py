"""One of two ranks, started by tests/train/test_ranks.py: makes small runs with the other, and says what became of each.

    RANK=0 ... python rank_cases.py FOLDER

Each rank writes FOLDER/<number>.json: case -> [record, curve].
"""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

from dpft.harness.errors import Interrupted
from dpft.harness.execution import interrupts
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import ranks
from dpft.harness.train.run import execute
from dpft.harness.train.settings import Settings
from dpft.methods.full import DPAdam

SIZE = {"task": "low-rank", "steps": 4, "batch_size": 256, "epsilon": 3.0, "eval_every": 2, "eval_examples": 64}
SMALL = Settings(max_tokens=40)  # some microbatches a rank
EQUAL = {  # cases that are held against the same runs in one process
    "two releases": {"method": "dp-adam", "clipping": "quantile"},
    "noise alone": {"method": "noise-only"},
    "numbers": {"method": "dp-zo", "directions": 2},
}


class Odd(DPAdam):
    """dp-adam that goes wrong in its third step as TROUBLE says; TROUBLE(number of the rank)."""

    name = "odd"
    trouble = staticmethod(lambda number: 1.0)

    def step(self, ask, step):
        factor = self.trouble(ranks.here().number) if step == 2 else 1.0
        return {name: factor * update for name, update in super().step(ask, step).items()}


def on_the_second(number):
    if number == 1:
        raise MemoryError
    return 1.0


def spec_of(**more):
    return resolve({**SIZE, **more})


def quiet(step, row):
    pass


def terminated(step, row):
    if step == 3 and ranks.here().number == 1:
        signal.raise_signal(signal.SIGTERM)


def main(folder):
    made = {}
    where = ranks.place()
    registry.load_plugin(__file__)
    odd = registry.method("odd")
    with ranks.met(where, cuda=False) as group:
        for name, settings in EQUAL.items():
            made[name] = execute(spec_of(**settings), SMALL, quiet)
        checkpoint, first = folder / "run.ckpt", spec_of(**EQUAL["two releases"])
        with interrupts.handled():
            try:
                with interrupts.between_steps(group.everyones) as pausing:
                    execute(first, SMALL, pausing(terminated), checkpoint)
            except Interrupted as stop:
                group.alike(str(stop.number), "signal")  # and the checkpoint is there
        made["resumed"] = execute(first, SMALL, quiet, checkpoint)
        made["secret"] = execute(first, replace(SMALL, secure_noise=True), quiet)
        late = replace(SMALL, timeout=1e-9 if group.number == 1 else 1e9)
        made["late"] = execute(first, late, quiet)
        for name, trouble in {"failed": on_the_second, "parted": lambda number: 1.0 + number}.items():
            odd.trouble = staticmethod(trouble)
            made[name] = execute(spec_of(method="odd"), SMALL, quiet)
    (folder / f"{where.number}.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
