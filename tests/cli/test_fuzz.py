"""Bad input at every border: no traceback, no hang, nothing accepted that is wrong, one sentence. More: tests/cases/fuzz.py."""

import pytest
from bad_input import BORDERS, World, cases, failure

CASES = 20  # of each border


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("bad-input")
    patch.setenv("DPFT_CACHE", str(root / "cache"))
    patch.chdir(root)
    made = World(root)
    yield made
    made.clear()
    patch.undo()


@pytest.mark.parametrize("border", BORDERS)
def test_bad_input_is_one_sentence(world, border):
    found = [one for case in cases(world, CASES, seed=1, borders=(border,)) if (one := failure(case)) is not None]
    assert not found, "\n".join(f"{one.kind}: {one.case.what}: {one.detail}" for one in found)


def test_the_same_seed_makes_the_same_cases(world):
    first, again = ([case.what for case in cases(world, 2 * len(BORDERS), seed=7)] for _ in range(2))
    assert first == again != [case.what for case in cases(world, 2 * len(BORDERS), seed=8)]


def test_a_failure_is_seen(world, monkeypatch):
    """What the fuzz is for: with a reader that does not look, it finds tracebacks and values that are taken as they are."""
    from dpft.harness.border import documents

    monkeypatch.setattr(documents, "fitted", lambda value, kind: value)
    monkeypatch.setattr("dpft.harness.runs.spec.fitted", lambda value, kind: value)
    monkeypatch.setattr("dpft.harness.records.schema.fitted", lambda value, kind: value)
    monkeypatch.setattr("bad_input.case.LIMIT", 3.0)
    kinds = {
        one.kind
        for case in cases(world, 60, seed=1, borders=("settings", "records"))
        if (one := failure(case)) is not None
    }
    assert {"traceback", "accepted"} <= kinds
