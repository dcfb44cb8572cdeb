"""What is audited: a method on canaries, set up by the code that sets up its runs, and run by the loop of its runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpft.harness import loop, run
from dpft.harness.errors import BadInput
from dpft.harness.plan import PrivacyPlan, plan
from dpft.harness.run_settings import Settings
from dpft.harness.spec import RunSpec, resolve

MICROBATCH = 4  # canaries per microbatch, so that a step has several
MOST = 256  # canaries of which every step's directions are computed
TINY_LR = 1e-30  # weights stay where they are


@dataclass(frozen=True)
class Question:
    """What is to be audited. epsilon, delta, steps T, sampling_rate q, canaries n: of the run; changes: other settings of the
    spec, as of `dpft run --set`; seed: of sampler, noise and model, so that an audit repeats exactly.
    """

    method: str
    epsilon: float = 4.0
    delta: float = 1e-5
    steps: int = 200
    sampling_rate: float = 0.125
    canaries: int = 64
    seed: int = 0
    engine: str = "factored"
    changes: dict[str, Any] = field(default_factory=dict)

    def spec(self, **more: Any) -> RunSpec:
        """The run that is made. Raises BadInput for settings that cannot work and for methods without an epsilon."""
        if not 0 < self.sampling_rate <= 1:
            raise BadInput(f"The sampling rate must lie in (0, 1], not {self.sampling_rate}; correct it.")
        settings = {
            "task": "canaries",
            "model": f"canaries-{self.canaries}",
            "method": self.method,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "steps": self.steps,
            "eval_every": self.steps,
            "batch_size": max(1, round(self.sampling_rate * self.canaries)),
            "seed": self.seed,
        }
        spec = resolve({**settings, **self.changes, **more})
        if spec.epsilon is None:
            raise BadInput(f"{self.method} is not private: there is no epsilon to audit; name a private method.")
        return spec

    def plan(self, spec: RunSpec) -> PrivacyPlan:
        """The budget of `spec`, calibrated as for a run on as many examples as there are canaries."""
        return plan(spec, None, num_examples=self.canaries)


@contextlib.contextmanager
def built(question: Question, spec: RunSpec, privacy: PrivacyPlan) -> Iterator[loop.Setup]:
    """The run as `dpft run` builds it, on microbatches of MICROBATCH canaries."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers are small
    setup = None
    try:
        setup = run.build(spec, Settings(engine=question.engine, max_tokens=MICROBATCH), privacy, None)
        yield setup
    except run.Skipped as reason:
        raise BadInput(f"{question.method} cannot be audited on the canaries' model: {reason}") from None
    finally:
        if setup is not None:
            setup.engine.close()
            setup.mechanism.close()
        torch.set_num_threads(threads)


def aim(setup: loop.Setup) -> torch.Tensor:
    """Point a quarter of the canaries at one trained layer each and the others at all; returns the layer [canaries], -1: all.

    A layer trains when a parameter inside it does: adapters are inside the layer they adapt.
    """
    model = setup.prepared.model
    live = [i for i, site in enumerate(model.sites) if any(n.startswith(f"{site}.") for n in setup.parameters)]
    if not live:
        raise BadInput("The method trains none of the layers of the canaries' model, so nothing can be audited.")
    count = len(model.aims)
    places = torch.full((count,), -1)
    if len(live) > 1:
        single = torch.arange(3, count, 4)
        places[single] = torch.tensor(live)[torch.arange(len(single)) % len(live)]
        model.aims[single] *= torch.nn.functional.one_hot(places[single], len(model.sites)).to(model.aims.dtype)
    return places


def watch(setup: loop.Setup, seen: Callable[[list[int], Any, int], Any]) -> Counter:
    """Call `seen(batch, release, step)` with what the method is about to decode; a result that is not None is decoded instead.

    Every step's batch and release as they really are: the sampler's return value and the argument of `Method.decode`.
    Returns a counter of the releases that the mechanism makes.
    """
    sample, decode, original = setup.sampler.sample, setup.method.decode, setup.mechanism.release
    batches: list[list[int]] = []
    made: Counter = Counter()

    def released(clipped_sum):
        made["releases"] += 1
        return original(clipped_sum)

    def sampled() -> list[int]:
        batches[:] = [sample()]
        return list(batches[0])

    def decoded(noisy, step):
        instead = seen(batches[0], noisy, step)
        return decode(noisy, step) if instead is None else instead

    setup.sampler.sample, setup.method.decode, setup.mechanism.release = sampled, decoded, released
    return made


def train(setup: loop.Setup, observe: loop.Observer | None = None) -> loop.State:
    """The loop's own training, from its first step."""
    state = loop.State()
    loop.train(setup, state, observe or (lambda step, row: None))
    return state


def silent(spec: RunSpec, privacy: PrivacyPlan, steps: int) -> tuple[RunSpec, PrivacyPlan]:
    """The same run of `steps` steps with weights that stay where they are; its budget is not looked at."""
    still = dataclasses.replace(
        spec, steps=steps, eval_every=steps, lr=TINY_LR, weight_decay=0.0, schedule="constant", warmup_steps=0
    )
    return still, dataclasses.replace(privacy, epsilon_curve=[0.0] * (steps + 1))


def encodings_of(setup: loop.Setup, step: int) -> dict[str, Any]:
    """The encodings that the loop asks for in this step, by name."""
    found = {name: setup.method.encoding(name, p, step) for name, p in setup.parameters.items()}
    return {name: encoding for name, encoding in found.items() if encoding is not None}


def directions(setup: loop.Setup, step: int, canaries: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(unit vectors [canaries, encoded coordinates], norms [canaries]) of their gradients at the present weights.

    By torch.func on the model alone, fp32: no engine has a part in it.
    """
    from torch.func import functional_call, grad, vmap

    model = setup.prepared.model
    parameters = {name: p.detach() for name, p in setup.parameters.items()}
    rest = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if n not in parameters}

    def loss(values, canary):
        batch = {"canary": canary[None], "weight": torch.ones(1)}
        return functional_call(model, (values, rest), (), batch).sum()

    index = torch.as_tensor(list(canaries))
    with _unhooked(model):
        gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, index)
    encodings = encodings_of(setup, step)
    rows = [encodings[n].dense(g) if n in encodings else g for n, g in gradients.items()]
    flat = torch.cat([row.reshape(len(index), -1) for row in rows], 1)
    norms = flat.norm(dim=1)
    return flat / norms.clamp_min(1e-30)[:, None], norms


@contextlib.contextmanager
def _unhooked(model: torch.nn.Module) -> Iterator[None]:
    """Without the hooks that an engine has put on the model: they are part of what is audited."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    try:
        for module, kind, hooks in kept:
            setattr(module, kind, type(hooks)())
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)
