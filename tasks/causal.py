"""Causal language models: loading them with their own output layer, and the loss of target tokens."""

from __future__ import annotations

import io
from contextlib import nullcontext, redirect_stderr, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from dpft.harness.errors import CannotRun
from dpft.tasks import gguf, loaders, models
from dpft.tasks.batchnorm import refuse_batch_norm
from dpft.tasks.vocabulary import NO_TARGET, vocabulary_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from dpft.tasks.base import Example


@cache
def causal_model() -> type[nn.Module]:
    """The class; made inside a function because torch costs seconds to import."""
    from torch import nn

    class CausalLM(nn.Module):
        """A pretrained decoder and its output layer, which is part of the body: there is no new head.

        Called with a batch of `collate` it gives the negative log-likelihood of each example's targets, [batch].
        """

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.config = model.config
            self.encoder_type = model.config.model_type
            self.head_parameters: list[str] = []
            self.vocabulary = vocabulary_loss()(model.get_output_embeddings().weight)

        @property
        def encoder(self) -> nn.Module:
            return self.model.base_model

        def forward(self, targets: torch.Tensor, target_positions: torch.Tensor, **inputs: Any) -> torch.Tensor:
            hidden = self.encoder(**inputs, use_cache=False).last_hidden_state
            index = target_positions[..., None].expand(-1, -1, hidden.shape[-1])
            return self.vocabulary(hidden.gather(1, index), targets, self.vocabulary.weight)

    return CausalLM


def load(source: str) -> tuple[nn.Module, str]:
    """As `_load`; what was unpacked of a GGUF file before is held against the sum of its weights."""
    if source.endswith(".gguf") and (weights := gguf.fingerprint(source)) is not None:
        with suppress(CannotRun):
            found = _load(source)
            if found[1] == weights:
                return found
        gguf.forget(source)  # spoilt since then
    return _load(source)


def _load(source: str) -> tuple[nn.Module, str]:
    """(model in fp32 and train mode, sha256 of its weights) from a folder, a hub id or a GGUF file; dropout is off.

    Raises CannotRun for a checkpoint that is missing, damaged or lacks weights, and for a model that is not causal or whose
    scores are not its output layer's product with the last hidden state: its loss could not be taken in pieces.
    """
    import torch
    import transformers

    config, place, options = load_config(source)
    with loaders.quiet(), torch.random.fork_rng(devices=[]):  # weights that the checkpoint lacks are drawn globally
        # reading a GGUF file shows a bar of its own that no setting of transformers turns off
        hidden = redirect_stderr(io.StringIO()) if "gguf_file" in options else nullcontext()
        with loaders.readable("the causal language model", source), hidden:
            inner, info = transformers.AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=torch.float32, output_loading_info=True, **options
            )
    for module in inner.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if lacking := set(info["missing_keys"]) - set(inner.all_tied_weights_keys or {}):
        raise CannotRun(f"{source} has no trained weights for {sorted(lacking)[0]}; take a whole checkpoint.")
    refuse_batch_norm(inner, source)
    _check_scores(inner.eval(), source)
    weights = models.fingerprint_of(inner, set())
    if "gguf_file" in options:
        gguf.keep(source, inner, models.load_tokenizer(source), weights)
    return causal_model()(inner).train(), weights


def load_config(source: str) -> tuple[Any, str, dict[str, str]]:
    """(configuration, dropout off, and what `gguf.place` says) of a causal language model. Raises CannotRun for others."""
    import transformers

    place, options = gguf.place(source)
    with loaders.quiet(), loaders.readable("the configuration of", source):
        config = transformers.AutoConfig.from_pretrained(place, **options)
    if getattr(config, "is_encoder_decoder", False) or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CannotRun(f"{source} ({config.model_type}) is no causal language model; take one such as gpt2.")
    models.without_dropout(config)
    return config, place, options


def _check_scores(model: nn.Module, source: str) -> None:
    """Look at two short inputs that differ in their last token."""
    import torch

    output = model.get_output_embeddings()
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) % model.config.vocab_size
    with torch.no_grad():
        scores = model(input_ids=tokens, use_cache=False).logits
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    if not torch.allclose(scores[0, :3], scores[1, :3], rtol=1e-4, atol=1e-4 * float(scores.abs().max())):
        raise CannotRun(
            f"{source} lets a token see those behind it, so its loss would know the answer; take a decoder."
        )
    plain = output is not None and getattr(output, "weight", None) is not None
    if not plain or not torch.allclose(
        hidden @ output.weight.T, scores, rtol=1e-4, atol=1e-4 * float(scores.abs().max())
    ):
        raise CannotRun(
            f"The scores of {source} are more than its output layer's weight times the hidden state (a bias, a scale or a "
            "cap); such a model is not supported, take GPT-2, OPT, Llama or Qwen."
        )


class Collator:
    """Pads encoded examples on the right; a decoder's earlier tokens do not see what is behind them."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `position_ids` [batch, longest]; `targets`, `target_positions` [batch, most targets].

        Position i of `target_positions` is where target i is predicted: one token before it. Positions count from 0 in every
        row and are given for every example, so that gradients of position embeddings can be told apart.
        """
        import numpy as np
        import torch

        longest = max((len(e["input_ids"]) for e in examples), default=1)
        most = max((len(e["input_ids"]) - e["prompt_length"] for e in examples), default=1)
        ids = np.full((len(examples), longest), self.pad_id, np.int64)
        mask = np.zeros_like(ids)
        targets = np.full((len(examples), most), NO_TARGET, np.int64)
        places = np.zeros_like(targets)
        for row, example in enumerate(examples):
            tokens, start = example["input_ids"], example["prompt_length"]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            targets[row, : len(tokens) - start] = tokens[start:]
            places[row, : len(tokens) - start] = np.arange(start - 1, len(tokens) - 1)
        positions = np.tile(np.arange(longest), (len(examples), 1))
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        arrays |= {"targets": targets, "target_positions": places}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Encoder:
    """Rows `{"prompt", "response"}` as token ids: prompt, response, end of text. An empty prompt is the start of text.

    longest: tokens that the model `model` has positions for; new_tokens: how many are written behind a prompt, of which the
    last `kept` tokens are seen. Raises CannotRun for what does not fit.
    """

    def __init__(self, tokenizer, longest: int | None, max_length: int, model: str, new_tokens: int = 1) -> None:
        longest = max_length + new_tokens if longest is None else longest
        for key, tokens, most in (("max_length", max_length, longest), ("max_new_tokens", new_tokens, longest - 1)):
            if tokens > most:
                raise CannotRun(f"{model} takes at most {longest} tokens; lower {key} from {tokens}.")
        if max_length < 8:
            raise CannotRun(f"max_length {max_length} leaves no room for text; it must be 8 or more.")
        if tokenizer.eos_token_id is None:
            raise CannotRun(f"The tokenizer of {model} has no end-of-text token; take another model.")
        self.tokenizer, self.max_length, self.kept = tokenizer, max_length, min(max_length - 1, longest - new_tokens)

    @property
    def pad_id(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, each with what the tokenizer puts before a text, and never empty."""
        end = self.tokenizer.eos_token_id
        begin = end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        found = []
        for ids in self._tokens(texts, special=True):
            if len(ids) > 1 and ids[-1] == end:  # some tokenizers close every text
                ids = ids[:-1]
            found.append(ids or [begin])
        return found

    def __call__(self, rows: Sequence[Example]) -> list[Example]:
        """`input_ids` (int32, at most max_length) and `prompt_length`: how many of them are not targets.

        What is too long loses the start of its prompt, down to half of max_length, and then the end of its response.
        """
        import numpy as np

        encoded = []
        responses = self._tokens([row["response"] for row in rows], special=False)
        for prompt, ids in zip(self.prompts([row["prompt"] for row in rows]), responses, strict=True):
            target = [*ids, self.tokenizer.eos_token_id][: self.max_length - min(len(prompt), self.max_length // 2)]
            prompt = prompt[-(self.max_length - len(target)) :]
            encoded.append({"input_ids": np.array([*prompt, *target], np.int32), "prompt_length": len(prompt)})
        return encoded

    def _tokens(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        with loaders.quiet():
            return self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)["input_ids"]


def generate(
    model: nn.Module, encoder: Encoder, prompts: Sequence[str], device: torch.device, beams: int, new_tokens: int
) -> list[str]:
    """What `model` continues each prompt with, by greedy search or `beams` beams, without the prompt and special tokens.

    Prompts of like length are padded together on the left, so that every row goes on at its last column.
    """
    import torch

    ids = encoder.prompts(prompts)
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    found: dict[int, str] = {}
    size = max(1, 64 // beams)
    training = model.training
    model.eval()
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        rows = [ids[i][-encoder.kept :] for i in batch]
        longest = max(len(row) for row in rows)
        tokens = torch.tensor([[encoder.pad_id] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        with torch.no_grad(), loaders.quiet():
            out = model.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=False,
                num_beams=beams,
                max_new_tokens=new_tokens,
                eos_token_id=encoder.tokenizer.eos_token_id,
                pad_token_id=encoder.pad_id,
            )
        texts = encoder.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        found |= dict(zip(batch, texts, strict=True))
    model.train(training)
    return [" ".join(found[i].split()) for i in range(len(ids))]


def longest_of(config) -> int | None:
    """Most tokens that the positions of a model allow, None when it does not say."""
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(value := getattr(config, name, None), int) and value > 0:
            return value
    return None
