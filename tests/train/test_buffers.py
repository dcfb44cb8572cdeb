"""What a model holds beside its weights: nothing may be written there from private data, and what releases write is kept."""

import dataclasses

import pytest
import torch
from small_runs import a_spec, quiet, stopped, trained
from torch import nn

from dpft.harness.errors import BadInput
from dpft.harness.query.queries import Gradients
from dpft.harness.runs import registry
from dpft.harness.runs.spec import RunSpec
from dpft.harness.train import run

pytestmark = pytest.mark.usefixtures("one_thread")
ENGINES = ["factored", "opacus", "reference"]


class Tracking(nn.Module):
    """The tiny BERT, whose pooled states are shown to `note(self, x [b, d])`, and may go through `norm`."""

    def __init__(self, inner, note=None, norm=None):
        super().__init__()
        self.encoder, self.head, self.head_parameters = inner.encoder, inner.head, inner.head_parameters
        self.note, self.norm = note, norm
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("table", torch.zeros(600, 600))
        self.seen, self.largest_float, self.kept = torch.zeros(3), 0.0, []
        self.still = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, attention_mask, **inputs):
        x = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state[:, 0]
        if self.note is not None and self.training:
            self.note(self, x.detach())
        return self.head(x if self.norm is None else self.norm(x))


def buffer(self, x):
    self.largest.copy_(torch.maximum(self.largest, x.abs().max()))


def replaced_buffer(self, x):
    self.largest = torch.maximum(self.largest, x.abs().max())


def large_buffer(self, x):
    self.table[3, 4] = torch.maximum(self.table[3, 4], x.abs().max())


def attribute(self, x):
    self.seen = self.seen + x.abs().max()


def number(self, x):
    self.largest_float = max(self.largest_float, float(x.abs().max()))


def listed(self, x):
    self.kept.append(float(x.abs().max()))


def new_attribute(self, x):
    self.first = x.abs().max()


def frozen_parameter(self, x):
    with torch.no_grad():
        self.still.copy_(x[0, :2])


def frozen_parameter_unseen_by_autograd(self, x):
    self.still.data.add_(x.abs().max())


LEAKS = {
    "buffer largest": buffer,
    "buffer largest again": replaced_buffer,
    "buffer table": large_buffer,
    "attribute seen": attribute,
    "attribute largest_float": number,
    "attribute kept": listed,
    "attribute first": new_attribute,
    "parameter still": frozen_parameter,
    "parameter still's values": frozen_parameter_unseen_by_autograd,
}


def execute_with(monkeypatch, tiny_bert, settings, wrap, engine, method="dp-adam"):
    monkeypatch.setattr(registry.method(method), "prepare", lambda self, model, generator: wrap(model))
    some = dataclasses.replace(settings, engine=engine)
    return run.execute(a_spec(method, tiny_bert, batch_size=20, steps=2), some, quiet)[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LEAKS)
def test_a_model_that_keeps_something_of_its_inputs_is_refused_by_name(name, engine, monkeypatch, tiny_bert, settings):
    if engine != "factored" and name not in ("buffer largest", "parameter still's values"):
        pytest.skip("the engine makes no difference to the rest")
    record = execute_with(monkeypatch, tiny_bert, settings, lambda m: Tracking(m, LEAKS[name]), engine)
    assert record["status"] == "error", "it trained, and kept what no noise covers"
    assert name.removesuffix(" again").split("'")[0] in record["error"] and "no noise covers" in record["error"]
    late = "unseen" in LEAKS[name].__name__  # a write to .data is looked for in the steps 1, 4, 16, ...
    assert record["privacy"]["steps_run"] == (1 if late else 0)


NORMS = {
    "BatchNorm1d that tracks": (lambda: nn.BatchNorm1d(32), ENGINES),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(32, track_running_stats=False), ["factored", "opacus"]),
    "InstanceNorm1d that tracks": (lambda: Instances(track_running_stats=True), ENGINES),
}


class Instances(nn.Module):
    """Instance norm over 8 channels of 4 numbers each."""

    def __init__(self, **options):
        super().__init__()
        self.inner = nn.InstanceNorm1d(8, **options)

    def forward(self, x):
        return self.inner(x.unflatten(1, (8, 4))).flatten(1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_tracks_or_mixes_is_refused_before_training(name, engine, monkeypatch, tiny_bert, settings):
    make, refused = NORMS[name]
    if engine not in refused:
        pytest.skip("nothing is wrong there: see the next test")
    record = execute_with(monkeypatch, tiny_bert, settings, lambda m: Tracking(m, norm=make()), engine)
    assert record["status"] == "error" and record["privacy"]["steps_run"] == 0
    assert "GroupNorm" in record["error"] or "Opacus" in record["error"]
    assert "reference" not in record["error"], "it would be refused there, too"


@pytest.mark.parametrize("norm", [lambda: Instances(), lambda: nn.GroupNorm(4, 32), lambda: nn.LayerNorm(32)])
def test_norms_that_keep_nothing_train(norm, monkeypatch, tiny_bert, settings):
    record = execute_with(monkeypatch, tiny_bert, settings, lambda m: Tracking(m, norm=norm()), "factored")
    assert record["status"] == "done", record["error"]


def test_a_table_that_rescales_rows_as_they_are_looked_up_is_refused_everywhere(monkeypatch, tiny_bert, settings):
    def limited(model):
        model.encoder.embeddings.word_embeddings.max_norm = 0.5
        return model

    for engine in ENGINES:
        record = execute_with(monkeypatch, tiny_bert, settings, limited, engine)
        assert record["status"] == "error" and "max_norm" in record["error"]
        assert "--engine" not in record["error"]


def test_a_method_whose_loss_keeps_something_is_refused(monkeypatch, tiny_bert, settings):
    method = registry.method("dp-adam")

    def step(self, ask, step):
        def keeps(loss):
            def noting(model, batch):
                found = loss(model, batch)
                self.noted = found.detach().max()
                return found

            return noting

        (noisy,) = ask(gradient=Gradients(loss=keeps))
        return self.decoder.decode(noisy, step)

    monkeypatch.setattr(method, "step", step)
    record = run.execute(a_spec("dp-adam", tiny_bert), settings, quiet)[0]
    assert record["status"] == "error" and "method's attribute noted" in record["error"]


def counting(setup):
    """A method that keeps a running mean of its releases in a buffer of the model, which is post-processing."""
    model, original = setup.prepared.model, setup.method.decoder.decode

    def decode(noisy, step):
        model.largest.add_(next(iter(noisy.tensors.values())).abs().max())
        return {name: u * (1 + model.largest) for name, u in original(noisy, step).items()}

    setup.method.decoder.decode = decode
    return setup


def test_what_releases_write_into_a_buffer_is_allowed_and_resumed_bit_for_bit(setup_of, monkeypatch, tmp_path):
    monkeypatch.setattr(registry.method("dp-adam"), "prepare", lambda self, model, generator: Tracking(model))
    whole = counting(setup_of("dp-adam"))
    made = trained(whole, watched=False)
    assert float(whole.prepared.model.largest) > 0
    path = tmp_path / "run.ckpt"
    stopped(counting(setup_of("dp-adam", path)))
    resumed = counting(setup_of("dp-adam", path))
    again = trained(resumed)
    assert torch.equal(resumed.prepared.model.largest, whole.prepared.model.largest)
    assert again.progress.curve == made.progress.curve and again.outcome.final == made.outcome.final


def test_a_private_method_needs_a_clip_norm_and_an_epsilon(monkeypatch, tiny_bert):
    method = registry.method("dp-adam")
    for key in ("clip_norm", "epsilon"):
        with monkeypatch.context() as patch:
            patch.setattr(method, "defaults", {**method.defaults, key: None})
            with pytest.raises(BadInput, match=f"{key} must be a positive number"):
                spec = a_spec("dp-adam", tiny_bert, **({} if key == "clip_norm" else {"epsilon": None}))
                assert isinstance(spec, RunSpec)
