"""Models of given shapes with random weights, or none at all in a fake mode, a batch for them, and their loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.memory import configs
from dpft.harness.memory.shapes import SHAPES
from dpft.tasks.causal import causal_model

CLASSES = 2
HEADS = ("classes", "tokens")
NO_DROPOUT = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "attention_dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "activation_dropout", "layerdrop",
)  # fmt: skip


class Scored(nn.Module):
    """A transformers model that returns its scores alone."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.config = net, net.config
        self.encoder_type, self.base_model_prefix = net.config.model_type, "net"
        ends = ("classifier.", "score.")
        self.head_parameters = [f"net.{name}" for name, _ in net.named_parameters() if name.startswith(ends)]

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.net(**inputs).logits


def build(name: str, head: str | None, logits: str = "pieces") -> nn.Module:
    """The model called `name`: a shape of SHAPES, a short name, a local folder or a hub id, of which only the config is read.

    head: `classes`, `tokens` (language modelling) or None: what the architecture is for. logits: of a language model, in
    `pieces` as the tasks here train it (tasks/vocabulary.py), or `whole`. Raises BadInput, CannotRun.
    """
    import transformers

    if head is not None and head not in HEADS:
        raise BadInput(f"There is no head {head!r}; take {' or '.join(HEADS)}.")
    config = _config(name)
    for key in NO_DROPOUT:
        if getattr(config, key, None):
            setattr(config, key, 0.0)
    image = hasattr(config, "image_size")
    if not image:
        config.use_cache = False
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    head = head or ("classes" if image or masked else "tokens")
    kind = {
        (True, "classes"): transformers.AutoModelForImageClassification,
        (False, "classes"): transformers.AutoModelForSequenceClassification,
        (False, "tokens"): transformers.AutoModelForCausalLM,
    }.get((image, head))
    if kind is None:
        raise BadInput(f"{name} sees images and writes no text; leave out --head tokens.")
    if head == "classes":
        config.num_labels = CLASSES
    try:
        net = untrained(kind.from_config, config)
    except ValueError as error:
        raise CannotRun(f"transformers makes no model with head {head} of {name}; choose another --head.") from error
    return (causal_model()(net) if head == "tokens" and logits == "pieces" else Scored(net)).train()


def untrained(make: Any, config: Any) -> nn.Module:
    """`make(config)`, its weights left as they are allocated: some initialisations ask for values, which fakes have not."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        net = make(config)
    net.tie_weights()  # what initialising would have done, too
    return net


def _config(name: str) -> Any:
    import transformers

    if name in SHAPES:
        return transformers.AutoConfig.for_model(SHAPES[name].kind, **SHAPES[name].settings)
    source = configs.found(name)
    try:
        return transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CannotRun(f"The config of {name} cannot be read ({reason}); take a built-in shape or a folder.") from None


def batch(model: nn.Module, size: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs and labels of `size` examples; one token is padding, as in real batches: masks take room."""
    labels = torch.zeros(size, dtype=torch.long)
    config = model.config
    if hasattr(config, "image_size"):
        sides = (config.image_size,) * 2 if isinstance(config.image_size, int) else tuple(config.image_size)
        return {"pixel_values": torch.zeros(size, config.num_channels, *sides), "labels": labels}
    longest = getattr(config, "max_position_embeddings", length)
    if length > longest:
        raise BadInput(f"This model takes at most {longest} tokens, not {length}; lower --length.")
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, -1] = 0
    tokens = torch.full((size, length), 5)
    tokens[0, -1] = config.pad_token_id
    found = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    if hasattr(model, "vocabulary"):  # every token but the first is a target
        places = torch.arange(length).expand(size, length)
        targets = {"targets": tokens[:, 1:].contiguous(), "target_positions": places[:, :-1].contiguous()}
        return {**found, "position_ids": places.contiguous(), **targets}
    return found


def loss(precision: str):
    """(model, batch) -> cross entropy of each example [batch]; of a language model the mean over its tokens."""

    def of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        device = batch["labels"].device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            scores = model(**inputs)
        if "targets" in batch:
            return scores / batch["targets"].shape[1]
        scores = scores.float()
        if scores.dim() == 2:
            return functional.cross_entropy(scores, batch["labels"], reduction="none")
        targets = batch["input_ids"][:, 1:]
        return functional.cross_entropy(scores[:, :-1].transpose(1, 2), targets, reduction="none").mean(1)

    return of
