"""Cross-entropy of an output layer over a long vocabulary, without all logits of a batch at once."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

NO_TARGET = -100  # as PyTorch's cross-entropy has it
AT_ONCE = 1 << 24  # logits that exist at once: 64 MiB in fp32


@cache
def vocabulary_loss() -> type[nn.Module]:
    """The class; made inside a function because torch costs seconds to import."""
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    class VocabularyLoss(nn.Module):
        """`-log softmax(W h)[target]`, summed over the targets of each example.

        It owns the output layer's weight W [vocabulary, d], tied or not. The logits of 50,000 to 150,000 words are the largest
        tensor of a language model: they are made for `at_once // vocabulary` positions, let go, and made again in the
        backward pass. The factored engine asks `linear_factors` for a few examples at a time, so that per-example norms and
        the clipped sum need no more of them either.
        """

        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight
            self.at_once = AT_ONCE

        def forward(self, hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            """[batch] from hidden states [batch, positions, d] and targets [batch, positions], NO_TARGET where there is none.

            weight: `self.weight`, given by the caller, so that the engine keeps the very tensor this call has used: under
            torch.func.functional_call it is another one later.
            """
            positions = max(1, self.at_once // len(weight))
            pieces = zip(hidden.flatten(0, 1).split(positions), targets.flatten().split(positions), strict=True)
            losses = [checkpoint(_negative_log_likelihood, h, weight, t, use_reentrant=False) for h, t in pieces]
            return torch.cat(losses).view(targets.shape).sum(1)

        def linear_factors(
            self, tensors: tuple[torch.Tensor, ...], gradient: torch.Tensor, examples: slice
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Factors A [b, positions, d] and E [b, positions, vocabulary] of the weight's gradient `E^T A` of some examples.

            tensors: the arguments of `forward`; gradient: [batch], that of its output. E is softmax minus one-hot.
            """
            hidden, targets, weight = tensors
            hidden, targets = hidden[examples], targets[examples]
            wide = torch.promote_types(hidden.dtype, torch.float32)
            hidden = hidden.to(wide)
            scale = gradient[examples].to(wide)[:, None] * (targets != NO_TARGET)
            errors = functional.linear(hidden, weight.to(wide)).softmax(-1)
            errors.scatter_add_(2, targets.clamp_min(0)[..., None], errors.new_full((*targets.shape, 1), -1.0))
            return hidden, errors.mul_(scale[..., None])

    def _negative_log_likelihood(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(logits, targets, reduction="none", ignore_index=NO_TARGET)

    return VocabularyLoss
