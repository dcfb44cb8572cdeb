"""Bad values on the command line."""

from __future__ import annotations

import dataclasses
import random

from .case import Case
from .values import HUGE, NAMES, NESTED, NO_NUMBER, NO_WHOLE
from .world import World

TINY = ("--task", "low-rank", "--model", "linear", "--batch-size", "64", "--steps", "2")
NUMBERS = ("epsilon", "lr", "clip-norm", "delta")
WHOLE = ("steps", "batch-size", "seeds")
OF_RUN = (
    ("timeout", NO_NUMBER + ("-1", "0")),
    ("checkpoint-every", NO_NUMBER),
    ("jobs", NO_WHOLE),
    ("ranks", (*NO_WHOLE, "0", "-1")),
    ("max-tokens", NO_WHOLE),
    ("shard", (*NO_NUMBER, "0/1", "2/1", "1/0", "1/2/3", "1", "-1/-2")),
    ("replay", NAMES),
    ("engine", NAMES),
    ("device", (*NAMES, "cuda:99", "cuda:-1", "gpu")),
)


def settings(world: World, rng: random.Random) -> Case:
    """--set KEY=VALUE with a value that no field can hold."""
    from dpft.harness.runs.spec import RunSpec

    kinds = {field.name: field.type for field in dataclasses.fields(RunSpec)}
    keys = sorted(key for key in kinds if not key.endswith(("version", "options")) and key != "noise_stream")
    key = rng.choice(keys)
    value = rng.choice((*NO_NUMBER, NESTED, "[[1]]", '{"a": 1}', "9" * 400))
    if any(word in kinds[key] for word in ("Name", "Filled", "str")):
        value = rng.choice((*NAMES, "[]", "1", "true", NESTED, "[[1]]", '{"a": 1}', "NaN"))
    fine = key in ("model", "noise_law") and value not in ("[]", "1", "true", "[[1]]")
    arguments = (*TINY, "--method", "non-private", "--set", f"{key}={value}")
    return Case("settings", f"--set {key}={value[:60]!r}", ("plan", *arguments), may_accept=fine or value == "1,,2")


def limits(world: World, rng: random.Random) -> Case:
    """--set KEY=NUMBER far beyond anything."""
    key = rng.choice(
        (
            "seed",
            "steps",
            "batch_size",
            "max_length",
            "views",
            "eval_every",
            "eval_examples",
            "momentum",
            "weight_decay",
            "lr",
            "warmup_steps",
        )
    )
    value = rng.choice(("-1", "-5", "1e300", "99999999999999999999999", "5e30"))
    arguments = (*TINY, "--method", "non-private", "--set", f"{key}={value}")
    return Case("limits", f"--set {key}={value}", ("plan", *arguments))


def options(world: World, rng: random.Random) -> Case:
    """--set OPTION=VALUE of a method, decoder, clipping rule or task."""
    from dpft.harness.runs import registry

    kind = rng.choice(("methods", "decoders", "clippings", "tasks"))
    owners = [one for one in getattr(registry, kind)().values() if one.options]
    owner = rng.choice(owners)
    key = rng.choice(sorted(owner.options))
    text = isinstance(owner.options[key], str)
    value = rng.choice((*NAMES, "[]", "{}", "3", NESTED) if text else (*NO_WHOLE, *HUGE, NESTED, '"1"'))
    setting = {"methods": "--method", "decoders": "--set", "clippings": "--set", "tasks": "--task"}[kind]
    name = owner.name if kind in ("methods", "tasks") else f"{kind.rstrip('s')}={owner.name}"
    base = [*TINY[2:], "--task", "low-rank", "--method", "dp-sgd"]
    if kind == "tasks":
        base = [*TINY[4:], "--method", "non-private"]
    elif kind == "methods":
        base = list(TINY)
    bad = value in ("[]", "{}", NESTED) or (not text and value in NO_NUMBER)
    arguments = ("plan", *base, setting, name, "--set", f"{key}={value}")
    return Case("options", f"{owner.name}: {key}={value[:60]!r}", arguments, may_accept=not bad)


def numbers(world: World, rng: random.Random) -> Case:
    """--epsilon, --steps, ... with what is no number."""
    key = rng.choice((*NUMBERS, *WHOLE))
    value = rng.choice(NO_NUMBER if key in NUMBERS else NO_WHOLE)
    method = "dp-sgd" if key in ("epsilon", "clip-norm") else "non-private"
    return Case("numbers", f"--{key} {value[:40]!r}", ("plan", *TINY, "--method", method, f"--{key}={value}"))


def of_run(world: World, rng: random.Random) -> Case:
    """Options of `dpft run` alone."""
    key, values = rng.choice(OF_RUN)
    value = rng.choice(values)
    base = () if key == "replay" else (*TINY, "--method", "non-private")
    arguments = ("run", *base, "--results", str(world.folder / "runs"), f"--{key}={value}")
    return Case("run", f"--{key} {value[:40]!r}", arguments)


def names(world: World, rng: random.Random) -> Case:
    """Names of things that do not exist."""
    name = rng.choice(NAMES)
    command = rng.choice(
        (
            ("describe", name),
            ("list", name),
            ("plan", name),
            ("run", name),
            ("plan", *TINY, "--method", name),
            ("plan", "--method", "dp-sgd", "--task", name),
            ("plan", *TINY, "--method", "dp-sgd", "--set", f"{name}=1"),
            ("plan", *TINY, "--method", "dp-sgd", "--set", name),
            ("memory", "--method", name, "--model", "minilm-l6"),
            ("audit", name),
            ("bench", "--cells", name or "x"),
            ("bench", "--engines", name or "x"),
            ("report", str(world.results), "--baseline", name or "x"),
            ("report", str(world.results), "--brief", "--baseline", name or "x"),
            ("report", str(world.results), "--board", name or "x"),
            ("report", str(world.results), "--task", name or "x"),
            ("trip", name or "x", "--results", str(world.results), "-o", str(world.folder / "trip.svg")),
            ("advise", "--task", name),
            ("plan", *TINY, "--method", name, rng.choice(("--what-if", "--samplers", "--users"))),
            ("verify", str(world.folder / "no") + name[:200].replace("\x00", "")),
            ("--plugin", name, "list", "methods"),
            (name, "x"),
            (f"--{name}",),
        )
    )
    return Case("names", " ".join(map(repr, command))[:120], command)


def others(world: World, rng: random.Random) -> Case:
    """Numbers of the other commands."""
    bad, whole = rng.choice(NO_NUMBER), rng.choice(NO_WHOLE)
    command = rng.choice(
        (
            ("noise", f"--epsilon={bad}"),
            ("noise", f"--delta={bad}"),
            ("noise", f"--dimension={whole}"),
            ("noise", f"--steps={whole}"),
            ("noise", f"--epsilon={rng.choice(('-1', '0', '1e300', '1e-300'))}"),
            ("noise", f"--delta={rng.choice(('-1', '2', '1e300'))}"),
            ("noise", f"--dimension={rng.choice(('-1', '0', '9' * 30))}"),
            ("noise", f"--published={bad}"),
            ("noise", "--published", f"gamma({bad},1)"),
            ("memory", f"--batch={whole}"),
            ("memory", f"--length={rng.choice((*NO_WHOLE, '9' * 30))}"),
            ("memory", f"--fits={rng.choice((*NO_NUMBER, '-1GiB', 'infGiB', 'nan GiB', '1e999GiB'))}"),
            ("memory", "--method", "dp-sgd", "--set", f"lr={rng.choice(('NaN', '[]', '[1]', NESTED))}"),
            ("report", str(world.results), "--view", "memory", f"--memory-cap={rng.choice((*NO_NUMBER, '-5'))}"),
            ("check", str(world.results), "--baseline", str(world.blessed), f"--level={bad}"),
            ("check", str(world.results), "--baseline", str(world.blessed), f"--margin={bad}"),
            ("check", str(world.results), "--baseline", str(world.blessed), f"--time-margin={bad}"),
            ("audit", "dp-sgd", f"--sampling-rate={rng.choice((*NO_NUMBER, '-1', '0', '2'))}"),
            ("audit", "dp-sgd", f"--epsilon={bad}"),
            ("audit", "dp-sgd", f"--delta={bad}"),
            ("audit", "dp-sgd", f"--seed={rng.choice((*NO_WHOLE, '9' * 30))}"),
            ("audit", "dp-sgd", f"--steps={rng.choice((*NO_WHOLE, '9' * 30))}"),
            ("bench", f"--rounds={whole}"),
            ("plan", *TINY, "--method", "dp-sgd", f"--tries={rng.choice((*NO_NUMBER, '-1', '0', '1e300'))}"),
        )
    )
    return Case("other commands", " ".join(command)[:120], command)


COMMANDS = {
    "settings": settings,
    "limits": limits,
    "options": options,
    "numbers": numbers,
    "run": of_run,
    "names": names,
    "other commands": others,
}
