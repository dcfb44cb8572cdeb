"""Methods that ask several questions a step, through the real loop: what is booked, looked at twice, refused and resumed."""

import contextlib
import dataclasses

import pytest
import torch
from asking import recorded
from small_runs import a_spec, quiet, trained

from dpft.harness.privacy import verify_record
from dpft.harness.query.queries import Beside, Gradients, Values
from dpft.harness.runs import registry
from dpft.harness.runs.plan import plan
from dpft.harness.train import journal, run
from dpft.methods.subset import LastLayer

pytestmark = pytest.mark.usefixtures("one_thread")


def words(seen):
    """[b, 1]: a number that tells an example by."""
    tokens = seen.batch["input_ids"] * seen.batch["attention_mask"]
    return (tokens.double() * torch.arange(1, tokens.shape[1] + 1)).sum(1, keepdim=True)


class Twice(LastLayer):
    """Counts, then asks for gradients and for the same count again; the third declared release is never asked for."""

    name = "twice"
    asks = (Values, Gradients)
    of = staticmethod(words)

    def releases(self, step):
        return {"before": 0.25, "gradient": 0.25, "after": 0.25, "never": 0.25}

    def question(self):
        return Values(size=1, of=self.of, bound=1e9)

    def step(self, ask, step):
        (self.before,) = ask(before=self.question())
        noisy, _ = ask(gradient=Gradients(), after=self.question())
        return self.decoder.decode(noisy, step)


class Silent(Twice):
    """Asks nothing in its last step."""

    name = "silent"

    def step(self, ask, step):
        return super().step(ask, step) if step < 3 else {}


@pytest.fixture
def known(monkeypatch):
    """Registers a method for one test."""

    def register(method):
        monkeypatch.setitem(registry.methods(), method.name, method)
        return method.name

    return register


def test_two_breaths_of_a_step_look_at_the_same_batch_and_the_next_step_at_another(known, setup_of):
    found, _ = recorded(setup_of(known(Twice)), [[1, 5, 9], [1, 5, 9, 11], [], [2]])
    sums = [[one.clean["values"] for one in found if one.step == step and "values" in one.clean] for step in range(4)]
    assert all(torch.equal(*pair) for pair in sums)
    assert len({float(before) for before, _ in sums}) == 4 and float(sums[2][0]) == 0


@pytest.mark.parametrize("method", [Twice, Silent])
def test_what_is_declared_is_booked_whether_it_is_asked_for_or_not(method, known, tiny_bert, settings):
    record, curve = run.execute(a_spec(known(method), tiny_bert), settings, quiet)
    assert record["status"] == "done", record["error"]
    (event,) = record["privacy"]["ledger"]
    assert (event["step_from"], event["step_to"]) == (0, 4)
    assert {release["name"] for release in event["releases"]} == {"before", "gradient", "after", "never"}
    sigma = record["privacy"]["noise_multiplier"]
    assert all(r["noise_multiplier"] == pytest.approx(2 * sigma) for r in event["releases"])
    plain = run.execute(a_spec("last-layer", tiny_bert), settings, quiet)[0]["privacy"]
    assert record["privacy"]["epsilon"] == pytest.approx(plain["epsilon"], rel=1e-6)
    assert verify_record(record, 4) == []
    assert all(row["release"] for row in curve[:3])


# --- what may not be asked


def centred(seen):
    rows = words(seen)
    return rows - rows.mean(0)


def ranked(seen):
    rows = words(seen)
    return (rows < rows.T).double().sum(1, keepdim=True).to_sparse()


def relative_losses(seen):
    return seen.losses.reshape(len(seen.losses), -1)[:, :1] / seen.losses.sum()


@pytest.mark.parametrize("of", [centred, ranked, relative_losses])
@pytest.mark.parametrize("where", ["alone", "with gradients", "beside gradients", "at points"])
def test_numbers_that_depend_on_other_examples_are_refused(of, where, known, tiny_bert, settings):
    class Mixing(LastLayer):
        name = "mixing"
        asks = (Values, Gradients)

        def releases(self, step):
            return {"gradient": 0.5, "values": 0.5}

        def step(self, ask, step):
            points = [nothing_moves] if where == "at points" else ()
            values = Values(size=1, of=of, bound=1.0, at=points)
            if where == "beside gradients":
                (noisy,) = ask(gradient=Gradients(beside=Beside(size=1, of=of)))
            elif where == "with gradients":
                noisy, _ = ask(gradient=Gradients(), values=values)
            else:
                ask(values=values)
                (noisy,) = ask(gradient=Gradients())
            return self.decoder.decode(noisy, step)

    record, curve = run.execute(a_spec(known(Mixing), tiny_bert), settings, quiet)
    assert record["status"] == "error" and "let `of` treat each row by itself" in record["error"], record["error"]
    assert curve == [] and record["privacy"]["steps_run"] == 0


def nothing_moves():
    return contextlib.nullcontext()


def in_the_model(method, seen):
    seen.model.kept = words(seen).max()


def in_a_buffer(method, seen):
    seen.model.register_buffer("largest", words(seen).max()[None])


def in_a_frozen_weight(method, seen):
    with torch.no_grad():
        next(p for p in seen.model.parameters() if not p.requires_grad).add_(1e-6 * float(words(seen).max()))


def of_single_examples(method, seen):
    """What the comparison with each example alone would give away."""
    if len(words(seen)) == 1:
        method.kept = words(seen)


def in_the_method(method, seen):
    method.kept = words(seen).max()


def in_the_decoder(method, seen):
    method.decoder.kept = words(seen).max()


def in_the_rule(method, seen):
    method.rule.settings["kept"] = float(words(seen).max())


@pytest.mark.parametrize(
    "keep",
    [in_the_model, in_a_buffer, in_a_frozen_weight, in_the_method, of_single_examples, in_the_decoder, in_the_rule],
)
@pytest.mark.parametrize("where", ["values", "beside"])
def test_numbers_that_are_kept_anywhere_are_refused(keep, where, known, tiny_bert, settings):
    class Keeping(LastLayer):
        name = "keeping"
        asks = (Values, Gradients)

        def releases(self, step):
            return {"gradient": 0.5, "values": 0.5}

        def step(self, ask, step):
            def of(seen):
                keep(self, seen)
                return torch.ones(len(words(seen)), 1)

            if where == "values":
                ask(values=Values(size=1, of=of, bound=1.0))
                (noisy,) = ask(gradient=Gradients())
            else:
                (noisy,) = ask(gradient=Gradients(beside=Beside(size=1, of=of)))
            return self.decoder.decode(noisy, step)

    record, curve = run.execute(a_spec(known(Keeping), tiny_bert), settings, quiet)
    assert record["status"] == "error" and "changed while private gradients were taken" in record["error"], record[
        "error"
    ]
    assert curve == [] and record["privacy"]["steps_run"] == 0


# --- runs that end in the middle of a step


def test_a_number_that_is_not_finite_in_a_second_breath_leaves_the_step_charged(known, tiny_bert, settings):
    class Breaking(Twice):
        name = "breaking"

        def step(self, ask, step):
            ask(before=self.question())
            (noisy,) = ask(after=Values(size=1, of=lambda seen: words(seen) * float("nan"), bound=1.0))
            return {}

    record, curve = run.execute(a_spec(known(Breaking), tiny_bert), settings, quiet)
    assert record["status"] == "diverged" and curve == []
    assert record["privacy"]["steps_run"] == 1 and record["privacy"]["epsilon"][2] > 0


def test_with_secret_noise_a_step_that_was_cut_between_its_answers_is_charged_and_lost(
    known, tiny_bert, settings, tmp_path
):
    """Its first answer was drawn and cannot be drawn again: the run goes on with one step fewer."""
    one, secret = (
        a_spec(known(Twice), tiny_bert),
        dataclasses.replace(settings, secure_noise=True, checkpoint_seconds=0.0),
    )
    path, budget = tmp_path / "run.ckpt", plan(a_spec(known(Twice), tiny_bert), settings.data_dir)
    cut = run.build(one, secret, budget, path)
    trains = cut.method.step

    def step(ask, number):
        def asking(**queries):
            if number == 2 and "gradient" in queries:
                raise KeyboardInterrupt
            return ask(**queries)

        return trains(asking, number)

    cut.method.step = step
    with pytest.raises(KeyboardInterrupt):
        trained(cut)
    assert journal.releases(journal.path_of(path)) == 3
    record, curve = run.execute(one, secret, quiet, path)
    assert record["status"] == "done", record["error"]
    assert (record["privacy"]["steps_run"], record["privacy"]["steps_lost"], len(curve)) == (4, 1, 3)
    assert record["privacy"]["within_budget"] and verify_record(record, len(curve)) == []
