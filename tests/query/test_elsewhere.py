"""A model elsewhere computes what it computes at weights that were moved, on every architecture, and stays where it is."""

import causal_cases
import pytest
import torch
import transformers as hf
from engine_cases import batch_for, loss, model_for
from model_cases import KINDS, tiny_model
from torch import nn
from torch.nn import functional

from dpft.harness.query.elsewhere import Elsewhere

pytestmark = pytest.mark.usefixtures("one_thread")
DISTANCE = 0.1


def shifts(model):
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, generator=generator).to(p.dtype) * DISTANCE for n, p in model.named_parameters()}


def elsewhere(model, shift):
    return Elsewhere({id(p): lambda p=p, d=shift[n]: p.detach() + d for n, p in model.named_parameters()})


def there(model, shift, run):
    """What `run(model)` returns at weights that were moved for it and moved back."""
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(kept[n] + shift[n])
        found = run(model)
        for n, p in model.named_parameters():
            p.copy_(kept[n])
    return found


def assert_moves(model, run, rtol=None, atol=None):
    """In evaluation mode; every parameter, moved by itself, is seen to move, or not to matter there either."""
    model.eval()
    shift, before = shifts(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    here, expected = (there(model, some, run) for some in ({n: 0 for n in shift}, shift))
    assert not torch.allclose(here, expected)
    with torch.no_grad(), elsewhere(model, shift):
        found = run(model)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    for name in shift:
        one = {n: d if n == name else torch.zeros_like(d) for n, d in shift.items()}
        with torch.no_grad(), elsewhere(model, one):
            found = run(model)
        torch.testing.assert_close(found, there(model, one, run), rtol=rtol, atol=atol)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "vit"])
def test_encoders(kind, dtype):
    model, batch = model_for(kind, dtype), batch_for(kind)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    assert_moves(model, lambda model: loss(model, batch))


@pytest.mark.parametrize(
    ("kind", "attention"), [(k, "eager") for k in KINDS] + [(k, "sdpa") for k in KINDS if k != "deberta-v2"]
)
def test_masked_language_models_with_tied_tables(kind, attention):
    torch.manual_seed(0)
    model = tiny_model(kind, 50).double()
    model.set_attn_implementation(attention)
    ids = torch.randint(5, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    assert_moves(model, lambda model: model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("kind", causal_cases.CONFIGS)
def test_language_models(kind):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(causal_cases.CONFIGS[kind]).double()
    ids = torch.randint(4, 20, (3, 9))
    assert_moves(model, lambda model: model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied"])
def test_language_models_as_the_tasks_train_them(kind, tmp_path):
    """Their logits are made in pieces by a function with a backward pass of its own."""
    from dpft.tasks.base import ModelSpec
    from dpft.tasks.data_to_text import E2E

    task, folder = E2E({"max_new_tokens": 8}), causal_cases.save(kind, tmp_path)
    data = task.load(causal_cases.mirror(tmp_path / "data"))
    prepared = task.prepare(data, ModelSpec(folder, "native", 40), torch.Generator().manual_seed(0))
    model, batch = prepared.model.double(), prepared.collate(prepared.train[:4])
    assert_moves(model, lambda model: task.loss(model, batch))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.table, self.net = nn.Embedding(20, 6), kind(6, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 3)

    def forward(self, ids):
        return self.out(self.net(self.table(ids))[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_whose_weights_come_as_a_list(kind):
    torch.manual_seed(0)
    ids = torch.randint(20, (4, 7))
    assert_moves(Recurrent(kind).double(), lambda model: model(ids))


@pytest.mark.parametrize("kdim", [None, 6])
def test_attention_of_torch_which_has_a_fast_path(kdim):
    torch.manual_seed(0)
    model, x = (
        nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True).double(),
        torch.randn(3, 5, 8).double(),
    )
    other = x if kdim is None else torch.randn(3, 5, 6).double()
    assert_moves(model, lambda model: model(x, other, other, need_weights=False)[0])


def test_a_transformer_of_torch_which_has_a_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x, padding = torch.randn(3, 5, 8).double(), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    model = nn.TransformerEncoder(layer, 2).double()
    assert_moves(model, lambda model: model(x, src_key_padding_mask=padding)[~padding])


class Odd(nn.Module):
    """Ways to use a weight that no layer has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(4, 4).double()) for _ in range(2))
        self.c, self.d = nn.Parameter(torch.randn(4).double()), nn.Parameter(torch.randn(()).double())
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4).double())
        self.norm, self.conv = nn.GroupNorm(2, 4).double(), nn.Conv1d(4, 4, 3, padding=1).double()

    def forward(self, x):
        x = x @ self.a.T + torch.stack([self.a, self.b])[1] @ self.b.data.mT
        x += self.c
        x.add_(self.c).mul_(self.d)
        x = x + torch.cat((self.a, self.b), 0)[:4].sum() + self.a.detach()[0, 0] + float(self.d)
        x = torch.where(self.c[None] > 0, x, 2 * x) + torch.einsum("ij,jk->ik", x, self.b) / self.c.size(0)
        x = x.new_tensor(self.c.tolist()) + x + torch.addmm(input=self.c, mat1=x, mat2=self.a) + 2**self.d
        return self.conv(self.norm(self.weighted(x))[None].mT)[0]


def test_other_uses_of_a_weight():
    torch.manual_seed(0)
    x = torch.randn(4, 4).double()
    assert_moves(Odd(), lambda model: model(x.clone()))


def test_under_autocast_and_in_half_precision():
    model, batch = model_for("bert", torch.float32), batch_for("bert")

    def run(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, batch)

    assert_moves(model, run, rtol=0.02, atol=0.02)  # sums of bf16 products differ with the order
    half = model_for("bert", torch.bfloat16)
    assert_moves(half, lambda model: loss(model, batch).float(), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_written_is_itself_so_that_guards_see_it():
    p = nn.Parameter(torch.zeros(3))
    with torch.no_grad(), Elsewhere({id(p): lambda: p.detach() + 1}):
        assert torch.equal(p + 0, torch.ones(3)) and p.shape == (3,) and p.requires_grad and p.is_leaf
        p.add_(5.0)
        assert torch.equal(p.data, torch.full((3,), 6.0))
        p.requires_grad = False
    assert torch.equal(p, torch.full((3,), 5.0)) and not p.requires_grad


def test_gradients_are_refused():
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match="no gradients"), Elsewhere({id(p): lambda: p.detach() + 1}):
        functional.relu(p)
