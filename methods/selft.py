"""DP-SelFT: the blocks that train are those that learn under noise of the run's size, tried on public data (2605.17432).

Prediction: at most 1 point above dp-adam on `sentences`. Half the blocks have half the noise, sqrt(2) in alignment at best, and
single words say little about which blocks sentences need.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.errors import BadInput
from dpft.methods import projection
from dpft.methods.base import freeze_all_but
from dpft.methods.decoders.moments import Adam
from dpft.methods.full import DPAdam
from dpft.methods.trajectory import move, put_back

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpft.harness.query.public import Public
    from dpft.harness.runs.spec import RunSpec


class DPSelFT(DPAdam):
    """DP-Adam on the head and on the `selected_fraction` of the numbered blocks that did best in a trial on public data.

    A trial of a block: it and the head train for `trial_steps` steps on `trial_batch` public examples each, with the run's
    optimizer and learning rates, on `clip(gradient, C) + N(0, (sigma C / B)^2)`; sigma, C and B are the run's. Its score is the
    loss on the quarter of the public examples that it has not seen, the mean of `trials` trials with other noise. Then the
    weights are put back. All of that is public, so it costs no budget, and nothing of it is carried into the run but names.
    The gradient of a public batch is clipped as one. The paper tries sets of blocks, under the worst perturbation of that size
    and on data of a generator trained with privacy; such a generator is not built here: public examples stand for it.
    """

    name = "dp-selft"
    summary = "head and the blocks that learn best on public data under noise of the run's size"
    reference = "arXiv:2605.17432"
    needs_public = True
    options: ClassVar = {
        **DPAdam.options,
        "selected_fraction": 0.5,
        "trial_steps": 20,
        "trial_batch": 32,
        "trials": 1,
    }
    ranges: ClassVar = {
        "selected_fraction": (1e-6, 1.0),
        "trial_steps": (1, float("inf")),
        "trial_batch": (1, float("inf")),
        "trials": (1, float("inf")),
    }

    def validate(self, spec: RunSpec) -> None:
        super().validate(spec)
        if spec.mechanism != "gaussian":
            raise BadInput(f"{self.name} tries blocks under Gaussian noise; leave out mechanism={spec.mechanism}.")

    def skip(self, model: nn.Module) -> str | None:
        if len(self._blocks(model)) < 2:
            return f"{self.name} chooses among numbered blocks and this model has fewer than two; use dp-adam."
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        import torch

        model = model.to(self.public.device)
        seed = int(torch.randint(2**62, (), generator=generator))
        blocks, head = self._blocks(model), set(model.head_parameters)
        examples, rest = self.public.examples, max(1, len(self.public) // 4)
        seen, unseen = (replace(self.public, examples=part) for part in (examples[rest:] or examples, examples[:rest]))
        numbers = range(self.settings["trials"])
        self.scores = {
            block: sum(self._trial(model, names | head, seen, unseen, seed + n) for n in numbers) / len(numbers)
            for block, names in blocks.items()
        }
        count = max(1, round(self.settings["selected_fraction"] * len(blocks)))
        self.selected = sorted(blocks, key=lambda block: self.scores[block])[:count]
        freeze_all_but(model, head.union(*(blocks[block] for block in self.selected)))
        return model

    def _trial(self, model: nn.Module, names: set[str], seen: Public, unseen: Public, seed: int) -> float:
        """The loss on `unseen` after training `names` with noise on `seen`; the model is left as it was."""
        freeze_all_but(model, names)
        parameters, adam = {name: p for name, p in model.named_parameters() if name in names}, Adam()
        with put_back(model, parameters):
            for step in range(self.settings["trial_steps"]):
                batch = seen.batch(self.settings["trial_batch"], step)
                parts = self.noised(seen.gradient(model, parameters, batch), seed, step)
                if self.spec.optimizer != "sgd":
                    adam.precondition(parts, lambda name, step=step: step + 1)
                for name in parts.keys() & set(model.head_parameters):
                    parts[name] *= self.settings["head_lr_factor"]
                move(parameters, parts, self.spec.lr)
            size = self.settings["trial_batch"]
            batches = [unseen.batch(size, number) for number in range(max(1, len(unseen) // size))]
            loss = sum(unseen.mean_loss(model, batch) for batch in batches) / len(batches)
        return loss if loss == loss else float("inf")  # nan: it diverged

    def noised(self, gradient: dict[str, torch.Tensor], seed: int, step: int) -> dict[str, torch.Tensor]:
        """A public gradient as a release of the run would have it: no longer than C, and noise of std sigma C / B on it."""
        import torch

        clip_norm = self.spec.clip_norm
        std = self.noise_multiplier * clip_norm / self.spec.batch_size
        norm = float(torch.stack([g.norm() for g in gradient.values()]).norm())
        factor, found = min(1.0, clip_norm / max(norm, 1e-30)), {}
        for name, g in gradient.items():
            draw = projection.generator(g.device, seed, step, len(found))
            found[name] = (g * factor).add_(torch.empty_like(g).normal_(generator=draw), alpha=std)
        return found

    @staticmethod
    def _blocks(model: nn.Module) -> dict[str, set[str]]:
        """Numbered blocks outside the head -> names of their parameters."""
        found: dict[str, set[str]] = {}
        for name, _ in model.named_parameters():
            block = re.match(r"(.*?\.\d+)\.", name)
            if block and name not in model.head_parameters:
                found.setdefault(block.group(1), set()).add(name)
        return found
