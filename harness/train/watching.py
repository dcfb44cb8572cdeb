"""What is seen of one training step: checks of engine and questions, the row of the curve, diagnostics. Nothing is fed back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dpft.harness import devices, probes
from dpft.harness.engine.base import Sums
from dpft.harness.probes import spectra
from dpft.harness.query.noisy_sum import NoisySum
from dpft.harness.query.queries import Gradients, Nothing, Query
from dpft.harness.query.updates import Updates
from dpft.harness.records import digest
from dpft.harness.train import guard
from dpft.harness.train.batches import microbatches
from dpft.harness.train.core import Found, Watcher, encodings_of
from dpft.harness.train.later import AT_ONCE, OneLook
from dpft.harness.train.mechanism import BESIDE
from dpft.harness.train.parts import Run, Setup


class StepWatcher(Watcher):
    """checked: whether engine and questions are compared with single examples before the step's first answers."""

    def __init__(self, setup: Setup, run: Run, indices: Sequence[int], checked: bool):
        self._setup, self._run, self._indices, self._checked = setup, run, indices, checked
        spec, step = setup.spec, run.progress.step
        self.evaluated = (step + 1) % spec.eval_every == 0 or step + 1 == spec.steps
        self._look: probes.Look | None = None
        self._found: Found | None = None
        self._digests: dict[str, str] = {}
        self._bound: float | None = None  # C of the gradients
        # ranks look before their sums meet: one that has diverged must not leave the others in an exchange
        self.later = OneLook() if devices.is_card(setup.device) and setup.ranks.count == 1 else AT_ONCE

    def asked(self, queries: Mapping[str, Query]) -> None:
        if self._checked:
            guard.rehearse(self._setup, self._run, self._indices, dict(queries))

    @contextmanager
    def passing(self) -> Iterator[None]:
        with guard.unchanged(self._setup, self._run.progress.step, self.later):
            yield

    def summed(self, name: str, query: Query, total: Sums, found: Found) -> None:
        setup, run = self._setup, self._run
        if self._found is None or not self._found.losses:
            self._found = None if isinstance(query, Nothing) else found
        if not isinstance(query, Gradients):
            return
        guard.compare(setup, run, self._indices, query, found)
        step, encodings = run.progress.step, encodings_of(query, setup.parameters)
        run.cost.trains = sum(
            encodings[n].reach(p.shape) if n in encodings else p.numel() for n, p in setup.parameters.items()
        )
        if setup.method.kind(step) == probes.SELECTION:
            probes.add_row_scores(run.diagnostics.row_scores, total)
        if self.evaluated and setup.private and self._look is None:
            due = step + 1 in spectra.steps(setup.spec.steps, setup.spec.eval_every)
            clean = {n: total[n] for n in setup.parameters}
            self._look = probes.Look(clean, setup.spec.batch_size, setup.matrices if due else [])

    def released(self, name: str, noisy: NoisySum) -> None:
        if self._setup.private:
            beside = {} if noisy.beside is None else {BESIDE: noisy.beside}
            about, sums = digest.sums({**noisy.tensors, **beside})
            self.later.ask(sums, lambda found: self._digests.update({name: digest.of_sums(about, found)}))
        if name == "gradient":
            self._bound = noisy.clip_norm
        if self._look is not None and not self._look.by_parameter:
            self._look.at_release(noisy)

    def decoded(self, update: Updates) -> None:
        """What the method made of its answers, before the optimizer."""
        run, method, step = self._run, self._setup.method, self._run.progress.step
        if self.evaluated and self._setup.private and not {Gradients, Nothing} & set(method.asks):
            self._look = self._beside_gradients()
            with self._setup.clock.stopped(), probes.uncounted():
                update = {name: update[name] for name in update}
        if self._look is not None:
            estimate, method.decoder.estimate = method.decoder.estimate, None
            self._look.at_update(update if estimate is None else estimate)
            run.diagnostics.alignment_by_parameter.append({"step": step + 1, **self._look.by_parameter})
            if self._look.spectra:
                run.diagnostics.spectra.append({"step": step + 1, "matrices": self._look.spectra})
        chosen = getattr(method, "chosen", None)
        if run.diagnostics.row_scores and chosen and not run.diagnostics.selection:
            run.diagnostics.selection = probes.overlap(run.diagnostics.row_scores, chosen)
        if self.evaluated and method.decoder.observed:  # functions of the release alone: this row costs no privacy
            run.diagnostics.decoder_by_parameter.append({"step": step + 1, **method.decoder.observed})

    def _beside_gradients(self) -> probes.Look:
        """For a method that asks for no gradients: its update is held against the mean gradient of its batch."""
        setup = self._setup
        with setup.clock.stopped(), probes.uncounted():
            batches = microbatches(setup, self._indices, self._run.progress.step)
            total = probes.gradient(setup.engine, batches)
            setup.ranks.add([total])
        look = probes.Look(total, setup.spec.batch_size, [])
        look.by_parameter = {name: {"noisy": None} for name in total}
        return look

    def _of_all(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """[examples of the step], from those of each microbatch of each rank."""
        return self._setup.ranks.joined(torch.cat(parts) if parts else torch.empty(0))

    def row(self) -> dict[str, Any]:
        """The columns of the curve that say what was asked and answered: the mean loss where losses were computed, and so on.

        Settles what the step has left for later. Raises what it was left for.
        """
        losses = self._of_all([] if self._found is None else self._found.losses)
        over = self._of_all([] if self._found is None else self._found.over)
        means: dict[str, float | None] = {"loss": None, "clipped_fraction": None}
        if len(losses):
            self.later.ask(losses.mean(), lambda mean: means.update(loss=float(mean)))
        if len(over) and self._setup.private:
            self.later.ask(over.double().mean(), lambda mean: means.update(clipped_fraction=float(mean)))
        self.later.settle()
        return {
            **means,
            **dict.fromkeys(("alignment_noisy", "alignment_decoded", "snr")),
            **(self._look.row if self._look is not None else {}),
            **({"clip_norm": self._bound} if self._setup.method.rule.adaptive else {}),
            "release": _joined(self._digests) if self._setup.private else None,
        }


def _joined(digests: Mapping[str, str]) -> str | None:
    """One digest of all releases of a step; that of `gradient` itself where it is alone."""
    if set(digests) <= {"gradient"}:
        return digests.get("gradient")
    text = "\n".join(f"{name} {value}" for name, value in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
