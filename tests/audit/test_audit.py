"""Audits: no correct method is accused, whatever its engine, phases or setting, and an audit repeats exactly."""

import pytest
from audit_cases import SMALL

from dpft.harness.audit.audit import audit
from dpft.harness.audit.one_run import one_run
from dpft.harness.audit.subject import Question
from dpft.harness.errors import BadInput, CannotRun
from dpft.harness.runs import registry

PRIVATE = [name for name, method in registry.methods().items() if method.private]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", PRIVATE)
def test_no_registered_method_is_accused(method):
    found = audit(Question(method, **SMALL))
    assert found.verdict == "consistent", found
    assert found.bound.epsilon <= found.certificate
    assert found.replay.steps == SMALL["steps"] and found.replay.ended and found.replay.departed is None
    if registry.methods()[method].query == "gradient":
        assert found.sensitivity.worst == pytest.approx(1.0, abs=1e-6), "the canaries must reach the bound"
        assert found.sensitivity.off < 1e-4, "what an example adds is its clipped gradient and nothing else"
        far = next(check for check in found.checks if check.name == "far canaries")
        assert far.observed > 0.5 and found.reachable.epsilon > 0.5, "an audit that sees nothing proves nothing"


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
    found = audit(Question(method, engine=engine, changes=changes, **SMALL))
    assert found.verdict == "consistent", found


def test_a_method_in_phases_is_audited_in_each():
    """One step chooses the rows: its noise, sums and booking are looked at like those of the others."""
    found = audit(Question("sparta", **SMALL))
    assert found.phases == 3 and found.sensitivity.pairs >= 24 + 8
    assert one_run(Question("sparta", **SMALL)).verdict == "consistent"


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
    from dpft.harness.audit.subject import built, train, watch

    first, sigma = [], []
    for epsilon in (2.0, 8.0):
        question = Question("last-layer", **{**SMALL, "epsilon": epsilon})
        spec = question.spec()
        with built(question, spec, question.plan(spec)) as setup:
            seen = []
            watch(
                setup,
                lambda watched, noisy, step, seen=seen: seen.append(
                    (watched.sampled[0], noisy.tensors["head.weight"].clone())
                ),
            )
            train(setup)
            first.append(seen[0])
            sigma.append(setup.mechanism.noise_multiplier)
    assert first[0][0] == first[1][0]
    clean = (sigma[1] * first[0][1] - sigma[0] * first[1][1]) / (sigma[1] - sigma[0])
    in_batch = clean.abs().max(dim=1).values > 1e-3
    assert in_batch.nonzero().flatten().tolist() == first[0][0], "who was in the batch is read off without any noise"
