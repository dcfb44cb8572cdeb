"""Tiny text models of several architectures with a tokenizer that knows the test sentences."""

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dpft.tasks import glue
from dpft.tasks.base import Data, ModelSpec

KINDS = ("bert", "roberta", "distilbert", "deberta-v2", "electra")
ROWS = [
    {"text": "a great film .", "pair": "it was great .", "label": 1},
    {"text": "terrible", "pair": "No", "label": 0},
    {"text": "it was a long , long film and it was not great at all .", "pair": "a film .", "label": 1},
]
CORPUS = [" It was terrible . great Yes No Maybe a film long , ? not at all and it It This is correct incorrect"] * 3
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def tiny_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE as RoBERTa's, or whole words with BERT's two segments."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "roberta":
        inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        inner.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
        pair = "<s> $A </s> </s> $B </s>"
    else:
        inner = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special))
        pair = "<s> $A </s> $B:1 </s>:1"
    ids = [(token, special.index(token)) for token in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair=pair, special_tokens=ids)
    names = dict(cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def tiny_model(kind: str, vocabulary: int) -> transformers.PreTrainedModel:
    """A random masked language model of the architecture, with dropout and the shape of its published checkpoints."""
    common = dict(vocab_size=vocabulary, pad_token_id=1, max_position_embeddings=40) | SIZES
    match kind:
        case "bert":
            return transformers.BertForMaskedLM(transformers.BertConfig(**common))
        case "roberta":
            return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**common, type_vocab_size=1))
        case "distilbert":
            config = transformers.DistilBertConfig(
                vocab_size=vocabulary, pad_token_id=1, max_position_embeddings=40, dim=16, n_layers=2, n_heads=2
            )
            return transformers.DistilBertForMaskedLM(config)
        case "deberta-v2":  # as deberta-v3: relative positions only, shared keys, no segments
            config = transformers.DebertaV2Config(
                **common,
                type_vocab_size=0,
                relative_attention=True,
                position_biased_input=False,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,
                norm_rel_ebd="layer_norm",
                position_buckets=8,
            )
            return transformers.DebertaV2ForMaskedLM(config)
        case "electra":
            return transformers.ElectraForMaskedLM(transformers.ElectraConfig(**common, embedding_size=12))


def prepared(folder: str, head: str, task=glue.Mrpc, max_length: int = 30, seed: int = 0, rows=ROWS):
    """A task prepared on tiny data, in fp64, the zero head of `mean` replaced so that the encoder matters."""
    generator = torch.Generator().manual_seed(seed)
    out = task().prepare(Data(rows, rows[:1], "data"), ModelSpec(folder, head, max_length), generator)
    out.model.double()
    if head == "mean":
        with torch.no_grad():
            out.model.head.weight.copy_(torch.randn(out.model.head.weight.shape, generator=generator))
    return out
