"""Which layers LoRA takes of architectures that name their projections differently, and that it is right on the fused ones."""

import pytest
import torch
import transformers as hf
from engine_cases import check
from torch import nn

from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.settings import Settings
from dpft.methods.targets import attention_projections, linear_ends

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
T5 = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0)
IMAGES = dict(image_size=8, patch_size=4, **{key: value for key, value in SIZES.items() if key != "vocab_size"})
CAUSAL = dict(hidden_dropout=0.0, attention_dropout=0.0)
KINDS = {  # type -> (config, what is taken, how many layers of it)
    "bert": (hf.BertConfig(**SIZES), "query key value", 6),
    "roberta": (hf.RobertaConfig(**SIZES), "query key value", 6),
    "electra": (hf.ElectraConfig(**SIZES), "query key value", 6),
    "distilbert": (hf.DistilBertConfig(vocab_size=32, dim=16, n_layers=2, n_heads=2), "q_lin k_lin v_lin", 6),
    "deberta-v2": (hf.DebertaV2Config(**SIZES), "query_proj key_proj value_proj", 6),
    "deberta": (hf.DebertaConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), "in_proj", 2),
    "modernbert": (hf.ModernBertConfig(**SIZES, pad_token_id=0), "Wqkv", 2),
    "gpt2": (hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2), "c_attn", 2),
    "gpt_neox": (hf.GPTNeoXConfig(**SIZES, **CAUSAL), "query_key_value", 2),
    "bloom": (hf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2, **CAUSAL), "query_key_value", 2),
    "falcon": (hf.FalconConfig(**SIZES, **CAUSAL), "query_key_value", 2),
    "mpt": (hf.MptConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=2), "Wqkv", 2),
    "opt": (
        hf.OPTConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16),
        "q_proj k_proj v_proj",
        6,
    ),
    "llama": (hf.LlamaConfig(**SIZES), "q_proj k_proj v_proj", 6),
    "qwen2": (hf.Qwen2Config(**SIZES, num_key_value_heads=1), "q_proj k_proj v_proj", 6),
    "phi3": (hf.Phi3Config(**SIZES, pad_token_id=0), "qkv_proj", 2),
    "t5": (hf.T5Config(**T5), "q v", 4),
    "vit": (hf.ViTConfig(**IMAGES), "q_proj k_proj v_proj", 6),
    "deit": (hf.DeiTConfig(**IMAGES), "q_proj k_proj v_proj", 6),
    "resnet": (hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]), "", 0),
}
FP32 = {"t5": 1e-5}  # its norms compute in fp32 whatever the model is
FUSED = ["deberta", "modernbert", "gpt_neox", "bloom", "falcon", "mpt", "phi3", "t5"]


class Wrapped(nn.Module):
    """As tasks hold a pretrained model; the loss is of what it makes of tokens."""

    def __init__(self, kind):
        super().__init__()
        config = KINDS[kind][0]
        config._attn_implementation = "eager"
        self.model = hf.T5EncoderModel(config) if kind == "t5" else hf.AutoModel.from_config(config)
        self.config, self.head_parameters = config, ()

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).last_hidden_state.square().mean((1, 2))


def model_of(kind):
    torch.manual_seed(0)
    return Wrapped(kind)


def adapted(model, **options):
    method = registry.instance(resolve({"task": "sst2", "method": "dp-lora", "rank": 2, **options}))
    assert method.skip(model) is None
    return method.prepare(model, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_found_by_the_names_they_have(kind):
    _, ends, count = KINDS[kind]
    model = model_of(kind)
    assert attention_projections(model) == ends.split()
    if count:
        layers = {name.partition(".lora_A")[0] for name, p in adapted(model).named_parameters() if "lora_A" in name}
        assert len(layers) == count and {layer.rpartition(".")[2] for layer in layers} == set(ends.split())


@pytest.mark.parametrize("kind", FUSED)
def test_gradients_of_adapters_on_fused_projections_are_those_of_each_example_alone(kind):
    model = adapted(model_of(kind)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(2, 32, (4, 6))}
    check(model, lambda model, batch: model(batch["input_ids"]), batch, FP32.get(kind, 1e-10))


class Plain(nn.Module):
    """No transformer: two linear layers, a head, and one that is no layer of its own."""

    head_parameters = ("head.weight", "head.bias")

    def __init__(self, **layers):
        super().__init__()
        for name, layer in (layers or {"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}).items():
            setattr(self, name, layer)
        self.head = nn.Linear(4, 2)


def test_a_model_that_nobody_knows_is_skipped_with_its_layers_in_a_sentence():
    method = registry.instance(resolve({"task": "sst2", "method": "dp-lora"}))
    reason = method.skip(Plain())
    assert "--set targets=first,second" in reason and "first (1), second (1)" in reason and "head" not in reason
    assert "none outside its head" in method.skip(Plain(norm=nn.LayerNorm(4)))
    many = method.skip(Plain(**{f"layer_{i}": nn.Linear(4, 4) for i in range(9)}))
    assert many.count("layer_") == 8 and "and 3 more" in many
    assert adapted(Plain(), targets="first").first.lora_A["default"].weight.shape == (2, 4)


def test_a_name_that_other_modules_have_too_is_not_taken():
    """PEFT would put an adapter on all that end so, and refuse, say, a norm."""
    model = Plain(block=nn.ModuleDict({"qkv": nn.Linear(4, 4)}), other=nn.ModuleDict({"qkv": nn.LayerNorm(4)}))
    assert attention_projections(model) == [] and linear_ends(model) == {}
    model = Plain(block=nn.ModuleDict({"qkv": nn.Linear(4, 4)}))
    assert attention_projections(model) == ["qkv"]


@pytest.mark.parametrize("method", ["dp-lora", "prism"])
def test_adapters_train_on_a_vision_transformer(method):
    spec = resolve({"task": "digits", "method": method, "batch_size": 80, "steps": 2, "eval_every": 2})
    assert spec.model == "digits-vit"
    record, _ = run.execute(spec, Settings(), lambda step, row: None)
    assert record["status"] == "done", record["error"]
