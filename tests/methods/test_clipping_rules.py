"""Clipping rules as choices of a run: their formulas, their bounds, where they lead C, and what is refused."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import B, resolved, run, sampled, seen, started, step
from studies import ROOT, STUDIES

from dpft.harness.engine.clipping import FUNCTIONS
from dpft.harness.errors import BadInput
from dpft.harness.query.noisy_sum import VALUES, NoisySum
from dpft.harness.query.queries import Beside, Gradients, Values
from dpft.harness.records.store import Store
from dpft.harness.runs import registry, spec
from dpft.methods.clipping.slaclip import slots, slots_for

ADAPTIVE = [name for name, rule in registry.clippings().items() if rule.adaptive]
RATED = ["quantile", "slaclip"]  # move one C by at most `clip_rate` in a step
FINDING = [  # lead one C to where norms are
    *[(name, {}) for name in RATED],
    ("per-layer", {"total": "quantiles"}),
    ("dc-sgd", {"chosen_by": "percentile", "target_quantile": 0.5}),
    ("dp-lac", {}),
]


def answers(clip_norm, beside=None):
    return NoisySum({}, 1.0, clip_norm, B, beside)


# --- the formulas


def test_quantile_moves_by_its_formula_on_noisy_counts():
    rule = started("quantile", clip_norm=2.0, clip_rate=0.3, target_quantile=0.7, count_share=0.04)
    gradient, more = rule.amend(Gradients(only=frozenset("a")))
    assert gradient == Gradients(only=frozenset("a"), bound=2.0) and rule.shares() == {"count": 0.04}
    assert (more["count"].size, more["count"].bound) == (1, 0.5)
    norms = [[0.0, 0.0], [1.9, 0.0], [1.5, 1.5], [3.0, 0.0], [0.0, 2.0]]  # whole norms 0, 1.9, 2.12, 3, 2
    assert more["count"].of(seen(norms, 2.0)).flatten().tolist() == [0.5, 0.5, -0.5, -0.5, 0.5]
    for released, share in ((0.1, 0.6), (-0.3, 0.2), (0.9, 1.0), (-0.9, 0.0)):
        rule.clip_norm = 2.0
        rule.learn(answers(2.0), {"count": NoisySum({VALUES: torch.tensor([released])}, 1.0, 0.5, B)})
        assert rule.clip_norm == pytest.approx(2.0 * math.exp(-0.3 * (share - 0.7)))


@pytest.mark.parametrize("tiny", ["share", "over-bound"])
def test_slaclip_moves_by_its_formula_in_units_of_a_full_slot(tiny):
    rule = started("slaclip", clip_norm=4.0, slots=3, slack_weight=0.6, clip_rate=0.3, tiny=tiny)
    gradient, more = rule.amend(Gradients())
    assert not more and rule.shares() == {} and gradient.bound == 4.0 and gradient.beside.size == 3
    full = 4.0 / math.sqrt(3)
    rule.learn(answers(4.0, torch.tensor([0.8, 0.5, 0.1]) * full), {})
    target = 1 - 0.6 * (1 - (0.1 if tiny == "share" else 0.1 / 4.0))
    assert rule.clip_norm == pytest.approx(4.0 * math.exp(0.3 * (target - 0.8)))
    rule.clip_norm = 4.0
    rule.learn(answers(4.0, torch.tensor([-0.2, 0.5, 9.0]) * full), {})  # noise beyond what can be
    assert rule.clip_norm == pytest.approx(4.0 * math.exp(0.3))


def test_slaclip_fills_slot_after_slot():
    """K = 4, C = 8: lambda = 4, and the room of 3.5 becomes 7 = 4 + 3."""
    rows = slots(seen([[4.5], [0.0], [8.0], [100.0]], 8.0), clip_norm=8.0, count=4)
    assert rows.tolist() == [[4, 3, 0, 0], [4, 4, 4, 4], [0, 0, 0, 0], [0, 0, 0, 0]]


@given(
    st.floats(1e-6, 1e6),
    st.integers(2, 200),
    st.lists(st.tuples(*[st.floats(0, 10)] * 3), min_size=1, max_size=20),
    st.integers(1, 3),
)
def test_slots_and_clipped_gradient_share_one_ball(clip_norm, count, norms, groups):
    looked = seen([[norm * clip_norm for norm in row[:groups]] for row in norms], clip_norm)
    room = (clip_norm - looked.lengths.square().sum(1).sqrt()).clamp_min(0)
    if groups == 1:
        assert bool(torch.isclose(room, clip_norm - looked.clipped, rtol=0, atol=1e-12 * clip_norm).all())
    squares = slots(looked, clip_norm=clip_norm, count=count).square().sum(1)
    assert bool((squares <= clip_norm * room * (1 + 1e-12) + 1e-12 * clip_norm**2).all())
    assert bool((looked.clipped**2 + squares <= clip_norm**2 * (1 + 1e-12)).all())


def test_slots_are_as_many_as_their_noise_allows():
    assert slots_for(256, 0.7) == round((256 / (5.15 * 0.7)) ** (2 / 3)) == 17
    assert slots_for(4, 10.0) == 2 and slots_for(256, 0.0) == 1000
    assert started("slaclip").slots == 17 and started("slaclip", slots=5).slots == 5


@pytest.mark.parametrize("groups", ["flat", "layer"])
@pytest.mark.parametrize("name", RATED)
def test_c_of_a_real_run_follows_its_releases_and_so_does_the_noise(setup_of, name, groups):
    """In the loop: each step's bound is the one that the releases before it led to."""
    from small_runs import quiet

    from dpft.harness.train import loop
    from dpft.harness.train.parts import Run

    setup, state = setup_of("dp-adam", clipping=name, clip_groups=groups, clip_norm=0.01), Run()
    released, told = [], setup.method.rule.learn
    setup.method.rule.learn = lambda gradient, beside: (released.append(gradient.clip_norm), told(gradient, beside))
    loop.train(setup, state, quiet)
    assert released == [row["clip_norm"] for row in state.progress.curve] and released[0] == 0.01
    assert released == sorted(released) and released[-1] > 0.01 * math.exp(0.2 * 0.3 * 3), released


def test_the_functions_of_all_rules_exist_and_fixed_rules_ask_for_nothing():
    asked = Gradients()
    for name, rule in registry.clippings().items():
        assert rule.function in FUNCTIONS and rule.summary and rule.reference
        if not rule.adaptive:
            fixed = started(name)
            assert fixed.amend(asked) == (asked, {}) and fixed.shares() == {} and fixed.state_dict() == {}
            assert rule.function == name


# --- where C goes


def test_no_adaptive_rule_is_left_out():
    assert sorted({name for name, _ in FINDING}) == sorted(ADAPTIVE)


@pytest.mark.parametrize("clip_norm", [1 / 30, 1.0, 30.0])
@pytest.mark.parametrize("name, more", FINDING)
def test_a_start_wrong_by_thirty_is_recovered_from(name, more, clip_norm):
    """Whatever the scale of the gradients; within 60 steps, and there it stays."""
    for scale in (1e-3, 1.0, 50.0):
        trace = run(started(name, clip_norm=clip_norm * scale, **more), scale, 100)
        assert all(0.6 * scale < c < 1.7 * scale for c in trace[60:]), (trace[60:], scale)


def test_slaclip_recovers_with_two_slots_too():
    assert run(started("slaclip", clip_norm=30.0, slots=2), 1.0, 400)[-1] < 2.5


@pytest.mark.parametrize("name, more", [case for case in FINDING if case[0] != "per-layer"])
def test_groups_lead_c_where_whole_gradients_do(name, more):
    """Not where every group is cut: a clipped gradient of many groups is almost always shorter than C."""
    share = torch.tensor([0.9, 0.3, 0.3, 0.1], dtype=torch.float64)
    generator, ends = torch.Generator().manual_seed(0), []
    norms = [sampled(1.0, generator) for _ in range(60)]
    for groups in (torch.ones(1, dtype=torch.float64), share):
        torch.manual_seed(1)
        rule = started(name, clip_norm=1.0, **more)
        for row in norms:
            step(rule, row * groups)
        ends.append(rule.clip_norm)
    assert ends[0] == pytest.approx(ends[1])


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_quantile_finds_the_quantile(target):
    trace = run(started("quantile", target_quantile=target, clip_norm=1.0), 1.0, 300)
    expected = math.exp(0.5 * math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * target - 1.0))))
    assert torch.tensor(trace[100:]).log().mean() == pytest.approx(math.log(expected), abs=0.05)


def test_c_follows_the_scale_of_the_gradients():
    """Twice the loss, twice C, with the same draws. Not so with the authors' s_K/C."""
    for name, more, same in (
        ("quantile", {}, True),
        ("slaclip", {}, True),
        ("slaclip", {"tiny": "over-bound"}, False),
        ("per-layer", {"total": "quantiles"}, True),
        ("dc-sgd", {}, True),
        ("dc-sgd", {"chosen_by": "percentile"}, True),
        ("dp-lac", {}, True),
    ):
        ends = []
        for scale in (1.0, 0.01):
            torch.manual_seed(1)
            ends.append(run(started(name, clip_norm=5 * scale, **more), scale, 30, coordinates=1000)[-1] / scale)
        assert (ends[0] == pytest.approx(ends[1], rel=1e-6)) == same, (name, ends)


@pytest.mark.parametrize("name, more", FINDING)
def test_c_stays_in_its_range(name, more):
    low = run(started(name, clip_norm=1.0, clip_least=0.5, **more), 0.1, 40)
    high = run(started(name, clip_norm=1.0, clip_most=2.0, **more), 10.0, 40)
    outer = 2**0.5 if name == "dp-lac" else 1.0  # the middle of its outer bin
    assert min(low) == pytest.approx(0.5 * outer) and max(high) == pytest.approx(2.0, rel=outer - 1 + 1e-9)
    assert min(low) >= 0.5 and max(high) <= 2.0


@pytest.mark.parametrize("name", RATED)
def test_an_empty_batch_moves_c_by_noise_alone(name):
    """A row exists for those in the batch only, so nobody's absence is a zero gradient, which would count as short."""
    rule = started(name, clip_norm=1.0)
    step(rule, torch.zeros(0, 1), sigma=0.0)
    empty = rule.clip_norm
    rule = started(name, clip_norm=1.0)
    step(rule, torch.zeros(B, 1), sigma=0.0)
    assert rule.clip_norm != empty
    assert empty == pytest.approx(1.0 if name == "quantile" else math.exp(0.2 * 0.5))


@pytest.mark.parametrize("name, more", [*FINDING, ("dc-sgd", {"chosen_by": "error"}), ("dp-lac", {"votes": 1})])
def test_a_resumed_rule_goes_on_as_if_nothing_had_been(name, more):
    torch.manual_seed(0)
    whole, first = started(name, clip_norm=3.0, **more), started(name, clip_norm=3.0, **more)
    norms = torch.rand(4, B, 1, dtype=torch.float64)
    for rule in (whole, first):
        for row in norms[:2]:
            step(rule, row, sigma=0.0)
    again = started(name, clip_norm=3.0, **more)
    again.load_state_dict(first.state_dict())
    for row in norms[2:]:
        step(whole, row, sigma=0.0)
        step(again, row, sigma=0.0)
    assert again.clip_norm == whole.clip_norm
    arrived = name == "dp-lac" or more.get("chosen_by") == "error"
    assert first.clip_norm != whole.clip_norm or arrived
    for key, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key])


# --- choices, ids, refusals


def test_ids_hold_the_rule_and_those_of_its_options_that_differ():
    plain, rule = resolved(), resolved(clipping="quantile")
    assert resolved(clipping="abadi").run_id == plain.run_id and rule.run_id != plain.run_id
    assert rule.options == {} and resolved(clipping="quantile", clip_rate=0.2).run_id == rule.run_id
    found = resolved(clipping="quantile", method="dp-lora", decoder="rmt", rank=2, target_quantile=0.6)
    assert found.options == {"rank": 2, "target_quantile": 0.6}
    made = registry.make(found.method, found.decoder, found.options, found.clipping)
    assert made.rule.settings["target_quantile"] == 0.6 and "target_quantile" not in {**made.settings}
    assert registry.make("dp-adam", "mean", {}).rule.name == "abadi"


def test_every_record_still_has_its_id():
    found = 0
    for study in STUDIES:
        for record in Store(ROOT / "results" / study).each():
            assert spec.RunSpec(**spec.completed(record["spec"])).run_id == record["run_id"]
            found += 1
    assert found > 500


def test_no_option_of_a_rule_means_something_else_elsewhere(monkeypatch):
    fields = {f.name for f in dataclasses.fields(spec.RunSpec)}
    for rule in registry.clippings().values():
        for method in registry.methods().values():
            for post in registry.decoders().values():
                assert not fields & registry.defaults_of(method, post, rule).keys()
        for task in registry.tasks().values():
            assert not rule.options.keys() & task.options.keys()
    monkeypatch.setattr(registry.clipping("quantile"), "options", {"rank": 1})
    with pytest.raises(BadInput, match="Method dp-lora and clipping rule quantile both have an option 'rank'"):
        resolved(method="dp-lora", clipping="quantile")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clipping": "quantil"}, "did you mean 'quantile'"),
        ({"clipping": 3}, "clipping must be a text, not 3"),
        ({"target_quantile": 0.5}, "no setting of dp-adam called 'target_quantile'"),
        ({"clipping": "slaclip", "target_quantil": 0.5}, "no setting of dp-adam, clipping slaclip called"),
        ({"clipping": "quantile", "target_quantile": 1.5}, "target_quantile must be between 0 and 1"),
        ({"clipping": "quantile", "count_share": 1.0}, "count_share must be between"),
        ({"clipping": "quantile", "clip_least": 0.0}, "clip_least must be between"),
        ({"clipping": "slaclip", "slots": 1}, "slots must be 2 or more"),
        ({"clipping": "slaclip", "tiny": "shares"}, "did you mean 'share'"),
        ({"clipping": "quantile", "mechanism": "laplace"}, "certified for Gaussian noise alone"),
        ({"clipping": "slaclip", "mechanism": "plrv"}, "certified for Gaussian noise alone"),
        ({"clipping": "slaclip", "method": "non-private"}, "non-private clips nothing"),
    ],
)
def test_bad_choices_are_one_sentence(settings, message):
    with pytest.raises(BadInput, match=message):
        resolved(**settings)


def test_methods_that_ask_for_no_gradients_take_fixed_rules_only(monkeypatch):
    monkeypatch.setattr(registry.method("dp-sgd"), "asks", (Values,))
    assert resolved(method="dp-sgd", clipping="psac").clipping == "psac"
    for name in ADAPTIVE:
        with pytest.raises(BadInput, match="dp-sgd asks for no gradients"):
            resolved(method="dp-sgd", clipping=name)


def test_verify_reads_the_rule_of_a_record():
    from dpft.harness.records.verifying import asked

    def read(**changes):
        changed = dataclasses.replace(resolved(clipping="quantile"), **changes)
        return asked.read({"spec": changed.to_dict(), "run_id": changed.run_id})

    assert read(options={"count_share": 0.02}).findings == []
    assert "no option 'slots'" in read(options={"slots": 3}).findings[0]
    assert "certified for Gaussian noise alone" in read(mechanism="laplace").findings[0]
    stranger = read(clipping="somebody-elses", options={"speed": 3})
    assert not stranger.findings and any("somebody-elses is not known here" in notice for notice in stranger.notices)


def test_slaclip_leaves_a_method_its_own_numbers():
    with pytest.raises(BadInput, match="fills the room beside its gradients itself"):
        started("slaclip").amend(Gradients(beside=Beside(size=1, of=lambda seen: seen.clipped[:, None])))


def test_a_plugin_brings_a_rule(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dpft.methods.clipping.quantile import Quantile\n\n"
        "class Mine(Quantile):\n    name = 'mine'\n    options = {**Quantile.options, 'target_quantile': 0.3}\n"
    )
    try:
        registry.load_plugin(path)
        assert resolved(clipping="mine").clipping == "mine" and "quantile" in registry.clippings()
    finally:
        registry._PLUGINS.clear()
        registry.forget()


def test_the_command_line_lists_and_describes_rules(dpft):
    rows = json.loads(dpft("list", "clippings", "--json")[1])
    assert {row["name"]: row["adaptive"] for row in rows} == {
        "abadi": False, "auto-s": False, "dc-sgd": True, "dp-lac": True, "per-layer": True, "psac": False, "quantile": True,
        "slaclip": True
    }  # fmt: skip
    described = json.loads(dpft("describe", "quantile", "--json")[1])
    assert described["releases"] == "beside the gradient: count (0.01 of the gradient's budget)"
    assert described["options"]["clip_rate"] == 0.2
    assert json.loads(dpft("describe", "slaclip", "--json")[1])["releases"] == "nothing beside the gradient"
    assert "did you mean 'slaclip'" in dpft("describe", "slaclp")[2]
