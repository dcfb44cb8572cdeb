"""Small runs on a card that is not there (cards.py), each cut short and resumed: `card_runs.py MIRROR MODEL WHAT...` prints a
line of JSON for each.

WHAT is a method, with settings behind it (`dp-adam,clipping=quantile`). `checked:` before it: with the comparisons with autograd;
the name of a planted defect (card_defects.py) before it: with that.
"""

import json
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import card_defects
import cards

from dpft.harness.engine import factored
from dpft.harness.errors import Interrupted
from dpft.harness.query import updates
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import guard, loop, run
from dpft.harness.train.settings import Settings

STEPS, CUT = 5, 3
STEP = {"ordinary": 2, "resumed": 3, "evaluated": 4}
SIZE = {
    "task": "sst2",
    "batch_size": 30,
    "steps": STEPS,
    "eval_every": STEPS,
    "epsilon": 3.0,
    "max_length": 32,
    "eval_examples": 16,
}
FEWER = {"directions": 2, "trajectory_steps": 16, "trial_steps": 4, "examples": 32}


@contextmanager
def watched(machine, looks):
    """Inside, `looks` gets by step what waited before the update was handed over, and in all."""
    measured, apply, begun = loop._measured_step, updates.apply, [0]

    def step(setup, made, *rest):
        begun[0] = len(machine.looks)
        own = looks[made.progress.step] = {}
        try:
            return measured(setup, made, *rest)
        finally:
            own["all"] = machine.looks[begun[0] :]
            own.setdefault("before", own["all"])

    def applied(*what):
        looks[max(looks)].setdefault("before", machine.looks[begun[0] :])
        return apply(*what)

    with patch.object(loop, "_measured_step", step), patch.object(updates, "apply", applied):
        yield


def main(mirror, model, names):
    for what in names:
        how, _, name = what.rpartition(":")
        method, *settings = name.split(",")
        more = dict(pair.split("=") for pair in settings)
        more = {key: json.loads(value) if value[0].isdigit() else value for key, value in more.items()}
        more |= {key: value for key, value in FEWER.items() if key in registry.method(method).options}
        spec = resolve({**SIZE, "method": method, "model": model, **more})
        with ExitStack() as stack:
            if how != "checked":
                for module, check in ((guard, "rehearse"), (guard, "compare"), (factored, "agree")):
                    stack.enter_context(patch.object(module, check, lambda *_: True))
            if how in card_defects.PLANTED:
                stack.enter_context(card_defects.PLANTED[how]())
            print(json.dumps({"name": what, **found(spec, mirror)}), flush=True)


def found(spec, mirror):
    """What a run came to, which lines waited for the card in steps of each kind, and which cards were timed and counted."""
    looks, begun = {}, time.process_time()
    settings = Settings(data_dir=Path(mirror), device="card:0", max_tokens=256, checkpoint_seconds=0.0)

    def cut(step, row):
        if step == CUT:
            raise Interrupted(15)

    with tempfile.TemporaryDirectory() as folder, cards.Machine(current=1) as machine, watched(machine, looks):
        path = Path(folder) / "checkpoint"
        try:
            record, curve = run.execute(spec, settings, cut, path)
        except Interrupted:
            record, curve = run.execute(spec, settings, lambda step, row: None, path)
    return {
        "status": record["status"],
        "error": record["error"],
        "rows": len(curve),
        "before": {kind: told(looks.get(step, {}).get("before", ())) for kind, step in STEP.items()},
        "all": {kind: told(looks.get(step, {}).get("all", ())) for kind, step in STEP.items()},
        "cards": sorted({*machine.events, *machine.waited, *machine.counted}),
        "asked": [len(machine.events), len(machine.waited), len(machine.counted)],
        "seconds": time.process_time() - begun,
    }


def told(looks):
    return [f"{look.operation} at {look.line}" for look in looks]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
