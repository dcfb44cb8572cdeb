"""The repository keeps its own rules: import direction, the privacy boundary, the README's example and commands."""

import ast
import re
from pathlib import Path

import pytest
from closures import Source, keeping

ROOT = Path(__file__).parent.parent
SOURCES = [p for room in ("harness", "methods", "tasks") for p in (ROOT / room).rglob("*.py")]


def imports(path):
    """Modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    return path.relative_to(ROOT).as_posix()


def test_dependencies_point_one_way():
    for path in SOURCES:
        found = {name for name in imports(path) if name.startswith("dpft.")}
        if room(path).startswith("methods/"):
            assert not [n for n in found if n.startswith("dpft.tasks")], path
        if room(path).startswith("tasks/"):
            assert not [n for n in found if n.startswith("dpft.methods")], path
            assert {n for n in found if n.startswith("dpft.harness")} <= {
                n for n in found if n.startswith(("dpft.harness.errors", "dpft.harness.cache", "dpft.harness.border"))
            }, path
        if room(path).startswith("harness/report/") or room(path) in (
            "harness/records/store.py",
            "harness/statistics/thresholds.py",
            "harness/runs/resolve.py",
            "harness/runs/spec.py",
            "harness/runs/plan.py",
            "harness/regression/baseline.py",
            "harness/regression/gate.py",
            "harness/regression/show.py",
        ):
            assert not [n for n in found if "engine" in n or n.startswith("dpft.harness.train.loop")], path
        if room(path).startswith("harness/statistics/"):
            allowed = ("dpft.harness.statistics", "dpft.harness.errors", "dpft.harness.statistics.thresholds")
            assert not [n for n in found if not n.startswith(allowed)], path
            assert {"torch", "polars"}.isdisjoint(n.split(".")[0] for n in imports(path)), path
        if room(path).startswith("harness/privacy/"):
            assert "torch" not in {n.split(".")[0] for n in imports(path)}, path


def test_nothing_imports_the_folders_by_their_bare_names():
    for path in [*SOURCES, *(ROOT / "tests").glob("*.py")]:
        assert not {n.split(".")[0] for n in imports(path)} & {"harness", "methods", "tasks"}, path


def calls(path):
    """Names of all functions and methods that a file calls."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


READERS = ("harness/report/", "harness/audit/", "harness/records/verifying/")  # of ledgers that are written


DANGEROUS = {
    "accumulate", "backward", "GaussianMechanism", "grad", "Mechanism", "NoisySum", "release", "sample", "secret_source",
    "source", "stream",
}  # fmt: skip


def test_only_one_place_releases_and_one_books():
    """The privacy boundary: nobody else asks the mechanism for noise, makes a NoisySum or writes the ledger."""
    for path in SOURCES:
        found, name = set(calls(path)), room(path)
        if not name.startswith("harness/audit/"):  # which listens there, and plants bugs
            assert ("release" in found) == (name == "harness/train/answer.py"), path
        assert ("NoisySum" in found) == (name == "harness/train/mechanism.py"), path
        if "append" in found and "ledger" in path.read_text().lower() and not name.startswith("harness/privacy"):
            # audits read it, and plant a loop that books too little
            assert name in ("harness/train/loop.py",) or name.startswith(READERS), path


def test_methods_see_no_more_of_examples_than_answers():
    paths = [path for path in SOURCES if room(path).startswith("methods/")]
    for path in paths:
        assert not set(calls(path)) & DANGEROUS, path
        assert not [name for name in imports(path) if name.startswith("dpft.harness.train")], path
    read = {path: Source(path.read_text()) for path in paths}
    asking = 0
    for path, source in read.items():
        source.others = [other for other in read.values() if other is not source]
        asking += len(list(source.handed()))
        assert keeping(source) == [], path
    assert asking >= 5


def test_files_stay_small():
    for path in SOURCES:
        lines = len(path.read_text().splitlines())
        assert lines <= (150 if room(path).startswith("methods/") else 300), f"{path} has {lines} lines"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_opens_with_the_two_commands_and_ci_calls_the_second():
    first, second = (re.sub(r"\\\n *", "", block).strip() for block in blocks("sh")[:2])
    assert first.endswith("dpft run demo") and len(first.splitlines()) == 1
    assert second in (ROOT / ".ci/run").read_text() and len(second.splitlines()) == 1


def test_what_is_to_be_copied_fits_a_terminal():
    assert (
        max(len(line) for language in ("sh", "python") for block in blocks(language) for line in block.splitlines())
        <= 80
    )


def test_the_readme_example_method_runs(tmp_path, tiny_bert, mirror, monkeypatch, capsys):
    from dpft.harness import cli
    from dpft.harness.records.store import Store
    from dpft.harness.runs import registry

    (example,) = (block for block in blocks("python") if "(Method)" in block)
    assert len(example.splitlines()) <= 20
    path = tmp_path / "sign.py"
    path.write_text(example)
    name = re.search(r'name = "(.+)"', example)[1]
    arguments = f"--plugin {path} run --task sst2 --method {name},dp-sgd --epsilon 3 --steps 4 --batch-size 60".split()
    arguments += ["--model", str(tiny_bert), "--data-dir", str(mirror), "--results", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", ["dpft", *arguments, "--set", "max_length=32"])
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        registry._PLUGINS.clear()
        registry.forget()
    assert not stop.value.code, capsys.readouterr().err
    records = Store(tmp_path / "runs").records()
    assert {r["spec"]["method"] for r in records} == {name, "dp-sgd"} and all(r["status"] == "done" for r in records)
    assert records[0]["privacy"]["ledger"] == records[1]["privacy"]["ledger"]


def test_every_picture_is_linked_and_every_link_has_its_picture():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*/*.md")]
    found = [
        (page.parent / link) for page in pages for link in re.findall(r"\(([^()]*figures/[^)]+)\)", page.read_text())
    ]
    linked = {room(path.resolve()) for path in found}
    assert linked == {room(path) for path in (ROOT / "results" / "figures").rglob("*.*")}


def test_every_link_between_documents_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*/*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
            path, anchor = page.parent / link[0] if link[0] else page, link[1]
            if link[0].startswith(("http", "mailto")):
                continue
            assert path.exists(), f"{page}: {link[0]}"
            if anchor and path.suffix == ".md":
                heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor[1:] in slugs, f"{page}: {link[0]}{anchor}"


def test_results_are_one_screen_a_study():
    lines = (ROOT / "RESULTS.md").read_text().splitlines()
    assert len(lines) < 420 and max(map(len, lines)) <= 400
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_record_in_the_documents_is_a_part_of_a_committed_one():
    import json

    from dpft.harness.records.store import Store

    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/records.md").read_text(), re.DOTALL)
    shown = json.loads(text)
    record = json.loads(Store(ROOT / "results/official").text(shown["run_id"]))

    def part(some, whole):
        if isinstance(some, dict):
            return all(key in whole and part(value, whole[key]) for key, value in some.items())
        return some == whole

    assert part(shown, record)


def test_the_readme_counts_the_planted_bugs_that_are_found():
    rows = [
        line
        for line in (ROOT / "docs/audit.md").read_text().splitlines()
        if line.startswith("| ") and line.count("|") == 6
    ]
    verdicts = [line.split("|")[5].strip() for line in rows[1:]]
    found = sum(verdict == "**violation**" for verdict in verdicts)
    said = re.search(r"Of (\d+)\s+planted bugs it finds (\d+)", (ROOT / "README.md").read_text())
    assert verdicts[0] == "consistent" and said.groups() == (str(len(verdicts) - 1), str(found))


def test_a_study_s_page_is_of_that_study_alone():
    """That of `rows` once held three others, cut out with it, which no command kept fresh."""
    for page in ROOT.glob("results/*/README.md"):
        assert re.findall(r"<!-- dpft report(.*): begin -->", page.read_text()) in ([""], [" predictions", ""]), page
