"""A record cannot contradict itself: forgeries of committed records, by name and at random."""

import copy
import json
import random

import pytest
from forged_cases import FORGED, SENTENCES, SST2, forged, load, newer, put, renamed
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutated

from dpft.harness.privacy import verify_record
from dpft.harness.privacy.claims_alike import Claims
from dpft.harness.records.verifying import layout


def verified(capsys, monkeypatch, folder):
    from dpft.harness import cli

    monkeypatch.setattr("sys.argv", ["dpft", "verify", str(folder), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, capsys.readouterr()


@pytest.mark.parametrize("base", sorted({base for base, _ in FORGED.values()}))
def test_what_is_forged_is_fine_as_it_was(base, tmp_path, capsys, monkeypatch):
    put(tmp_path, *load(base))
    assert verified(capsys, monkeypatch, tmp_path)[0] == 0


@pytest.mark.parametrize("name", FORGED)
def test_every_forgery_is_a_sentence_and_exit_1(name, tmp_path, capsys, monkeypatch):
    record, rows = forged(name)
    put(tmp_path, record, rows)
    code, said = verified(capsys, monkeypatch, tmp_path)
    assert code == 1, said.out
    (findings,) = json.loads(said.out).values()
    assert findings and all(one.endswith(".") and "cannot be verified" not in one for one in findings)


@pytest.mark.parametrize("key, value", [("seed", 1), ("method", "dp-sgd")])
def test_a_copy_under_another_seed_or_method_is_seen_beside_the_run_itself(key, value, tmp_path, capsys, monkeypatch):
    record, rows = load(SENTENCES)
    put(tmp_path, record, rows)
    twin = copy.deepcopy(record)
    twin["spec"][key] = value
    renamed(twin, rows)
    put(tmp_path, twin, rows)
    code, said = verified(capsys, monkeypatch, tmp_path)
    assert code == 1 and "are those of run" in said.out


@pytest.mark.parametrize("base", [SST2, newer()])
def test_no_mutation_raises_and_those_that_contradict_are_found(base):
    from dpft.harness.records import verifying

    record, rows = load(base)
    rng, wanted, claims = random.Random(base), 0, Claims()
    for _ in range(200):
        forgery, curve, where, needed = mutated(record, rows, rng)
        text = json.dumps(forgery)
        assert claims.findings(json.loads(text), 16) == verify_record(json.loads(text), 16), "whatever was seen before"
        found = verifying._verify(json.loads(text), curve, claims)  # inside the net: nothing may fall into it
        assert all(isinstance(one, str) and one.endswith(".") for one in found.findings)
        assert found.findings or not needed, (where, text[:200])
        wanted += needed
    assert wanted > 60


FILES = (
    "[]",
    "{}",
    "null",
    '"x"',
    '{"privacy": {}}',
    '{"schema": 1}',
    '{"schema": 1, "spec": []}',
    '{"schema": 2, "spec": {}}',
    '{"schema": [], "spec": 3, "privacy": 5, "status": {}}',
    '{"schema": 1, "spec": {"\\ud800": "\\ud800"}, "privacy": null}',
    "[" * 100000,
)


@pytest.mark.parametrize("content", FILES)
def test_no_file_is_a_traceback(content, tmp_path, capsys, monkeypatch):
    (tmp_path / "x.json").write_text(content)
    code, said = verified(capsys, monkeypatch, tmp_path)
    assert code in (1, 2) and (said.err.count("\n") == 1) == (code == 2)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4))
@settings(deadline=None, max_examples=400)
def test_the_quick_look_for_numbers_that_are_not_finite_misses_none(record):
    assert layout._may_be_huge(record) or not any(layout._not_finite(record))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1.7e308])
def test_numbers_that_are_not_finite_are_seen_wherever_they_are(number):
    for record in ({"a": number}, {"a": [{"b": [0.5, number]}]}, {"a": {"b": [1] * 40 + [number]}}):
        assert layout._may_be_huge(record) and any(layout._not_finite(record))
    assert not layout._may_be_huge({"a": [1e299 / 16, -0.5, 10**18, "x", None]})
