"""Audits: no correct method is accused, whatever its engine, phases or setting, and an audit repeats exactly."""

import pytest
from audit_cases import SMALL

from dpft.harness.audit.audit import audit
from dpft.harness.audit.observe import observe
from dpft.harness.audit.one_run import one_run
from dpft.harness.audit.subject import Question
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.query.queries import Nothing
from dpft.harness.runs import registry

PRIVATE = [name for name, method in registry.methods().items() if method.private]

pytestmark = pytest.mark.usefixtures("one_thread")


FAIR = {**SMALL, "steps": 16}  # where no defect is looked for, fewer will do
FEWER = {
    "dp-zo": {"directions": 4},  # of 16, for the test's sake
    "dp-sft": {"smoothing": 1.0},  # losses of canaries are large, and exact at any distance: less of them is rounding
}


@pytest.mark.parametrize("method", PRIVATE)
def test_no_registered_method_is_accused(method):
    found = audit(Question(method, changes=FEWER.get(method, {}), **FAIR))
    assert found.verdict == "consistent", found
    assert found.bound.epsilon <= found.certificate
    assert found.replay.steps == FAIR["steps"] and found.replay.ended and found.replay.departed is None
    if Nothing not in registry.methods()[method].asks:
        shows_itself(found)


def shows_itself(found):
    """An audit that sees nothing proves nothing."""
    assert found.sensitivity.worst == pytest.approx(1.0, abs=1e-6), "the canaries must reach the bound"
    assert found.sensitivity.off < 1e-4, "what an example adds is what the question says and nothing else"
    far = next(check for check in found.checks if check.name == "far canaries")
    assert far.observed > 0.5 and far.expected > 0.9 and found.reachable.epsilon > 0.5


@pytest.mark.parametrize(
    "method, changes",
    [
        ("dp-adam", {"clipping": "quantile"}),
        ("dp-adam", {"clipping": "slaclip"}),
        ("sparta", {"clipping": "quantile", "clip_groups": "layer", "count_share": 0.2}),
        ("disk", {"clipping": "slaclip", "clip_groups": "layer"}),
        ("dp-zo", {"directions": 1}),
        ("dp-sft", {"subspace": "released", **FEWER["dp-sft"]}),
    ],
)
def test_releases_of_several_kinds_are_seen_side_by_side(method, changes):
    found = audit(Question(method, changes=changes, **FAIR))
    assert found.verdict == "consistent", found
    assert found.sensitivity.worst == pytest.approx(1.0, abs=1e-6) and found.sensitivity.off < 1e-4
    releases = 2 if changes.get("clipping") == "quantile" else 1
    assert found.booking.releases == found.booking.releases_booked == releases * FAIR["steps"]


@pytest.mark.parametrize(
    "method, changes",
    [
        ("dp-adam", {"sampler": "truncated", "truncated_batch_size": 9}),
        ("dp-lora", {"sampler": "cyclic", "bands": 2}),
        ("dp-sgd", {"sampler": "cyclic", "bands": 3, "momentum": 0.9}),
    ],
)
def test_nor_is_another_sampler_or_correlated_noise(method, changes):
    found = audit(Question(method, changes=changes, **{**SMALL, "sampling_rate": 0.125, "canaries": 48}))
    assert found.verdict == "consistent", found
    assert found.sensitivity.worst == pytest.approx(1.0, abs=1e-6)


def test_a_second_question_of_a_step_is_audited_with_the_first():
    """Both releases, the rows that the first one chose, and the noise of either."""
    seen = observe(Question("dp-adafest", **SMALL))
    assert seen.names == {"touched": 24, "gradient": 24}
    rows = [step[1].tensors["embeddings.weight"].shape[0] for step in seen.kept]
    assert min(rows) > 0 and len(set(rows)) > 3, "rows survive, and others in other steps"
    counts = {name: int(seen.noise.counts[:, own].sum()) for name, own in seen.noise.releases.items()}
    assert counts["touched"] == 24 * 32 and counts["gradient"] > 24 * 1000


@pytest.mark.parametrize(
    "method, engine, changes",
    [
        ("dp-adam", "opacus", {}),
        ("dp-adam", "reference", {"precision": "bf16"}),
        ("dp-lora", "factored", {"precision": "bf16", "clip_groups": "layer"}),
        ("dp-grape", "factored", {"projection": "srht", "embeddings": "projected", "refresh": 3}),
        ("dp-adam", "factored", {"clipping": "auto-s"}),
        ("dp-adam", "factored", {"clipping": "psac", "clip_groups": "layer", "clip_norm": 0.1}),
        ("sparta", "factored", {"score": "absolute"}),
    ],
)
def test_nor_is_another_engine_or_setting(method, engine, changes):
    found = audit(Question(method, engine=engine, changes=changes, **FAIR))
    assert found.verdict == "consistent", found


def test_a_method_in_phases_is_audited_in_each():
    """One step chooses the rows: its noise, sums and booking are looked at like those of the others."""
    found = audit(Question("sparta", **SMALL))
    assert found.phases == 3 and found.sensitivity.pairs >= 24 + 8
    assert one_run(Question("sparta", **SMALL)).verdict == "consistent"


def test_what_is_declared_and_not_asked_stays_paid_for_and_is_no_violation(monkeypatch):
    from dpft.methods.subset import LastLayer

    step_of = LastLayer.step
    monkeypatch.setattr(LastLayer, "step", lambda self, ask, step: {} if step % 3 else step_of(self, ask, step))
    found = audit(Question("last-layer", **SMALL))
    assert found.verdict == "consistent", found
    assert (found.booking.releases, found.booking.releases_booked) == (8, 24)


@pytest.mark.parametrize("more", [{"sampling_rate": 1.0, "steps": 4}, {"steps": 2, "canaries": 24}])
def test_nor_are_runs_that_show_little(more):
    assert audit(Question("dp-adam", **{**SMALL, **more})).verdict == "consistent"


def test_an_audit_repeats_exactly():
    one, two = (audit(Question("sparta", **SMALL)).to_dict() for _ in range(2))
    assert one == two


def test_a_run_that_refuses_to_go_on_is_bad_input(monkeypatch):
    from dpft.harness.train import loop

    apply = loop.updates.apply

    def refusing(*arguments):
        raise CannotRun("The model changes its buffers; freeze them.")

    monkeypatch.setattr(loop.updates, "apply", refusing)
    with pytest.raises(BadInput, match="audited run stopped itself: The model changes its buffers"):
        audit(Question("last-layer", **SMALL))
    monkeypatch.setattr(loop.updates, "apply", apply)


def test_two_runs_of_one_seed_betray_their_first_sum():
    """README: they share batches and noise, so releases at two noise levels are two equations with two unknowns."""
    runs = [observe(Question("last-layer", **{**SMALL, "epsilon": epsilon})) for epsilon in (2.0, 8.0)]
    first = [run.kept[0][0].tensors["head.weight"] for run in runs]
    sigma = [run.privacy.noise_multiplier for run in runs]
    batch = runs[0].member[0].nonzero()[0].tolist()
    assert batch == runs[1].member[0].nonzero()[0].tolist()
    clean = (sigma[1] * first[0] - sigma[0] * first[1]) / (sigma[1] - sigma[0])
    in_batch = clean.abs().max(dim=1).values > 1e-3
    assert in_batch.nonzero().flatten().tolist() == batch, "who was in the batch is read off without any noise"
