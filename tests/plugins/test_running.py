"""What methods, decoders and tasks give back while they run: a misfit ends the run as a record with one sentence."""

import dataclasses
import sys

import pytest
import torch
from torch import nn

from dpft.harness.query.encoding import Complement, Encoding, Stacked
from dpft.harness.query.queries import Beside, Gradients, Values
from dpft.harness.query.updates import LazyUpdates
from dpft.harness.runs import registry
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.settings import Settings
from dpft.methods.base import Method
from dpft.methods.clipping.base import ClippingRule
from dpft.methods.decoders.base import Decoder
from dpft.tasks.lowrank import LowRank

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHT, BIAS = "features.weight", "features.bias"
SHAPES = {WEIGHT: [64, 256], BIAS: [64], "head.weight": [256, 64], "head.bias": [256]}

BASES = {Method: "method", Decoder: "decoder", ClippingRule: "clipping rule", LowRank: "task"}


@pytest.fixture
def ended(monkeypatch):
    """(status, error) of a run of two steps of a method, decoder or task; examples are drawn once for all tests."""

    def ending(*parts, **more):
        names = {"method": "dp-sgd", "task": "small", "model": "layers"}
        for cls in (Small, *parts):
            kind = next(kind for base, kind in BASES.items() if issubclass(cls, base))
            monkeypatch.setitem(registry._found(kind).classes, cls.name, cls)
            names[kind.split()[0]] = cls.name
        spec = resolve({"batch_size": 64, "steps": 2, "eval_every": 2, "epsilon": 0.5, **names, **more})
        record, _ = run.execute(spec, Settings(), lambda step, row: None)
        return record["status"], record["error"]

    return ending


class Small(LowRank):
    """`low-rank`, drawn once."""

    name = "small"
    drawn: list = []

    def load(self, data_dir):
        if not self.drawn:
            self.drawn.append(super().load(data_dir))
        return self.drawn[0]


def method_of(**members):
    return type("Mine", (Method,), {"name": "mine", **members})


def decoder_of(decode):
    return type("Mine", (Decoder,), {"name": "mine", "decode": lambda self, noisy, step: decode(noisy.mean())})


def rule_of(**members):
    return type("Mine", (ClippingRule,), {"name": "mine", **members})


def task_of(**members):
    return type("Mine", (Small,), {"name": "mine", **members})


def stepping(make):
    """A method whose step returns what `make` makes of the release."""

    def step(self, ask, step):
        (noisy,) = ask(gradient=Gradients())
        return make(noisy.mean())

    return method_of(step=step)


def asking(*unnamed, **queries):
    def step(self, ask, step):
        ask(*unnamed, **queries)
        return {}

    return method_of(
        step=step,
        asks=(Gradients, Values),
        releases=lambda self, step: {name: 1 / len(queries) for name in queries} or {"gradient": 1.0},
    )


def encoding(name=WEIGHT, **sides):
    return asking(gradient=Gradients(encodings={name: Encoding(**sides)}))


def optimizing(make):
    return method_of(optimizer=lambda self, parameters, head, spec: make(parameters, spec.lr))


def groups(parameters, rate, **more):
    first, *rest = parameters.values()
    return torch.optim.SGD([{"params": [first], **more}, {"params": rest}], lr=rate)


def changed(**more):
    """What `prepare` of the task returns, but for some of it."""

    def prepare(self, data, spec, generator):
        made = dataclasses.replace(Small.prepare(self, data, spec, generator))
        for name, value in more.items():
            object.__setattr__(made, name, value)
        return made

    return prepare


class Renamed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head_parameters = inner, inner.head_parameters

    def forward(self, inputs):
        return self.inner(inputs)


ones = torch.ones


@pytest.mark.parametrize(
    "made, words",
    [
        # what a step returns
        (stepping(lambda mean: None), ["`step`", "returned None", "return the update"]),
        (stepping(lambda mean: mean[WEIGHT]), ["`step`", "Tensor"]),
        (stepping(lambda mean: {"features.wieght": mean[WEIGHT]}), ["'features.wieght'", "did you mean 'features.weight'?"]),
        (stepping(lambda mean: {WEIGHT: None}), [f"the update of {WEIGHT} is None", "[64, 256]"]),
        (stepping(lambda mean: {WEIGHT: mean[WEIGHT].T}), [f"update of {WEIGHT} has shape [256, 64]", "[64, 256]"]),
        (stepping(lambda mean: {BIAS: mean[BIAS].sum()}), [f"update of {BIAS} has shape []", "[64]"]),
        (stepping(lambda mean: {BIAS: mean[BIAS].long()}), [f"update of {BIAS} is of torch.int64"]),
        (stepping(lambda mean: {BIAS: ones(64, device="meta")}), [f"update of {BIAS} is on meta", "cpu"]),
        (stepping(lambda mean: LazyUpdates({"bias": mean[BIAS]}, lambda n, t: t)), ["'bias'", "no parameter"]),
        (stepping(lambda mean: LazyUpdates({BIAS: mean[BIAS]}, lambda n, t: t[:3])), [f"{BIAS} has shape [3]", "[64]"]),
        # what a hook raises
        (stepping(lambda mean: sys.exit(0)), ["`step` of method mine (class Mine) calls sys.exit (test_running.py:", "let it"]),
        (stepping(lambda mean: 1 / 0), ["`step` of method mine (class Mine) ends with ZeroDivisionError at test_running.py:"]),
        (method_of(prepare=lambda self, model, generator: sys.exit()), ["`prepare` of method mine", "calls sys.exit"]),
        (decoder_of(lambda mean: sys.exit(3)), ["`decode` of decoder mine (class Mine) calls sys.exit"]),
        (task_of(loss=lambda self, model, batch: sys.exit(1)), ["`loss` of task mine (class Mine) calls sys.exit"]),
        # what a decoder returns
        (decoder_of(lambda mean: None), ["`decode` of decoder mine (class Mine)", "returned None"]),
        (decoder_of(lambda mean: {"bias": mean[BIAS]}), ["`decode` of decoder mine", "'bias'"]),
        (decoder_of(lambda mean: {BIAS: mean[BIAS][None]}), ["`decode` of decoder mine", f"{BIAS} has shape [1, 64]"]),
        # what a clipping rule does
        (rule_of(amend=lambda self, gradient: gradient), ["`amend` of clipping rule mine (class Mine)", "type Gradients"]),
        (rule_of(function="abadie"), ["no clipping function called 'abadie'", "did you mean 'abadi'?"]),
        # questions
        (asking(Gradients()), ["Method mine (class Mine) asks for nothing by name", "ask(gradient=Gradients())"]),
        (asking(), ["asks for nothing by name"]),
        (asking(gradient=5), ["asks for 'gradient'", "type int is no question"]),
        (asking(gradient=Gradients), ["asks for 'gradient'", "Gradients(...)"]),
        (asking(gradient=Gradients(only=frozenset({"features.bais"}))), ["only names 'features.bais'", f"{BIAS!r}?"]),
        (asking(gradient=Gradients(only=BIAS)), ["only is 'features.bias'", "a set of names"]),
        (asking(gradient=Gradients(loss=3)), ["loss is a value of type int"]),
        (asking(gradient=Gradients(encodings=[1])), ["encodings is a value of type list"]),
        (asking(gradient=Gradients(beside=Beside(size=0, of=ones))), ["size is 0"]),
        (asking(number=Values(size=1.5, of=ones, bound=1.0)), ["asks for 'number'", "size is 1.5"]),
        (asking(number=Values(size=1, of=None, bound=1.0)), ["of is None", "give a function"]),
        (asking(number=Values(size=1, of=lambda seen: 1.0, bound=1.0)), ["answered in type float", "`of` return"]),
        # encodings
        (encoding("features.wieght", left=ones(64, 2)), ["an encoding is of 'features.wieght'", f"{WEIGHT!r}?"]),
        (encoding(left=ones(256, 2)), [f"encoding of {WEIGHT}", "[64, 256]", "left side of shape [256, 2]", "mean right?"]),
        (encoding(right=ones(64, 2)), ["right side of shape [64, 2]", "[256, r]", "mean left?"]),
        (encoding(right=ones(2, 256)), ["right side of shape [2, 256]", "[256, r]"]),
        (encoding(left=Complement(ones(256, 2))), ["left side of shape [256, 2]"]),
        (encoding(BIAS, right=ones(64, 2)), [f"encoding of {BIAS}", "right side", "give left"]),
        (encoding(left=torch.tensor([3, 64])), ["keeps row 64 on its left side", "0 to 63"]),
        (encoding(right=torch.tensor([-1])), ["keeps row -1 on its right side", "0 to 255"]),
        (encoding(left=torch.tensor([1.0])), ["vector of torch.float32", "int64"]),
        (encoding(left=ones(64, 2).long()), ["left side of torch.int64", "floating-point"]),
        (encoding(left=ones(64, 2, device="meta")), ["left side on meta", "cpu"]),
        (encoding(left=[0, 1]), ["left side of a value of type list"]),
        (encoding(left=ones(64, 2), weights=ones(64, 256)), ["weights of shape [64, 256]", "[2, 256]"]),
        (asking(gradient=Gradients(encodings={WEIGHT: ones(64, 2)})), [f"encoding of {WEIGHT}", "give an Encoding(...)"]),
        (asking(gradient=Gradients(encodings={WEIGHT: Stacked(parts=(Encoding(left=ones(3, 2)),))})), ["shape [3, 2]"]),
        # optimizer
        (optimizing(lambda parameters, lr: None), ["`optimizer`", "None", "torch.optim.Optimizer"]),
        (optimizing(lambda parameters, lr: groups(parameters, lr, lr=2 * lr)), ["group 0", "lr_factor=2"]),
        (optimizing(lambda parameters, lr: groups(parameters, 5.0)), ["group 0", "lr=5", "would replace"]),
        (optimizing(lambda parameters, lr: groups(parameters, lr, lr_factor="2")), ["lr_factor='2'"]),
        (optimizing(lambda parameters, lr: torch.optim.SGD([parameters[BIAS]], lr)), [f"leaves out {WEIGHT}"]),
        # a model
        (method_of(prepare=lambda self, model, generator: None), ["`prepare` of method mine", "None", "return the model"]),
        (method_of(prepare=lambda self, model, generator: Renamed(model)), ["without the parameter head.bias"]),
        (method_of(skip=lambda self, model: True), ["`skip`", "True", "a sentence"]),
        # a task
        (task_of(prepare=lambda self, data, spec, generator: None), ["`prepare` of task mine (class Mine)", "Prepared"]),
        (task_of(prepare=changed(model=5)), ["`prepare` of task mine", "type int", "torch.nn.Module"]),
        (task_of(prepare=changed(model=nn.Linear(2, 2))), ["`head_parameters`", "() for none"]),
        (task_of(prepare=changed(train_lengths=[1])), ["20000 examples of train and 1 train_lengths"]),
        (task_of(prepare=changed(model_fingerprint="random")), ["the model_fingerprint 'random'", "64 hex digits"]),
        (task_of(loss=lambda self, model, batch: None), ["loss has type NoneType"]),
        (task_of(loss=lambda self, model, batch: Small.loss(self, model, batch).mean()), ["loss has shape ()"]),
        (task_of(predict=lambda self, model, batch: ([], [])), ["`predict` of task mine", "0 predictions"]),
        (task_of(predict=lambda self, model, batch: (None, [])), ["`predict`", "None predictions"]),
        (task_of(metric="accuracy"), ["`make_metric` of task mine", "gives r2, not 'accuracy'"]),
    ],
)  # fmt: skip
def test_a_misfit_ends_the_run_as_a_record_with_a_sentence(ended, made, words):
    status, error = ended(made)
    assert status == "error"
    for word in words:
        assert word in error, error
    assert error.endswith((".", "?"))


def test_the_names_of_these_tests_are_those_of_the_model(ended):
    seen = {}

    def prepare(self, model, generator):
        seen.update({name: list(p.shape) for name, p in model.named_parameters()})
        return model

    assert ended(method_of(prepare=prepare)) == ("done", None)
    assert seen == SHAPES


def test_what_fits_is_let_through(ended):
    """Sides of all forms, groups with a factor, updates of some parameters, as a mapping or made when they are asked for."""

    class Mine(Method):
        name = "mine"

        def step(self, ask, step):
            maps = {
                WEIGHT: Encoding(left=torch.tensor([0, 63]), right=ones(256, 3)),
                "head.weight": Encoding(left=Complement(torch.eye(256)[:, :2]), weights=ones(256, 64)),
                BIAS: Encoding(left=ones(64, 1)),
                "head.bias": None,
            }
            (noisy,) = ask(gradient=Gradients(encodings=maps))
            mean = noisy.mean()
            if step == 0:
                return {"head.bias": mean["head.bias"]}
            return LazyUpdates({WEIGHT: mean[WEIGHT]}, lambda name, part: maps[name].lift(part, torch.Size([64, 256])))

        def optimizer(self, parameters, head, spec):
            return groups(parameters, spec.lr, lr_factor=0.5)

    assert ended(Mine) == ("done", None)


@pytest.mark.parametrize(
    "made, words",
    [
        (stepping(lambda mean: 1 / 0), "not shown: `step` of method mine (class Mine) ends with ZeroDivisionError"),
        (stepping(lambda mean: sys.exit(0)), "not shown: `step` of method mine (class Mine) calls sys.exit"),
        (method_of(prepare=lambda self, model, generator: None), "not shown: `prepare` of method mine"),
        (asking(gradient=5), "not shown: Method mine (class Mine) asks for 'gradient'"),
    ],
)
def test_a_method_that_fails_is_described_all_the_same(dpft, monkeypatch, made, words):
    monkeypatch.setitem(registry._found("method").classes, "mine", made)
    code, out, err = dpft("describe", "mine")
    assert code == 0 and err == "" and f"releases: {words}" in out
