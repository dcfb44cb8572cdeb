"""Every planted bug rings, for its own reason, and is gone afterwards."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from audit_cases import SMALL

from dpft.harness.audit import bugs
from dpft.harness.audit.audit import audit
from dpft.harness.audit.patches import unchecked
from dpft.harness.audit.subject import Question
from dpft.harness.errors import BadInput
from dpft.harness.train import loop

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.name)
def test_every_planted_bug_rings(bug):
    fewer = {"directions": 4} if bug.method == "dp-zo" else {}
    with bug.plant():
        found = audit(Question(bug.method, changes={**fewer, **bug.changes}, **SMALL))
    assert bug.rings in found.violations, found
    assert found.verdict.startswith("VIOLATION: ")


def test_a_bug_is_gone_when_its_context_ends():
    for bug in bugs.BUGS:
        with bug.plant():
            pass
    assert audit(Question("dp-adam", **SMALL)).verdict == "consistent"


@contextmanager
def counting(persistent):
    """In the middle of every step a buffer of the model counts who is in the batch."""
    microbatches = loop.microbatches

    def counted(setup, indices, step):
        model = setup.prepared.model
        if not hasattr(model, "turns"):
            model.register_buffer("turns", torch.zeros(len(setup.prepared.train)), persistent=persistent)
        model.turns[indices] += 1
        return microbatches(setup, indices, step)

    with patch.object(loop, "microbatches", counted):
        yield


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_counts_within_the_step_is_refused_or_rings(persistent):
    """The loop may refuse it; where it does not, the replay sees it after the first step, and it is no weight."""
    with counting(persistent):
        try:
            found = audit(Question("last-layer", **SMALL))
        except BadInput as refused:
            assert "stopped itself" in str(refused)
            return
    assert found.violations == ["buffers do not follow from the releases"]
    assert found.replay.departed == 1


@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 7.0])
def test_a_bound_above_the_clip_norm_rings_whatever_the_clip_norm(clip_norm):
    """Gradients of 1.05 C stay as they are."""
    from dpft.harness.engine.clipping import Clipping

    factors = Clipping.factors
    wider = patch.object(Clipping, "factors", lambda self, norms, c, groups=1: factors(self, norms, 1.05 * c, groups))
    with unchecked(), wider:  # the loop's own comparison would end the run before the audit sees it
        found = audit(Question("dp-adam", changes={"clip_norm": clip_norm}, **SMALL))
    assert found.sensitivity.worst == pytest.approx(1.05, abs=1e-3)
    assert "sensitivity exceeds the clip norm" in found.violations
