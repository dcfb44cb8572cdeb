"""Models without weights, on torch's meta device: names and shapes as `models.load_model` and `causal.load` make them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpft.tasks import loaders, models
from dpft.tasks.batchnorm import settle

if TYPE_CHECKING:
    from torch import nn


def classifier(
    source: str, head: str, classes: int, words: tuple[int, ...] | None = None, batch_norm: str | None = None
) -> nn.Module:
    """As `models.load_model`; only the configuration is read. Raises CannotRun for what that says."""
    kind = models.IMAGES if batch_norm is not None else head
    config = models.load_config(source, classes)
    models.check_config(config, source, kind)
    inner = _made(models.auto_class(kind), config, models.construction(config, kind))
    settle(inner, batch_norm, source)
    outside, _ = models.head_names(inner, set())
    import torch

    with torch.device("meta"):
        return models.with_head(inner, head, classes, words, outside, outside, batch_norm is not None)


def causal(source: str) -> nn.Module:
    """As `causal.load`; only the configuration is read. Raises CannotRun for what that says."""
    import transformers

    from dpft.tasks import causal as language

    config, _, _ = language.load_config(source)
    return language.causal_model()(_made(transformers.AutoModelForCausalLM, config, {}))


def _made(auto: Any, config: Any, options: dict[str, Any]) -> nn.Module:
    import torch
    from transformers.initialization import no_init_weights

    with loaders.quiet(), no_init_weights(), torch.device("meta"):
        inner = auto.from_config(config, **options)
    inner.tie_weights()
    return inner
