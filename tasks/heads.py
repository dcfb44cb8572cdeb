"""The heads. Each model maps a batch's inputs to scores [batch, classes] and carries what methods ask about it.

Attributes of every model: `encoder` (the pretrained part), `config`, `encoder_type` (such as "bert") and
`head_parameters` (names of the parameters that are not the encoder's). The classes are made inside functions because
their base costs a second to import and the registry imports every module of this package.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@cache
def mean_classifier() -> type[nn.Module]:
    """Mean over the tokens, then a linear layer that starts at zero, so that step 0 is the uniform guess."""
    import torch
    from torch import nn

    class MeanClassifier(nn.Module):
        def __init__(self, encoder: nn.Module, classes: int) -> None:
            super().__init__()
            self.encoder = encoder
            self.config = encoder.config
            self.encoder_type = encoder.config.model_type
            # not initialised twice: the default would draw from the global generator
            self.head = nn.utils.skip_init(nn.Linear, encoder.config.hidden_size, classes)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            self.head_parameters = ["head.weight", "head.bias"]

        def forward(self, attention_mask: torch.Tensor, **inputs: Any) -> torch.Tensor:
            hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
            # half precision cannot sum hundreds of tokens well
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
            return self.head(mean.to(self.head.weight.dtype))

    return MeanClassifier


@cache
def native_classifier() -> type[nn.Module]:
    """The architecture's own `...ForSequenceClassification`."""
    from torch import nn

    class NativeClassifier(nn.Module):
        def __init__(self, model: nn.Module, fresh: list[str]) -> None:
            super().__init__()
            self.model = model
            self.config = model.config
            self.encoder_type = model.config.model_type
            self.head_parameters = [f"model.{name}" for name in fresh]

        @property
        def encoder(self) -> nn.Module:
            return self.model.base_model

        def forward(self, **inputs: Any) -> torch.Tensor:
            return self.model(**inputs).logits

    return NativeClassifier


@cache
def image_classifier() -> type[nn.Module]:
    """The architecture's own `...ForImageClassification`, on images [batch, ...] or on several views [batch, views, ...] of each.

    `views` says how many the training batches hold: the layers then see batch * views rows, an example's one after the other.
    """

    class ImageClassifier(native_classifier()):
        views = 1

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            flat = pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
            return self.model(pixel_values=flat).logits

    return ImageClassifier


@cache
def prompted_classifier() -> type[nn.Module]:
    """The masked-language-model head at the mask, read at the label words only (LM-BFF)."""
    import torch
    from torch import nn

    class PromptedClassifier(nn.Module):
        def __init__(self, model: nn.Module, words: tuple[int, ...], head_names: list[str]) -> None:
            super().__init__()
            self.model = model
            self.config = model.config
            self.encoder_type = model.config.model_type
            self.head_parameters = [f"model.{name}" for name in head_names]
            self.register_buffer("words", torch.tensor(words), persistent=False)

        @property
        def encoder(self) -> nn.Module:
            return self.model.base_model

        def forward(self, mask_position: torch.Tensor, **inputs: Any) -> torch.Tensor:
            hidden = self.encoder(**inputs).last_hidden_state
            index = mask_position.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
            # gathered before the vocabulary layer: its output for all tokens would be the largest tensor of the run
            return vocabulary_scores(self.model, hidden.gather(1, index))[:, 0].index_select(-1, self.words)

    return PromptedClassifier


def vocabulary_scores(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Scores [batch, tokens, vocabulary] from hidden states by the head of a known `...ForMaskedLM`."""
    match model.config.model_type:
        case "roberta" | "xlm-roberta":
            return model.lm_head(hidden)
        case "distilbert":
            hidden = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
            return model.vocab_projector(hidden)
        case "electra":
            return model.generator_lm_head(model.generator_predictions(hidden))
        case "deberta-v2" if not model.legacy:
            return model.lm_predictions(hidden, model.deberta.embeddings.word_embeddings)
        case _:
            return model.cls(hidden)


PROMPTABLE = ("bert", "roberta", "xlm-roberta", "distilbert", "deberta-v2", "electra")
