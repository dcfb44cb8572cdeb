"""A method that asks several questions a step, and a finished record of it.

The record is a committed run's, with privacy section, curve and chain made as the harness makes them.
"""

import json

from forged_cases import SST2, load, renamed

from dpft.harness.privacy import Ledger, certify
from dpft.harness.records import chain
from dpft.harness.runs import registry
from dpft.harness.runs.plan import plan
from dpft.harness.runs.spec import RunSpec, completed

NAME = "several-questions"
PLUGIN = f'''
from dpft.methods.lora import DPLoRA


class Several(DPLoRA):
    """A vote in its first five steps, then a count beside the gradient, every tenth step without it."""

    name = "{NAME}"

    def releases(self, step):
        if step < 5:
            return {{"vote": 0.5, "gradient": 0.5}}
        return {{"gradient": 1.0}} if step % 10 == 9 else {{"gradient": 0.99, "count": 0.01}}
'''


def register(folder):
    """The method, until `unregister`."""
    path = folder / "several_questions.py"
    path.write_text(PLUGIN)
    registry.load_plugin(path)
    return path


def unregister():
    registry._PLUGINS.clear()
    registry.forget()


def ledger_of(made):
    """What a run with that plan books."""
    ledger = Ledger()
    for step in range(len(made.epsilon_curve) - 1):
        ledger.append(step, made.sampling_probability, [noise.entry(name) for name, noise in made.noises(step).items()])
    return ledger


def certified(record, rows, made, ledger):
    """The privacy section, the curve's epsilon and the chain, of that ledger."""
    privacy, target = record["privacy"], record["spec"]["epsilon"]
    privacy |= {
        "sampling_probability": made.sampling_probability,
        "noise_multiplier": made.noise_multiplier,
        "noise_stream": 2,
        "releases_per_step": ledger.releases_per_step,
        "ledger": ledger.events,
        **certify(ledger.events, privacy["delta"], target, 2),
    }
    for row in rows:
        row["epsilon"] = made.epsilon_curve[row["step"]]
        row["release"] = f"{row['step']:032x}"
    privacy["epsilon_at_threshold"] = made.epsilon_curve[record["result"]["steps_to_threshold"]]
    chained(record, rows)


def chained(record, rows):
    """The chain made anew, as any author can."""
    *_, value = chain.values(record, rows)
    record["chain"] = {"version": chain.VERSION, "value": value}


def shared_record():
    """(record, rows); `register` must have been called."""
    record, rows = load(SST2)
    record["spec"] |= {"method": NAME, "method_version": 1, "noise_stream": 2}
    renamed(record, rows)
    made = plan(RunSpec(**completed(record["spec"])), None, num_examples=record["privacy"]["num_examples"])
    certified(record, rows, made, ledger_of(made))
    return json.loads(json.dumps(record)), rows
