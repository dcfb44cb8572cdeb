"""The bound starts at a vote and follows the loss on public examples (DP-LAC, Mehmood et al., 2605.10272)."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from dpft.harness.query.queries import Values
from dpft.methods.clipping.base import Adaptive, whole

if TYPE_CHECKING:
    import torch

    from dpft.harness.query.queries import Seen

VOTE = "vote"


class DPLAC(Adaptive):
    """C_0 is where most gradients' norms are; then C_t = min(1, v_t/v_{t-1}) C_{t-1}, v_t the mean loss on public examples.

    The vote: in the first `votes` steps in which gradients are asked for, each example is a 1 in the bin of its norm, and C is
    the middle of the bin with the most votes so far. Bins double, from `clip_least` to `clip_most` times the run's clip norm, 20
    by default; a row has length 1. The paper's clients vote once, in a round of its own, for that of 1/4, 1/2 and 1 times the
    norm of their update which keeps their loss best; that takes a local training, which an example has not.
    The share `vote_share` of the gradient's budget is declared, and paid, in every step, also when no more votes are taken: a
    rule is not told which step is the first to ask for gradients. It costs the gradient 0.5% more noise, and as the noise is 10
    sigma in each bin, several votes are added up.
    v_t: of the same `loss_examples` examples, at the weights of the step, in evaluation mode. No private loss is looked at:
    it would be one more release (the paper's DP-CLAC, a third of the budget), which is left out, because a loss has no bound
    without one more histogram. Where a loss is not above 0 its ratio says nothing, and C stays.
    `follow=falls` is the paper's; min makes it a ratchet: a loss that only wavers by 5% halves C in 30 steps. `follow=loss`
    takes the ratio as it is, so that C is C_0 v_t/v_0.
    Prediction: the vote makes up for any wrong start; following the loss changes little under Adam.
    """

    name = "dp-lac"
    summary = "C starts where a noisy vote says the norms are, then falls with the loss on public examples"
    reference = "arXiv:2605.10272"
    needs_public = True
    options: ClassVar = {
        **{key: value for key, value in Adaptive.options.items() if key != "clip_rate"},
        "votes": 5,
        "vote_share": 0.01,
        "follow": "falls",
        "loss_examples": 64,
    }
    choices: ClassVar = {"follow": ("falls", "loss")}
    ranges: ClassVar = {
        **{key: value for key, value in Adaptive.ranges.items() if key != "clip_rate"},
        "votes": (1, 10**6),
        "vote_share": (1e-6, 0.5),
        "loss_examples": (1, 10**6),
    }

    def start(self, spec, noise_multiplier, groups=None, model=None):
        super().start(spec, noise_multiplier, groups, model)
        self._model, self._batch = model, self.public.batch(min(self.settings["loss_examples"], len(self.public)))
        least, most = self._range
        self.votes, self.taken, self.loss = [0.0] * max(math.ceil(math.log2(most / least)), 1), 0, 0.0

    def shares(self):
        return {VOTE: self.settings["vote_share"]}

    def amend(self, gradient):
        if self.taken < self.settings["votes"]:
            of = partial(one_hot, least=self._range[0], bins=len(self.votes))
            return super().amend(gradient)[0], {VOTE: Values(size=len(self.votes), of=of, bound=1.0)}
        before, self.loss = self.loss, self.public.mean_loss(self._model, self._batch)
        if before > 0 and self.loss > 0:  # before the first there is 0
            ratio = self.loss / before
            self.clip_norm = self.kept(
                self.clip_norm * (min(ratio, 1.0) if self.settings["follow"] == "falls" else ratio)
            )
        return super().amend(gradient)[0], {}

    def learn(self, gradient, beside):
        if VOTE in beside:
            self.votes = [a + b for a, b in zip(self.votes, beside[VOTE].values.tolist(), strict=True)]
            self.taken += 1
            self.clip_norm = self.kept(self._range[0] * 2 ** (self.votes.index(max(self.votes)) + 0.5))

    def state_dict(self):
        import torch

        state = [self.clip_norm, float(self.taken), self.loss, *self.votes]
        return {"state": torch.tensor(state, dtype=torch.float64)}

    def load_state_dict(self, state):
        self.clip_norm, taken, self.loss, *self.votes = state["state"].tolist()
        self.taken = int(taken)


def one_hot(seen: Seen, least: float, bins: int) -> torch.Tensor:
    """[batch, bins]: 1 in the bin of the whole gradient's norm; bin j begins at least * 2^j, all others are in the outer ones."""
    import torch

    place = (whole(seen) / least).log2().nan_to_num(nan=bins).clamp(0, bins - 1).long()
    return torch.zeros(len(place), bins, dtype=torch.float64, device=place.device).scatter_(1, place[:, None], 1.0)
