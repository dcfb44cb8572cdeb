"""What the comparison of an engine with per-example autograd must see: batches that mix, wrong rules, phases, steps, padding."""

import contextlib
import dataclasses
import re

import pytest
import torch
import transformers as hf
from model_cases import tiny_model
from peft import LoraConfig, inject_adapter_in_model
from small_runs import a_spec, quiet, trained
from torch import nn
from torch.nn import functional as F

from dpft.harness.engine import agreement, engine_class, wider
from dpft.harness.engine.agreement import check, compare
from dpft.harness.engine.base import RunningSums
from dpft.harness.engine.factored import FactoredEngine
from dpft.harness.engine.pieces import AbsolutePiece, LinearPiece
from dpft.harness.errors import CannotRun
from dpft.harness.runs import registry
from dpft.harness.train import run

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHED = ["factored", "opacus"]


def checked(name, model, loss, batch, half=False):
    """The error of `check`, or None."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine = engine_class(name)(model, loss, parameters, lambda phase: contextlib.nullcontext())
    try:
        check(engine, batch, {}, *([0.1, None, half] if half else []))
    except CannotRun as error:
        return str(error)
    finally:
        engine.close()


# --- models whose examples are not alone, in a real run


class Between(nn.Module):
    """The tiny BERT with something between its encoder and its head: `between(pooled [b, d], lengths [b]) -> [b, d]`."""

    def __init__(self, inner, between):
        super().__init__()
        self.encoder, self.head, self.between = inner.encoder, inner.head, between
        self.head_parameters = inner.head_parameters

    def forward(self, attention_mask, **inputs):
        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        return self.head(self.between(hidden[:, 0], attention_mask.sum(1)))


class SortedByLength(nn.Module):
    """A layer whose input is sorted by length, shortest first, and its output sorted back, as packed sequences are."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x, lengths):
        order = (lengths * 1000 + torch.arange(len(lengths))).argsort()
        return self.layer(x[order])[order.argsort()]


class SharedCapacity(nn.Module):
    """Two experts that take the first `capacity` examples of the batch that want them; the others go past."""

    def __init__(self, width, capacity=4):
        super().__init__()
        self.gate, self.capacity = nn.Linear(width, 2), capacity
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x, lengths):
        scores = self.gate(x)
        wanted, out = scores.argmax(1), x * (1 + scores.sum(1, keepdim=True))
        for number, expert in enumerate(self.experts):
            mine = (wanted == number).float()
            taken = mine * (mine.cumsum(0) <= self.capacity)
            out = out + taken[:, None] * 5 * expert(x)
        return out


class BranchOnTheBatch(nn.Module):
    """A scale that a batch chooses by its longest example: no derivative sees it."""

    def __init__(self, width, longest=8):
        super().__init__()
        self.layer, self.longest = nn.Linear(width, width), longest

    def forward(self, x, lengths):
        scale = 4.0 if lengths.max() > self.longest else 1.0
        return self.layer(x) * scale


class Normalised(nn.Module):
    """Statistics of the batch that are detached: the derivative by another example's input is zero all the same."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x, lengths):
        return self.layer(x - x.detach().mean(0))


class Neighbour(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x, lengths):
        return self.layer(x) + 1e-6 * x.roll(1, 0)  # far below what rounding allows


class Dropping(Neighbour):
    def forward(self, x, lengths):
        return F.dropout(self.layer(x), 0.5, self.training)


MIXING = {
    "sorted-by-length": SortedByLength,
    "shared-capacity": SharedCapacity,
    "branch-on-the-longest": BranchOnTheBatch,
    "detached-batch-mean": Normalised,
    "a-trace-of-the-neighbour": Neighbour,
}


def execute_with(monkeypatch, tiny_bert, settings, wrap, engine, method="dp-adam", **more):
    def prepare(self, model, generator):
        torch.manual_seed(0)
        return wrap(model)

    monkeypatch.setattr(registry.method(method), "prepare", prepare)
    some = dataclasses.replace(settings, engine=engine)
    return run.execute(a_spec(method, tiny_bert, **more), some, quiet)[0]


@pytest.mark.parametrize("engine", BATCHED)
@pytest.mark.parametrize("name", MIXING)
def test_a_run_of_a_model_that_mixes_examples_is_refused_before_its_first_release(
    name, engine, monkeypatch, tiny_bert, settings
):
    record = execute_with(monkeypatch, tiny_bert, settings, lambda m: Between(m, MIXING[name](32)), engine)
    assert record["status"] == "error", "it trained"
    assert re.search(r"mixes examples.*--engine (factored or )?reference", record["error"])
    assert record["privacy"]["ledger"] == []


@pytest.mark.parametrize("engine", ["factored", "opacus", "reference"])
def test_the_same_model_without_the_mixing_runs_on_every_engine(engine, monkeypatch, tiny_bert, settings):
    class Layer(Neighbour):
        def forward(self, x, lengths):
            return self.layer(x)

    record = execute_with(monkeypatch, tiny_bert, settings, lambda m: Between(m, Layer(32)), engine)
    assert record["status"] == "done", record["error"]


@pytest.mark.parametrize("engine", ["factored", "opacus", "reference"])
def test_a_model_whose_loss_depends_on_padding_is_refused(engine, monkeypatch, tiny_bert, settings):
    """The padding of a microbatch is the length of somebody else's text."""

    class Padded(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.encoder, self.head, self.head_parameters = inner.encoder, inner.head, inner.head_parameters

        def forward(self, attention_mask, **inputs):
            return self.head(self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state.mean(1))

    record = execute_with(monkeypatch, tiny_bert, settings, Padded, engine)
    assert record["status"] == "error" and "padding" in record["error"]
    assert ("--engine" in record["error"]) == (engine != "reference"), "no other engine would be right"


# --- wrong rules of Opacus


def convnext():
    sizes = dict(hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, patch_size=2, drop_path_rate=0.0, image_size=16)
    model = randomised(hf.ConvNextForImageClassification(hf.ConvNextConfig(**sizes)))
    return model, {"pixel_values": torch.randn(16, 3, 16, 16), "labels": torch.arange(16) % 2}


def deberta_with_adapters():
    config = tiny_model("deberta-v2", 50).config
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout"):
        setattr(config, key, 0.0)
    adapters = LoraConfig(r=3, lora_dropout=0.0, target_modules=["query_proj", "key_proj", "value_proj"])
    model = randomised(inject_adapter_in_model(adapters, hf.DebertaV2ForSequenceClassification(config)))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "classifier" in name)
    ids = torch.randint(2, 50, (16, 9))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(16) % 2}


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.train()


def loss_of_logits(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


@pytest.mark.parametrize("build", [convnext, deberta_with_adapters])
def test_what_opacus_gets_wrong_is_refused_and_right_engines_are_named(build):
    model, batch = build()
    error = checked("opacus", model, loss_of_logits, batch)
    assert error is not None, "Opacus is known to be wrong here"
    assert "--engine factored or reference" in error
    assert checked("reference", model, loss_of_logits, batch) is None
    if build is convnext:
        assert checked("factored", model, loss_of_logits, batch) is None


# --- every phase, and now and then


def test_the_matrices_of_a_later_phase_are_compared(monkeypatch, tiny_bert, settings):
    """Magnitudes are asked for in sparta's second phase only; here they are not taken."""
    monkeypatch.setattr(AbsolutePiece, "add_weighted", AbsolutePiece.__mro__[1].add_weighted)
    phases = {"steps": 6, "warmup_fraction": 0.34, "selection_fraction": 0.34, "eval_every": 3, "score": "absolute"}
    record = run.execute(a_spec("sparta", tiny_bert, **phases), settings, quiet)[0]
    assert record["status"] == "error" and "clipped sum" in record["error"], record["error"]
    assert record["privacy"]["steps_run"] == 2, "its first phase is right"


@pytest.mark.parametrize("wrong", ["sum", "norms"])
def test_an_engine_that_goes_wrong_during_the_run_is_stopped(wrong, monkeypatch, setup_of):
    """From its third step on, and by 1% only: what one example adds, or what the step takes its norms for."""
    setup = setup_of("dp-adam", steps=8)
    accumulate, step = FactoredEngine.accumulate, [0]
    trains = setup.method.step

    def counted(ask, now):
        step[0] = now
        return trains(ask, now)

    def drifting(self, batch, total, bound, encodings):
        factor = 1.01 if step[0] >= 3 else 1.0
        losses, norms = accumulate(self, batch, total, bound * (factor if wrong == "sum" else 1), encodings)
        return losses, norms / (factor if wrong == "norms" else 1)

    monkeypatch.setattr(FactoredEngine, "accumulate", drifting)
    setup.method.step = counted
    with pytest.raises(CannotRun, match="clipped sum" if wrong == "sum" else "another gradient"):
        trained(setup)
    assert step[0] == 4, "compared in the steps 1 and 4"


def test_dropout_is_refused_where_a_batch_is_compared_and_allowed_one_by_one(monkeypatch, tiny_bert, settings):
    for engine in ("factored", "opacus", "reference"):
        record = execute_with(monkeypatch, tiny_bert, settings, lambda m: Between(m, Dropping(32)), engine)
        assert record["status"] == ("done" if engine == "reference" else "error"), record["error"]


def test_the_checks_use_no_random_number_of_the_run(monkeypatch, tiny_bert, settings):
    """Dropout draws from the global generator: a run with the checks is the run without them, to the bit."""
    finals = []
    for checks in (True, False):
        if not checks:
            monkeypatch.setattr(agreement, "check", lambda *arguments: None)
        torch.manual_seed(3)
        record = execute_with(monkeypatch, tiny_bert, settings, lambda m: Between(m, Dropping(32)), "reference")
        finals.append((record["status"], record["result"]["final"], record["diagnostics"]["alignment"]))
    assert finals[0] == finals[1]


@pytest.mark.parametrize("engine", BATCHED)
@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra"])
def test_half_precision_passes_where_nothing_is_wrong(kind, engine):
    model = tiny_model(kind, 60).eval()
    randomised(model).eval() if engine == "factored" else randomised(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if engine == "opacus" and kind != "bert":
        pytest.skip("one is enough for the slow engine")
    ids = torch.randint(2, 60, (16, 12))
    positions = torch.arange(12).expand(16, 12).contiguous()
    extra = {} if kind == "distilbert" else {"position_ids": positions}

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            given = {"input_ids": batch["input_ids"], **({"position_ids": batch["position_ids"]} if extra else {})}
            logits = model(**given).logits
        return F.cross_entropy(logits.float().mT, batch["input_ids"], reduction="none").mean(1)

    for name, p in model.named_parameters():  # pooled and tied leftovers of the architecture are no matter here
        p.requires_grad_("layer.0" in name and "weight" in name)
    assert checked(engine, model, loss, {"input_ids": ids, **extra}, half=True) is None


# --- kinks


class Rounding(nn.Module):
    """ReLU of a value so near 0 that it rounds to one side alone and to the other in a batch, as matmuls of other shapes do."""

    def __init__(self, apart):
        super().__init__()
        self.layer, self.apart = nn.Linear(3, 2), apart

    def forward(self, x):
        hidden = self.layer(x)
        rounded = torch.finfo(hidden.dtype).eps * (1.5 - len(x))
        return hidden[:, 0] + 100 * F.relu(hidden[:, 1] - hidden[:, 1].detach() + self.apart + rounded)


@pytest.mark.parametrize("name", ["factored", "opacus"])
@pytest.mark.parametrize("apart, holds", [(1e-9, True), (0.0, False)])  # 0: it depends on its company in float64 too
def test_a_kink_that_rounding_decides_is_no_mistake_of_the_engine(name, apart, holds):
    torch.manual_seed(0)
    model = Rounding(apart)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = [p.data_ptr() for p in model.parameters()]
    found = checked(name, model, lambda model, batch: model(batch["x"]), {"x": torch.randn(4, 3)})
    assert (found is None) == holds, found
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert kept == [p.data_ptr() for p in model.parameters()]


def in_half(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not wider.full()):
        return model(batch["x"]).float()


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("apart, holds", [(1e-3, True), (0.0, False)])  # bf16 has 3 digits; 0: not in float64 either
def test_what_bf16_alone_decides_is_no_mistake_of_the_engine(name, apart, holds):
    torch.manual_seed(0)
    found = checked(name, Rounding(apart), in_half, {"x": torch.randn(4, 3)}, half=True)
    assert (found is None) == holds, found


class MixingInHalf(Rounding):
    """In bf16, and there alone, an example has a thousandth of another one: less than rounding does, and no rounding."""

    def forward(self, x):
        hidden = self.layer(x)
        own = super().forward(x)
        return own + 1e-3 * hidden[:, 0].roll(1) if hidden.dtype == torch.bfloat16 else own


def test_examples_that_mix_in_bf16_alone_are_refused_beside_a_kink():
    torch.manual_seed(0)
    assert checked("factored", MixingInHalf(1e-3), in_half, {"x": torch.randn(4, 3)}, half=True)


def test_a_rule_that_is_wrong_in_bf16_alone_is_refused_beside_a_kink(monkeypatch):
    right = LinearPiece.add_weighted

    def wrong(self, total, factors):
        right(self, total, factors * (1.0 if wider.full() else 2.0))

    monkeypatch.setattr(LinearPiece, "add_weighted", wrong)
    torch.manual_seed(0)
    assert checked("factored", Rounding(1e-3), in_half, {"x": torch.randn(4, 3)}, half=True)


@pytest.mark.parametrize("wrong", [1.0, 0.3])
def test_a_step_in_bf16_is_held_to_what_is_found_again(wrong):
    """Norms a third of the real ones would let three times the clip norm pass."""
    torch.manual_seed(0)
    model, batch = Rounding(1e-3), {"x": torch.randn(4, 3)}
    engine = engine_class("factored")(
        model, in_half, dict(model.named_parameters()), lambda phase: contextlib.nullcontext()
    )
    engine.agreed = True
    losses, norms = engine.accumulate(batch, RunningSums(engine.parameters, {}), 0.1, {})
    told = contextlib.nullcontext() if wrong == 1.0 else pytest.raises(CannotRun)
    with told:
        compare(engine, batch, {}, 0.1, None, True, losses, wrong * norms)
