"""Tiny causal language models with a tokenizer, and a mirror of E2E, for the tests of generation."""

import polars
import torch
import transformers as hf

WORDS = ["name", "area", "food", "riverside", "centre", "city", "Blue", "Spice", "Cotto", "pub", "is", "a", "the", "in"]
WORDS += ["serves", "cheap", "place", ":", "|", "||", "near", "good", "Chinese", "French", "an", "coffee", "shop", "."]
BODY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
SIZES = dict(vocab_size=len(WORDS) + 4, max_position_embeddings=48)
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA = dict(**BODY, **SIZES, **ENDS, num_key_value_heads=1)
CONFIGS = {
    "gpt2": hf.GPT2Config(vocab_size=SIZES["vocab_size"], n_positions=48, n_embd=16, n_layer=2, n_head=2, **ENDS),
    "opt": hf.OPTConfig(
        **SIZES, **ENDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16
    ),
    "llama": hf.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama-tied": hf.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen2": hf.Qwen2Config(**LLAMA, tie_word_embeddings=False),
    "qwen3": hf.Qwen3Config(**LLAMA, head_dim=6, tie_word_embeddings=True),
}
PLACES, AREAS, FOODS = ("Blue Spice", "Cotto"), ("riverside", "city centre"), ("Chinese", "French", "cheap")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def save(kind, folder):
    """A checkpoint folder of random weights that are not small, so that no gradient is zero by accident."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def e2e_rows(count):
    """Meanings with two references each, some longer than others."""
    rows = []
    for i in range(count):
        place, area, food = PLACES[i % 2], AREAS[i // 2 % 2], FOODS[i // 4 % 3]
        text = f"{place} is a {food} place in the {area} ." if i % 3 else f"{place} serves {food} food ."
        rows.append({"meaning_representation": f"name[{place}], area[{area}], food[{food}]", "human_reference": text})
    return rows


def mirror(root):
    folder = root / "tuetschek/e2e_nlg"
    folder.mkdir(parents=True)
    polars.DataFrame(e2e_rows(300)).write_parquet(folder / "train.parquet")
    polars.DataFrame(e2e_rows(24)).write_parquet(folder / "validation.parquet")
    return root
