"""One of two ranks that share a model, started by tests/train/test_sharded.py: makes small runs with the other.

    RANK=0 ... python sharded_cases.py FOLDER

FOLDER has the models and data of `models`. Each rank writes FOLDER/<number>.json: case -> [record, curve, what was seen].
"""

import json
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import causal_cases
import torch

from dpft.harness.engine import parted
from dpft.harness.engine.factored import FactoredEngine
from dpft.harness.errors import Interrupted
from dpft.harness.execution import interrupts
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import ranks
from dpft.harness.train.run import execute
from dpft.harness.train.settings import Settings

STEPS = {"steps": 3, "eval_every": 3, "epsilon": 3.0}
SENTENCES = {"task": "sst2", "model": "bert", "batch_size": 40, "max_length": 32, "eval_examples": 16, **STEPS}
TEXTS = {"task": "e2e", "model": "llama-tied", "batch_size": 12, "max_length": 40, "max_new_tokens": 6}
TEXTS |= {"eval_examples": 4, **STEPS}
EQUAL = {  # cases that are held against the same runs in one process
    "adapters": {**SENTENCES, "method": "dp-lora"},
    "a language model": {**TEXTS, "method": "ffa-lora"},
    "biases": {**SENTENCES, "method": "dp-bitfit", "clip_groups": "layer"},
    "no privacy": {**SENTENCES, "method": "non-private-lora", "epsilon": None},
}
FEW = 60  # tokens a microbatch, so that ranks have several passes, and not as many


def models(folder, bert):
    """The language model and its data beside what the folder of the mirror has; bert: a folder."""
    (folder / "bert").symlink_to(bert)
    (folder / "llama-tied").mkdir()
    causal_cases.save("llama-tied", folder / "llama-tied")
    causal_cases.mirror(folder)


def spec_of(folder, **asked):
    return resolve({**asked, "model": str(folder / asked["model"])})


def settings_of(folder, sharded):
    return Settings(folder, max_tokens=FEW, shard_model=sharded)


def quiet(step, row):
    pass


@contextmanager
def watched(seen):
    """Notes in `seen` the passes of this rank, and of the blocks: how many there are, how many were there at once, bytes."""
    bring, accumulate = parted.Parted._bring, FactoredEngine.accumulate

    def noting(self, block):
        found = bring(self, block)
        there = [one for one in self.blocks if one.room is not None]
        seen["at once"] = max(seen.get("at once", 0), len(there))
        seen["blocks"], seen["own"] = len(self.blocks), sum(len(one.own) for one in self.blocks)
        seen["all"] = sum(p.numel() * 4 for one in self.blocks for p in one.parameters)
        seen["largest"] = max(2 * len(one.own) for one in self.blocks)
        return found

    def counting(self, *asked):
        seen["passes"] = seen.get("passes", 0) + 1
        return accumulate(self, *asked)

    parted.Parted._bring, FactoredEngine.accumulate = noting, counting
    try:
        yield
    finally:
        parted.Parted._bring, FactoredEngine.accumulate = bring, accumulate


@contextmanager
def out_of_memory(number):
    """The third pass of that rank ends in the middle of its forward, when blocks are wanted by the other."""
    bring, count = parted.Parted._bring, 0

    def failing(self, block):
        nonlocal count
        count += 1
        if count == 7 and ranks.here().number == number:
            raise MemoryError
        return bring(self, block)

    parted.Parted._bring = failing
    try:
        yield
    finally:
        parted.Parted._bring = bring


def terminated(step, row):
    if step == 2 and ranks.here().number == 1:
        signal.raise_signal(signal.SIGTERM)


def main(folder):
    torch.set_num_threads(1)
    made, where = {}, ranks.place()
    again = set()  # one comparison with autograd for the runs that are alike
    with ranks.met(where, cuda=False) as group:
        for name, asked in EQUAL.items():
            seen = {}
            with watched(seen):
                made[name] = [
                    *execute(spec_of(folder, **asked), settings_of(folder, True), quiet, compared=again),
                    seen,
                ]
        first, whole, parts = (
            spec_of(folder, **EQUAL["adapters"]),
            settings_of(folder, False),
            settings_of(folder, True),
        )
        made["whole"] = [*execute(first, whole, quiet, compared=again), {}]
        made["nothing frozen"] = [*execute(spec_of(folder, **SENTENCES, method="dp-adam"), parts, quiet), {}]
        with out_of_memory(1):
            made["failed"] = [*execute(first, parts, quiet, compared=again), {}]
        checkpoint = folder / "run.ckpt"
        with interrupts.handled():
            try:
                with interrupts.between_steps(group.everyones) as pausing:
                    execute(first, parts, pausing(terminated), checkpoint, compared=again)
            except Interrupted as stop:
                group.alike(str(stop.number), "signal")  # and the checkpoint is there
        made["resumed"] = [*execute(first, parts, quiet, checkpoint, compared=again), {}]
        made["secret"] = [*execute(first, replace(parts, secure_noise=True, recompute=True), quiet), {}]
    (folder / f"{where.number}.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
