"""Verification of folders: records of other programs, identities, curves, and all of it without torch."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from studies import loose
from verify_cases import DELTA, STEPS, edit, edits, findings_of, honest_record, of_another_program, scale

from dpft.harness.privacy import Ledger, Release, certify, verify_record


@pytest.fixture(scope="module")
def honest():
    return honest_record()


def test_neither_import_nor_verification_needs_torch(honest):
    script = (
        "import json, sys\n"
        "import dpft.harness.privacy as privacy\n"
        "heavy = {'torch', 'numpy', 'scipy', 'opacus', 'prv_accountant', 'dp_accounting'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'opacus'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "record = json.loads(sys.stdin.read())\n"
        "assert privacy.verify_record(record, 40) == [], privacy.verify_record(record, 40)\n"
        "record['privacy']['epsilon'][2] = 1.0\n"
        "assert privacy.verify_record(record, 40)\n"
        "section = record['privacy']\n"
        "certificate = privacy.certify(section['ledger'], section['delta'], section['target'])\n"
        "assert certificate['within_budget'] and certificate['cross_checks']['opacus_prv'] is None\n"
        "assert not {'torch', 'opacus'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(honest), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_methods_and_folders_need_no_torch_either():
    official = Path(__file__).parents[2] / "results/official"
    script = (
        "import sys, polars\n"
        "from pathlib import Path\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'opacus'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from dpft.harness.runs import registry\n"
        "assert registry.methods()['dp-grape'].private and registry.decoders() and registry.tasks()\n"
        "from dpft.harness.records.verifying import verify_folder\n"
        f"found = verify_folder(Path({str(official)!r}))\n"
        "assert found and not any(one.findings for one in found.values()), found\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_record_of_another_program_needs_four_entries(honest):
    record = of_another_program(honest["privacy"]["ledger"], library="other 1.0", clip=[1, 2])
    assert verify_record(record) == []
    assert any("upper epsilon" in one for one in findings_of(edit(record, ("epsilon", 2), 1.0)))
    for key in ("ledger", "target", "delta", "epsilon"):
        less = copy.deepcopy(record)
        del less["privacy"][key]
        assert findings_of(less) == [f"The privacy section lacks {key}."]
    # what it declares under our names must be true
    assert verify_record(edit(record, ("steps_run",), STEPS)) == []
    assert findings_of(edit(record, ("steps_run",), STEPS + 1)) and findings_of(edit(record, ("num_examples",), 10**6))


def two_phases():
    """Selection at another rate, then training with two releases on each batch."""
    ledger = Ledger()
    for step in range(10):
        ledger.append(step, 0.02, [Release(name="gradient", noise_multiplier=2.0)])
    for step in range(10, 40):
        count = Release(name="count", noise_multiplier=8.0)
        ledger.append(step, 0.05, [Release(name="gradient", noise_multiplier=1.1), count])
    return ledger.events


def test_several_kinds_of_batches_and_releases_are_composed(honest):
    events = json.loads(json.dumps(two_phases()))
    merged = (1.1**-2 + 8.0**-2) ** -0.5
    assert [e["noise_multiplier"] for e in events] == pytest.approx([2.0, merged])
    record = of_another_program(events)
    assert verify_record(record) == []
    target = 1.8635  # just above what they spend
    certificate = certify(events, DELTA, target)
    own = {
        **honest,
        "spec": {**honest["spec"], "epsilon": target},
        "privacy": {**honest["privacy"], **record["privacy"], **certificate, "target": target, "steps_run": 40},
    }
    own["privacy"]["epsilon_at_threshold"] = None
    own["privacy"] |= dict.fromkeys(
        ("sampling_probability", "expected_batch_size", "noise_multiplier", "releases_per_step")
    )
    assert verify_record(own, 40) == []
    for path in (
        (0, "noise_multiplier"),
        (1, "noise_multiplier"),
        (1, "releases", 1, "noise_multiplier"),
        (0, "step_to"),
    ):
        assert findings_of(edit(record, ("ledger", *path), scale(2))), path
    # the second phase's count left out, and merged correctly without it: less noise in all than was spent
    lighter = edits(record, (("ledger", 1, "releases"), lambda all: all[:1]), (("ledger", 1, "noise_multiplier"), 1.1))
    assert findings_of(lighter)


def verified(capsys, monkeypatch, folder):
    from dpft.harness import cli

    monkeypatch.setattr("sys.argv", ["dpft", "verify", str(folder)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, capsys.readouterr()


def test_the_command_reads_folders_of_others(honest, tmp_path, capsys, monkeypatch):
    code, said = verified(capsys, monkeypatch, tmp_path)
    assert code == 2 and "no record" in said.err
    record = of_another_program(honest["privacy"]["ledger"])
    (tmp_path / "theirs.json").write_text(json.dumps(record))
    code, said = verified(capsys, monkeypatch, tmp_path)
    assert code == 0 and "theirs: fine (of another program" in said.out
    (tmp_path / "theirs.json").write_text(json.dumps(edit(record, ("delta",), 1e-7)))
    assert verified(capsys, monkeypatch, tmp_path)[0] == 1
    for content, words in (("{", "damaged"), ("[1]", "no dpft record"), ('{"a": 1}', "no dpft record")):
        (tmp_path / "theirs.json").write_text(content)
        code, said = verified(capsys, monkeypatch, tmp_path)
        assert code == 2 and words in said.err and said.err.count("\n") == 1


def test_the_command_compares_the_id_and_needs_the_curve(tmp_path, capsys, monkeypatch):
    import shutil

    official = loose("official")
    name = next(path.stem for path in official.glob("*.json") if json.loads(path.read_text())["privacy"])
    for end in (".json", ".parquet"):
        shutil.copy(official / f"{name}{end}", tmp_path)
    assert verified(capsys, monkeypatch, tmp_path)[0] == 0
    path = tmp_path / f"{name}.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "spec": {**record["spec"], "lr": 1e-9}}))
    code, said = verified(capsys, monkeypatch, tmp_path)
    assert code == 1 and "The spec is that of run" in said.out
    path.write_text(json.dumps(record))
    (tmp_path / f"{name}.parquet").unlink()
    assert "no curve" in verified(capsys, monkeypatch, tmp_path)[1].out
