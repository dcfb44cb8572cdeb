"""Rows of the token table: who survives, what moves and what does not, what is asked in which order, what it costs."""

import dataclasses
import json
import math

import pytest
import torch
from small_runs import a_spec, quiet, trained, weights
from torch import nn

from dpft.harness.errors import BadInput
from dpft.harness.privacy import verify_record
from dpft.harness.query.noisy_sum import VALUES, NoisySum
from dpft.harness.query.queries import Gradients, Seen, Values
from dpft.harness.query.updates import apply
from dpft.harness.runs import registry
from dpft.harness.runs.releases import shares
from dpft.harness.train import run
from dpft.harness.train.answer import Answers
from dpft.harness.train.core import Watcher
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source
from dpft.methods.decoders.row_moments import RowAdam, Velocity
from dpft.methods.token_table import token_table

TABLE = "encoder.embeddings.word_embeddings.weight"
ROWS = ["dp-adafest", "dp-fest"]
ABSENT = [1, 4, 5, 6]  # [UNK], [MASK], "terrible" and ".": no sentence of the mirror has them
SETTINGS = [{}, {"optimizer": "sgd", "momentum": 0.9, "lr": 0.02}]
pytestmark = pytest.mark.usefixtures("one_thread")


class Notes(Watcher):
    """What was asked and released, by name."""

    def __init__(self):
        self.queries, self.answers = {}, {}

    def asked(self, queries):
        self.queries |= queries

    def released(self, name, noisy):  # directions are made in place
        self.answers[name] = dataclasses.replace(noisy, tensors={n: t.clone() for n, t in noisy.tensors.items()})


def silent(setup, sigma=0.0):
    """The same with another noise."""
    mechanism = GaussianMechanism(sigma, setup.spec.clip_norm, setup.spec.batch_size, source("cpu", 0))
    return dataclasses.replace(setup, mechanism=mechanism)


def steps(setup, batches):
    """Train on these batches (lists of examples), one step each; yields (update, notes, weights before, weights after)."""
    method, optimizer = setup.method, setup.method.optimizer(setup.parameters, setup.head, setup.spec)
    method.rule.start(setup.spec, setup.mechanism.noise_multiplier)
    for step, examples in enumerate(batches):
        notes, before = Notes(), weights(setup)
        made = [setup.prepared.collate(examples)] if examples else []
        update = method.step(Answers(setup.core, shares(method, step), lambda made=made: made, watcher=notes), step)
        if update:
            apply(optimizer, setup.parameters, update)
        yield update, notes, before, weights(setup)


def chosen(notes):
    return notes.queries["gradient"].encodings[TABLE].left


def moved(before, after):
    return set((before[TABLE] != after[TABLE]).any(1).nonzero().flatten().tolist())


def tokens_of(examples):
    return {int(token) for example in examples for token in example["input_ids"]}


# --- what is asked


def test_the_two_questions_share_the_budget_as_published(setup_of):
    setup = setup_of("dp-adafest", noise_ratio=3.0)
    method, sigma = setup.method, setup.mechanism.noise_multiplier
    ((_, notes, *_),) = steps(setup, [setup.prepared.train[:9]])
    touched, gradient = notes.answers["touched"], notes.answers["gradient"]
    assert touched.noise_multiplier == pytest.approx(sigma * math.sqrt(10))
    assert gradient.noise_multiplier == pytest.approx(sigma * math.sqrt(10) / 3)
    assert touched.clip_norm == 1.0 and gradient.clip_norm == setup.spec.clip_norm
    assert sum(method.releases(0).values()) == pytest.approx(1) and list(notes.queries) == ["touched", "gradient"]
    assert registry.make("dp-adafest", "mean", {}).releases(0)["gradient"] ** -0.5 == pytest.approx(1.02, abs=1e-3)


def test_counts_have_the_noise_they_were_promised(setup_of):
    setup = setup_of("dp-adafest")
    method = setup.method
    found = []
    for _ in range(40):
        (touched,) = Answers(setup.core, shares(method, 0), lambda: [])(touched=method.touched())
        found.append(touched.values)
    assert torch.stack(found).std() == pytest.approx(touched.mean_noise_std, rel=0.1)
    assert touched.mean_noise_std == pytest.approx(math.sqrt(26) * setup.mechanism.noise_multiplier / 60)


@pytest.mark.parametrize("tau", [-1.0, 0.0, 1.5])
def test_the_rows_of_the_second_question_follow_the_first_answer_and_nothing_else(tau, setup_of):
    setup = setup_of("dp-adafest", tau=tau)
    values, asked = torch.randn(setup.method.size), []
    answer = NoisySum({VALUES: values}, 30.0, 1.0, 60)  # standard deviation 1/2

    def ask(**queries):
        asked.append(queries)
        if "touched" in queries:
            return (answer,)
        (encoding,) = queries["gradient"].encodings.values()
        made = {n: torch.ones_like(p) for n, p in setup.parameters.items()}
        return (NoisySum({**made, TABLE: made[TABLE][encoding.left]}, 1.0, 1.0, 60),)

    update = setup.method.step(ask, 0)
    expected = [row for row in range(len(values)) if values[row] > tau / 2]
    assert asked[1]["gradient"].encodings[TABLE].left.tolist() == expected
    assert update[TABLE].indices()[0].tolist() == expected and update[TABLE].shape == setup.parameters[TABLE].shape


def test_an_absent_example_adds_nothing_and_present_ones_add_up(setup_of):
    setup = silent(setup_of("dp-adafest"))
    method, examples = setup.method, setup.prepared.train[:7]

    def counts(*batches):
        made = [setup.prepared.collate(batch) for batch in batches]
        return Answers(setup.core, shares(method, 0), lambda: made)(touched=method.touched())[0].values * 60

    assert not counts().any()
    alone = [counts([example]) for example in examples]
    assert all(one.norm() == pytest.approx(1.0) for one in alone), "each is cut to C1"
    assert torch.allclose(counts(examples), sum(alone)) and torch.allclose(
        counts(examples[:2], examples[2:]), sum(alone)
    )


# --- which rows an example touches


def rows_of(method, **batch):
    return method.rows_of(Seen(None, {key: torch.tensor(value) for key, value in batch.items()}, None)).to_dense()


@pytest.mark.parametrize("padding", [None, 0])
def test_a_row_counts_once_and_padding_not_at_all(padding):
    method = registry.make("dp-adafest", "mean", {})
    method.size, method.padding = 6, padding
    ids = [[2, 3, 2, 0], [0, 5, 0, 0], [0, 0, 0, 0]]
    found = rows_of(method, input_ids=ids, attention_mask=[[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    first = float(
        padding is None
    )  # a token that is looked up and not masked counts, unless the table says it is padding
    assert found.tolist() == [[0, 0, 1, 1, 0, 0], [first, 0, 0, 0, 0, 1], [0] * 6]
    unmasked = rows_of(method, input_ids=ids)
    assert unmasked[:, 1:].tolist() == found[:, 1:].tolist() and bool(unmasked[:, 0].any()) == (padding is None)


def test_rows_that_count_are_those_with_a_gradient_however_long_the_batch(setup_of):
    setup = setup_of("dp-adafest")
    model, method = setup.prepared.model, setup.method
    nn.init.normal_(model.head.weight)
    short, long = sorted(setup.prepared.train[:40], key=lambda e: len(e["input_ids"]))[::39]
    for batch in ([short], [short, long]):
        batch = setup.prepared.collate(batch)
        (gradient,) = torch.autograd.grad(setup.task.loss(model, batch)[0], model.get_parameter(TABLE))
        found = method.rows_of(Seen(model, batch, None)).to_dense()[0]
        assert torch.equal(found != 0, gradient.abs().sum(1) > 0)
        assert set(found.nonzero().flatten().tolist()) == tokens_of([short])


def test_a_smaller_bound_never_hides_a_row_better():
    torch.manual_seed(0)
    rows = (torch.rand(50, 40) < torch.rand(50, 1)).double()
    rows = rows[rows.any(1)]

    def ratio(bound):
        return ((bound / rows.norm(dim=1)).clamp_max(1) @ rows) / bound

    for bound in (1.5, 3.0, 5.0):
        assert (ratio(1.0) >= ratio(bound) - 1e-12).all()
    assert torch.allclose(ratio(1.0), ratio(0.1)) and not torch.allclose(ratio(1.0), ratio(5.0))


# --- what moves


@pytest.mark.parametrize("more", SETTINGS)
def test_rows_that_survive_untouched_move_and_touched_ones_that_do_not_survive_stay(more, setup_of):
    setup = setup_of("dp-adafest", tau=0.0, **more)  # every second count without signal is above
    examples, saved, lost = setup.prepared.train[:2], set(), set()
    touched = tokens_of(examples)
    for update, notes, before, after in steps(setup, [examples] * 6):
        rows = set(chosen(notes).tolist())
        assert moved(before, after) == rows == set(update[TABLE].indices()[0].tolist())
        assert update[TABLE].values().abs().min() > 0, "no row is spared its noise"
        saved |= rows - touched
        lost |= touched - rows
    assert saved and lost, "the test saw neither"
    assert saved & set(ABSENT)


def kept_of(method):
    """What a method keeps of rows of its table: label -> row -> its numbers."""
    state = method.state_dict()
    (start,) = (key.removesuffix("names") for key in state if key.endswith("|names"))
    rows = state.pop(f"{start}names").tolist()
    return {k: dict(zip(rows, t.clone(), strict=True)) for k, t in state.items() if k.startswith(start)}


@pytest.mark.parametrize("more", SETTINGS)
def test_what_does_not_survive_keeps_weights_and_moments_bit_for_bit(more, setup_of):
    setup = setup_of("dp-adafest", tau=1.0, **more)
    held, ever = {}, set()
    for _, notes, before, after in steps(setup, [setup.prepared.train[:30]] * 5):
        rows = set(chosen(notes).tolist())
        out = [row for row in range(setup.method.size) if row not in rows]
        assert torch.equal(before[TABLE][out], after[TABLE][out])
        state, ever = kept_of(setup.method), ever | rows
        for label, was in held.items():
            now = state[label]
            assert all(torch.equal(was[row], now[row]) == (row not in rows) for row in was)
        held = state
        assert all(set(one) == ever for one in state.values()), "nothing is kept of a row that was never chosen"
    assert len(held) == (1 if more else 3) and len(ever) < setup.method.size


@pytest.mark.parametrize("more", SETTINGS)
def test_where_nothing_survives_all_else_trains(more, setup_of):
    setup = setup_of("dp-adafest", tau=1e6, **more)
    before = weights(setup)
    done, after = trained(setup), weights(setup)
    assert {name for name in after if torch.equal(after[name], before[name])} == {TABLE}
    assert done.cost.trains == sum(p.numel() for n, p in setup.parameters.items() if n != TABLE)


def test_where_all_survive_and_the_counts_are_cheap_it_is_dp_adam(setup_of):
    """By SGD: Adam would turn noise in rows without a gradient into whole steps."""
    ends, most = [], {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "head_lr_factor": 1.0}
    for method, more in (("dp-adafest", {"tau": -1e6, "noise_ratio": 1e3}), ("dp-adam", {})):
        setup = silent(setup_of(method, **most, **more), sigma=1e-7)
        nn.init.normal_(setup.prepared.model.head.weight, generator=torch.Generator().manual_seed(0))
        first, done = weights(setup), list(steps(setup, [setup.prepared.train[i : i + 50] for i in (0, 50, 100)]))
        if method == "dp-adafest":
            assert all(len(chosen(notes)) == setup.method.size for _, notes, *_ in done)
        ends.append({n: t - first[n] for n, t in done[-1][3].items()})
    for name, change in ends[0].items():
        assert torch.allclose(change, ends[1][name], atol=1e-6 + 1e-4 * float(change.abs().max())), name
    assert ends[0][TABLE].norm() > 1e-3


def test_without_noise_it_is_exactly_the_rows_that_are_touched(setup_of):
    setup = silent(setup_of("dp-adafest"))
    for _, notes, *_ in steps(setup, [setup.prepared.train[:3], [], setup.prepared.train[3:9]]):
        found = set(chosen(notes).tolist())
        assert not found & set(ABSENT)
    assert found == tokens_of(setup.prepared.train[3:9])


# --- moments


def test_moments_of_a_row_are_those_of_an_adam_that_saw_its_steps_only():
    torch.manual_seed(0)
    table = torch.randn(6, 3)
    alone = [nn.Parameter(row.clone()) for row in table]
    adams = [torch.optim.Adam([row], lr=0.1) for row in alone]
    mine, counts = RowAdam(), [0] * 6
    for step in range(12):
        rows = (torch.rand(6) < 0.5).nonzero().flatten()
        release = torch.randn(len(rows), 3)
        for row, own in zip(rows.tolist(), release, strict=True):
            alone[row].grad, counts[row] = own.clone(), counts[row] + 1
            adams[row].step()
        mine.precondition(release, rows, 6)
        table[rows] -= 0.1 * release
        if step == 5:  # a checkpoint between them changes nothing
            state, mine = {k: t.clone() for k, t in mine.state_dict().items()}, RowAdam()
            mine.load_state_dict({**state, "adam_first|other": torch.zeros(2)})
    assert torch.allclose(table, torch.stack([row.detach() for row in alone]), atol=1e-5)
    state = mine.state_dict()
    assert dict(zip(state["rows|names"].tolist(), state["rows|updates"].tolist(), strict=True)) == {
        row: count for row, count in enumerate(counts) if count
    }
    assert len(set(counts)) > 1


def test_velocities_of_rows_and_of_whole_tensors_are_those_of_sgd():
    torch.manual_seed(0)
    whole, rows = nn.Parameter(torch.zeros(4, 2)), torch.tensor([0, 3])
    sgd, mine, table = torch.optim.SGD([whole], lr=1.0, momentum=0.9), Velocity(0.9), torch.zeros(4, 2)
    for _ in range(4):
        release = torch.randn(4, 2)
        whole.grad = release.clone()
        sgd.step()
        some, every = release[rows].clone(), release.clone()
        mine.add_rows(some, rows, 4)
        mine.add("whole", every)
        table[rows] -= some
    assert torch.allclose(table[rows], whole[rows]) and not table[[1, 2]].any()
    assert torch.equal(every, mine.state_dict()["velocity|whole"]) and torch.allclose(every[rows], some)
    still = torch.ones(2)
    Velocity(0.0).add("none", still)
    assert still.tolist() == [1, 1] and not Velocity(0.0).state_dict()


@pytest.mark.parametrize("more", SETTINGS)
@pytest.mark.parametrize(
    ("name", "options", "cut"), [("dp-adafest", {"tau": 0.5}, 2), ("dp-fest", {"choose": "votes", "kept_rows": 9}, 1)]
)
def test_a_run_that_was_cut_goes_on_bit_for_bit(name, options, cut, more, setup_of, tmp_path):
    more = options | more
    whole = setup_of(name, **more)
    first = trained(whole)

    def interrupt(step, row):
        if step == cut + 1:
            raise KeyboardInterrupt

    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        trained(dataclasses.replace(setup_of(name, path, **more), checkpoint_seconds=0.0), interrupt, watched=False)
    resumed, seen = setup_of(name, path, **more), []
    again = trained(resumed, lambda step, row: seen.append(step), watched=False)
    assert seen[0] == cut + 1 and again.progress.curve == first.progress.curve
    assert again.progress.ledger.events == first.progress.ledger.events
    assert all(torch.equal(value, weights(whole)[n]) for n, value in weights(resumed).items())
    states = [one.method.state_dict() for one in (whole, resumed)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][k]) for k, t in states[0].items())


# --- a choice made once, and none


def test_fest_by_order_asks_for_the_first_rows_of_the_vocabulary_at_no_cost(setup_of):
    setup = setup_of("dp-fest", kept_rows=9)
    assert setup.method.releases(0) == {"gradient": 1.0} and setup.starts == (0,)
    for _, notes, before, after in steps(setup, [setup.prepared.train[:20]] * 2):
        assert list(notes.queries) == ["gradient"] and moved(before, after) == set(range(9))
    assert chosen(notes).tolist() == list(range(9))
    whole = setup_of("dp-fest")  # a table of fewer rows than kept_rows
    assert chosen(next(steps(whole, [[]]))[1]).tolist() == list(range(whole.method.size))


def test_fest_by_votes_chooses_by_the_release_of_a_step_that_moves_nothing(setup_of):
    setup = setup_of("dp-fest", kept_rows=9, choose="votes")
    assert setup.starts == (0, 1) and setup.method.releases(0) == {"touched": 1.0}
    done = list(steps(setup, [setup.prepared.train[:60]] * 3))
    votes = done[0][1].answers["touched"]
    assert votes.noise_multiplier == setup.mechanism.noise_multiplier, "all of the step's budget"
    assert done[0][0] == {} and all(torch.equal(t, done[0][2][n]) for n, t in done[0][3].items())
    best = sorted(range(setup.method.size), key=lambda row: -float(votes.values[row]))[:9]
    for _, notes, before, after in done[1:]:
        assert chosen(notes).tolist() == sorted(best) and moved(before, after) == set(best)
        assert list(notes.queries) == ["gradient"]
    assert {2, 3} <= set(best), "[CLS] and [SEP] are in every sentence"


def test_frozen_embeddings_is_dp_adam_without_the_table(setup_of):
    setup = setup_of("frozen-embeddings")
    assert set(weights(setup)) - set(setup.parameters) == {TABLE}
    assert setup.method.releases(0) == {"gradient": 1.0}
    before = weights(setup)
    trained(setup)
    assert {name for name, value in weights(setup).items() if torch.equal(value, before[name])} == {TABLE}


def test_where_nothing_survives_the_gradient_is_that_of_the_frozen_table(setup_of):
    found = []
    for method, more in (("dp-adafest", {"tau": 1e6}), ("frozen-embeddings", {})):
        setup = silent(setup_of(method, **more), sigma=1e-5)
        nn.init.normal_(setup.prepared.model.head.weight, generator=torch.Generator().manual_seed(0))
        ((_, notes, *_),) = steps(setup, [setup.prepared.train[:20]])
        found.append({n: t for n, t in notes.answers["gradient"].tensors.items() if t.numel()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(t, found[1][n], atol=1e-5) for n, t in found[0].items())


# --- records, refusals


@pytest.mark.parametrize("more", [{}, {"tau": 1e6}, {"clipping": "quantile"}])
def test_a_record_costs_what_dp_adam_costs_and_verifies(more, tiny_bert, settings):
    record, curve = run.execute(a_spec("dp-adafest", tiny_bert, **more), settings, quiet)
    assert record["status"] == "done", record["error"]
    plain = run.execute(a_spec("dp-adam", tiny_bert), settings, quiet)[0]
    assert record["privacy"]["epsilon"] == pytest.approx(plain["privacy"]["epsilon"], abs=1e-6)
    booked = {one["name"] for one in record["privacy"]["ledger"][0]["releases"]}
    assert {"touched", "gradient"} <= booked and verify_record(json.loads(json.dumps(record)), 4) == []
    assert curve[1]["alignment_noisy"] is not None and curve[1]["release"]


class Odd(nn.Module):
    """tables: how many; tied: to an output layer; named: whether it says which one tokens are looked up in."""

    def __init__(self, tables, tied=False, named=None):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(5, 4, padding_idx=2) for _ in range(tables))
        self.out = nn.Linear(4, 5)
        if tied:
            self.out.weight = self.tables[0].weight
        if named is not None:
            self.get_input_embeddings = lambda: self.tables[named]


def test_the_table_is_the_one_that_tokens_are_looked_up_in():
    assert token_table(Odd(1))[0] == "tables.0.weight" and token_table(Odd(3, named=2))[0] == "tables.2.weight"
    assert token_table(Odd(2)) is None and token_table(Odd(0)) is None
    for name in (*ROWS, "frozen-embeddings"):
        method = registry.make(name, "mean", {})
        assert method.skip(Odd(1)) is None
        assert "this model has none" in method.skip(Odd(2)) and "this model has none" in method.skip(Odd(0))
        assert "out.weight shares the token table" in method.skip(Odd(1, tied=True))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "deberta-v2", "electra", "roberta"])
def test_a_prompted_head_shares_the_table_and_a_mean_one_does_not(kind, checkpoints):
    from model_cases import prepared

    method = registry.make("dp-adafest", "mean", {})
    assert "shares the token table" in method.skip(prepared(checkpoints[kind], "mlm").model)
    model = prepared(checkpoints[kind], "mean").model
    assert method.skip(model) is None and token_table(model)[0].endswith("word_embeddings.weight")


@pytest.mark.parametrize(
    "more", [{"weight_decay": 0.1}, {"decoder": "rmt"}, {"noise_ratio": 0.0}, {"tau": float("nan")}]
)
def test_what_cannot_work_is_refused(more, tiny_bert):
    with pytest.raises(BadInput):
        a_spec("dp-adafest", tiny_bert, **more)


def test_votes_take_a_step(tiny_bert):
    with pytest.raises(BadInput, match="2 or more"):
        a_spec("dp-fest", tiny_bert, choose="votes", steps=1, eval_every=1)
    a_spec("dp-fest", tiny_bert, steps=1, eval_every=1)


def test_the_kinds_of_questions_are_declared():
    assert {registry.methods()[name].asks for name in ROWS} == {(Values, Gradients)}
