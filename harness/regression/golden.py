"""Golden traces: the first steps of every method on a tiny task, equal bit for bit on one platform."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dpft.harness.border.documents import Misfit, fitted, sentence
from dpft.harness.border.values import Name, Number
from dpft.harness.errors import BadInput
from dpft.harness.records.schema import fitted_spec
from dpft.harness.regression import baseline
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.runs.spec import completed

# A task with its own model: nothing to download. The batch is large enough for the signal to stand out of the noise, so that
# spectral decoders do something; 20 steps reach every branch that depends on the step.
SETTINGS = {"task": "low-rank", "epsilon": 8.0, "batch_size": 1024, "steps": 20, "eval_every": 5, "eval_examples": 64}
# Models, and what adapters are put on, as they have no attention. The second is for methods that need biases and a head.
MODELS = {"linear": "linear", "layers": "features"}
COLUMNS = ("loss", "metric", "norm")  # compared within TOLERANCE on another platform; there the digest is not
TOLERANCE = 1e-3  # relative: rounding of fp32 over 20 steps stays below it, noise 20% too large does not
NOT_FINE = {"differs": 1, "not comparable": 2, "gone": 2}  # verdict -> exit code


class Trace(msgspec.Struct, forbid_unknown_fields=True):
    """What was seen of a method, a value for each step; null where there is none."""

    spec: dict[str, Any]
    status: Name
    reason: str | None
    loss: list[Number | None]
    metric: list[Number | None]
    norm: list[Number | None]
    digest: list[str]


class Golden(msgspec.Struct):
    """A whole baseline file of traces."""

    platform: dict[str, Any]
    traces: Annotated[dict[Name, Trace], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class Verdict:
    """method; verdict: `equal`, `close` (another platform), `new`, or one of NOT_FINE; reason: what differs, or None."""

    method: str
    verdict: str
    reason: str | None = None


def platform() -> dict[str, Any]:
    """What decides how sums are rounded: on the same platform a trace repeats bit for bit. Traces run on one thread."""
    import numpy
    import torch

    from dpft.harness.records.provenance import cpu

    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cpu": cpu(),
        "capability": capability,
        "threads": 1,
    }


def trace(method: str) -> dict[str, Any]:
    """spec, status (`done`, `skipped`, ...), reason, and per step loss, metric, L2 norm and digest of the trainable weights.

    On the first of MODELS that the method runs on.
    """
    for model in MODELS:
        found = _trace(method, model)
        if found["status"] == "done":
            break
    return found


def _trace(method: str, model: str) -> dict[str, Any]:
    from dpft.harness.runs.plan import plan
    from dpft.harness.train import loop, run
    from dpft.harness.train.parts import Run
    from dpft.harness.train.settings import Settings, exact_fp32

    exact_fp32()
    targets = {"targets": MODELS[model]} if "targets" in registry.method(method).options else {}
    spec = resolve({**SETTINGS, "method": method, "model": model, **targets})
    columns: dict[str, list] = {name: [] for name in (*COLUMNS, "digest")}
    status, reason, setup = "done", None, None
    with one_thread():
        try:
            setup = run.build(spec, Settings(), plan(spec, None), None)
            loop.train(setup, Run(), lambda step, row: _look(columns, row, setup.parameters))
        except Exception as error:
            status, reason = run.classify(error)
        finally:
            if setup is not None:
                setup.engine.close()
                setup.mechanism.close()
    return {"spec": spec.to_dict(), "status": status, "reason": reason, **columns}


def _look(columns: dict[str, list], row: dict[str, Any], parameters: dict[str, Any]) -> None:
    digest, square = hashlib.sha256(), 0.0
    for name, parameter in sorted(parameters.items()):
        values = parameter.detach()
        digest.update(name.encode() + values.numpy().tobytes())
        square += float(values.double().square().sum())
    found = {"loss": row["loss"], "metric": row["metric"], "norm": math.sqrt(square), "digest": digest.hexdigest()[:16]}
    for name, value in found.items():
        columns[name].append(value)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside: sums are cut the same way whatever the number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def traces(methods: list[str] | None = None, observe: Callable[[str], None] = lambda method: None) -> dict[str, Any]:
    """The traces of `methods` (default: all that are registered) by name; `observe` is told each name before its turn."""
    found = {}
    for method in methods if methods is not None else list(registry.methods()):
        observe(method)
        found[method] = trace(method)
    return found


def bless(path: Path, found: dict[str, Any]) -> None:
    """Write `found` as the baseline of this platform."""
    baseline.write(path, "golden", {"platform": platform(), "traces": found})


def check(path: Path, observe: Callable[[str], None] = lambda method: None) -> list[Verdict]:
    """Trace every method again and compare with the baseline at `path`. Raises BadInput when that cannot be read."""
    document = baseline.read(path, "golden")
    try:
        fitted(document, Golden)
        for name, one in document["traces"].items():
            _check(name, one)
    except Misfit as problem:
        raise baseline.damaged(path, sentence(problem)) from None
    return compare(document["traces"], traces(None, observe), changes(document["platform"], platform()))


def _check(name: str, one: dict[str, Any]) -> None:
    """Raises Misfit unless the spec of a trace is that of a run, and its columns are of one length."""
    fitted_spec(one["spec"], f"traces.{name}.spec")
    for column in COLUMNS:
        if len(one[column]) != len(one["digest"]):
            raise Misfit(
                f"traces.{name}.{column}", f"has {len(one[column])} steps, and digest has {len(one['digest'])}"
            )


def compare(old: dict[str, Any], new: dict[str, Any], differing: list[str]) -> list[Verdict]:
    """One verdict per method. differing: how this platform differs from the baseline's; exact when there are none."""
    found = []
    for method in sorted(old.keys() | new.keys()):
        if method not in old:
            found += [Verdict(method, "new", "not in the baseline; bless it")]
        elif method not in new:
            found += [Verdict(method, "gone", "not registered any more; bless the baseline anew")]
        else:
            found += [_compare(method, old[method], new[method], differing)]
    return found


def _compare(method: str, old: dict[str, Any], new: dict[str, Any], differing: list[str]) -> Verdict:
    if other := changes(completed(old["spec"]), completed(new["spec"])):
        return Verdict(method, "not comparable", ", ".join(other))
    if (old["status"], old["reason"]) != (new["status"], new["reason"]):
        told = [f"{one['status']}" + (f" ({one['reason']})" if one["reason"] else "") for one in (new, old)]
        return Verdict(method, "differs", f"it is {told[0]}, was {told[1]}")
    difference = _first_difference(old, new, exact=not differing)
    if difference is None:
        return Verdict(method, "close" if differing else "equal", old["reason"])
    if differing:
        return Verdict(method, "not comparable", f"{', '.join(differing)}; and {difference}")
    return Verdict(method, "differs", difference)


def _first_difference(old: dict[str, Any], new: dict[str, Any], exact: bool) -> str | None:
    """The first step at which the traces differ, or None."""
    if len(old["digest"]) != len(new["digest"]):
        return f"there are {len(new['digest'])} steps, were {len(old['digest'])}"
    for step in range(len(old["digest"])):
        for name in (*COLUMNS, "digest") if exact else COLUMNS:
            a, b = old[name][step], new[name][step]
            if a == b or (not exact and None not in (a, b) and math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-6)):
                continue
            label = "weights (digest)" if name == "digest" else {"norm": "norm of the weights"}.get(name, name)
            return f"step {step + 1}: {label} {b}, was {a}"
    return None


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two platforms or specs, in words."""
    return [f"{k} is {new.get(k)}, was {old.get(k)}" for k in {**old, **new} if new.get(k) != old.get(k)]


def exit_code(verdicts: list[Verdict]) -> int:
    """1 when a trace differs on its own platform, else 2 when one cannot be compared, else 0."""
    codes = {NOT_FINE.get(one.verdict, 0) for one in verdicts}
    return 1 if 1 in codes else max(codes)


def markdown(verdicts: list[Verdict]) -> str:
    """The verdicts as a table."""
    from tabulate import tabulate

    if not verdicts:
        raise BadInput("There is no method to trace.")
    rows = [(one.method, one.verdict, one.reason or "") for one in verdicts]
    return tabulate(rows, headers=("method", "trace", "why"), tablefmt="github")
