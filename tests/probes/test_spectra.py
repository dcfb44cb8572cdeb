"""Singular values of runs: theory on a gradient of known rank, the probes, the tables and pictures made of them."""

import dataclasses

import pytest
import torch

from dpft.harness import report
from dpft.harness.probes import Clock, LiveBytes, Look, spectra, uncounted
from dpft.harness.records.store import Store
from dpft.harness.report import rows as reading
from dpft.harness.report.text import markdown
from dpft.harness.runs.resolve import resolve
from dpft.harness.train import run
from dpft.harness.train.mechanism import GaussianMechanism
from dpft.harness.train.noise import source
from dpft.harness.train.settings import Settings

SIZE = dict(
    task="low-rank", method="rmt", batch_size=200, steps=2, eval_every=1, optimizer="sgd", clip_norm=20.0, lr=0.02
)


def low_rank(values, m=300, n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(d, len(values), generator=generator))[0] for d in (m, n))
    return (left * torch.tensor(values)) @ right.T


def test_a_release_and_its_shrinkage_are_what_theory_predicts():
    """Twice and four times the detection threshold, one below: where they appear and how well they align, within 3%."""
    m, n, s = 300, 200, 0.05
    threshold = s * (m * n) ** 0.25
    clean = {"w": low_rank([4 * threshold, 2 * threshold, 0.5 * threshold], m, n)}
    mechanism = GaussianMechanism(s * 10, 1.0, 10, source("cpu", "noise", 0))
    look = Look({"w": clean["w"] * 10}, 10, ["w"])
    released = mechanism.release({"w": clean["w"] * 10})
    look.at_release(released)
    found = look.spectra["w"]
    assert found["noise_std"] == pytest.approx(s) and found["predicted"]["spikes"] == 2
    assert found["noisy"][0] == pytest.approx(found["predicted"]["first"], rel=0.03)
    assert look.by_parameter["w"]["noisy"] == pytest.approx(found["predicted"]["cosine_noisy"], rel=0.05)
    u, y, v = torch.linalg.svd(released.tensors["w"], full_matrices=False)
    kept = y > 1.02 * s * (m**0.5 + n**0.5)
    from dpft.methods.decoders.spectral import shrink

    eta = shrink("frobenius", y, m, n, s)[0].float() * kept
    look.at_update({"w": (u * eta) @ v})
    assert look.by_parameter["w"]["decoded"] == pytest.approx(found["predicted"]["cosine_decoded"], rel=0.03)
    assert found["decoded"][:2] == pytest.approx(eta[:2].tolist(), rel=1e-3) and found["decoded"][2] < 1e-5


def test_predictions_without_noise_or_signal_are_not_made_up():
    x = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert set(spectra.predict(x, 20, 30, 0.0).values()) == {None}
    assert set(spectra.predict(0 * x, 20, 30, 0.1).values()) == {None}
    below = spectra.predict(0.01 * x, 20, 30, 1.0)
    assert below["spikes"] == 0 and below["cosine_decoded"] == 0 and below["first"] == pytest.approx(20**0.5 + 30**0.5)


def test_spectra_are_taken_of_few_matrices_at_few_steps():
    assert spectra.steps(20, 2) == [2, 10, 20] and spectra.steps(5, 10) == [5] and spectra.steps(4, 2) == [2, 4]
    model = torch.nn.ModuleDict({str(i): torch.nn.Linear(16, 16) for i in range(9)})
    model["table"], model["thin"] = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 2)
    assert spectra.pick(model, dict(model.named_parameters())) == ["0.weight", "4.weight", "8.weight"]


def test_what_probes_make_is_not_counted_as_the_step_s_memory():
    live = LiveBytes(Clock(torch.device("cpu")))
    with live:
        with uncounted():
            kept = torch.zeros(1000)
        counted = torch.zeros(10)
    assert sum(live.peak.values()) == counted.nbytes and kept.nbytes == 4000


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Runs on the low-rank task: a grid of rates of the baseline and of rmt's estimate, without its norm correction."""
    place = Store(tmp_path_factory.mktemp("runs"))
    for method, more in (("dp-adam", {}), ("rmt", {"norm_correction": "none"})):
        for lr in (0.1, 0.2):
            one = resolve({**SIZE, **more, "method": method, "lr": lr, "epsilon": 4.0})
            place.write(*run.execute(one, Settings(), lambda step, row: None))
    return place


def test_the_low_rank_task_has_the_rank_it_says_and_is_learned(store):
    kept = next(r for r in store.records() if r["spec"]["method"] == "rmt" and r["spec"]["lr"] == 0.2)
    assert kept["status"] == "done", kept["error"]
    record = store.whole(kept)
    first, last = record["diagnostics"]["spectra"]
    clean = first["matrices"]["linear.weight"]["clean"]
    assert clean[3] > 0.1 * clean[0] and clean[4] < 1e-4 * clean[0]
    assert last["matrices"]["linear.weight"]["clean"][4] > 1e-4 * clean[0], "noise moved the weights"
    assert record["result"]["final"] > 0.05
    cosines = record["diagnostics"]["alignment_by_parameter"][0]["linear.weight"]
    said = first["matrices"]["linear.weight"]["predicted"]
    assert cosines["noisy"] == pytest.approx(said["cosine_noisy"], abs=0.05)
    assert cosines["decoded"] == pytest.approx(said["cosine_decoded"], abs=0.05)
    assert said["cosine_decoded"] > said["cosine_noisy"] + 0.2
    strength = [value / clean[0] * said["first"] for value in clean]  # in detection thresholds: near 1 the draw decides
    seen = record["diagnostics"]["decoder_by_parameter"][0]["linear.weight"]["spikes"]
    assert sum(one > 1.25 for one in strength) <= seen <= sum(one > 0.8 for one in strength) < 4


def test_other_models_are_refused_on_the_low_rank_task():
    record, _ = run.execute(resolve({**SIZE, "model": "minilm-l6"}), Settings(), lambda step, row: None)
    assert record["status"] == "error" and "a model of its own" in record["error"]


def test_a_method_stands_in_the_table_at_its_best_rate_and_the_baseline_at_all(store):
    text = report.markdown(store.records(), store)
    assert "dp-adam (lr=0.1)" in text and "dp-adam (lr=0.2)" in text
    assert text.count("| rmt (lr=") <= text.count("rmt (lr=")
    (group,) = reading.groups(store.records())
    best = [row for row in reading.best_rates(group) if row.method == "rmt"]
    assert len(group) == 4 and len(best) == 1 and best[0].grid == (0.1, 0.2)
    assert best[0].final == max(row.final for row in group if row.method == "rmt")
    assert "(0.1, 0.2), of the baseline all" in text
    worse = next(row for row in group if row.method == "rmt" and row.final < best[0].final)
    other = [{**r, "spec": {**r["spec"], "seed": r["spec"]["seed"] + 10}} for r in worse.records]
    more = dataclasses.replace(worse, records=worse.records + other)
    assert reading.best_rates([more, best[0]])[0].spec == worse.spec, "a rate with fewer seeds is not finished"
    assert "rmt (lr=0.1)" in report.markdown(store.records(), store, options=report.Options(rates=True))


def test_decoders_and_theory_have_tables(store, tmp_path):
    assert "steps to 90% (ratio)" in report.markdown(store.records(), store)
    text = markdown(report.theory(store))
    line = next(line for line in text.splitlines() if line.startswith("|") and "linear" in line and "low-rank" in line)
    assert " / " in line
    assert "There are no runs to compare" in report.theory(Store(tmp_path))[0]
    plain = [r for r in store.records() if r["spec"]["decoder"] == "mean"]
    assert "spikes per matrix" not in report.markdown(plain, store)


def test_pictures_are_written_and_are_the_same_every_time(store, tmp_path):
    figures = report.Figures(tmp_path / "pictures", "pictures")
    text = report.markdown(store.records(), store, figures=figures)
    names = sorted(path.name for path in figures.folder.iterdir())
    kinds = ("alignment", "epsilon", "lr", "memory", "pareto", "step", "threshold")
    spectra = "low-rank-rmt-eps4-singular-values.svg"
    assert set(names) <= {*(f"low-rank-linear-eps4-{kind}.svg" for kind in kinds), spectra}
    assert {"low-rank-linear-eps4-alignment.svg", "low-rank-linear-eps4-lr.svg", spectra} <= set(names)
    assert all(f"](pictures/{name})" in text for name in names)
    before = [path.read_bytes() for path in sorted(figures.folder.iterdir())]
    assert report.markdown(store.records(), store, figures=figures) == text
    assert [path.read_bytes() for path in sorted(figures.folder.iterdir())] == before
    assert report.markdown(store.records(), store, figures=report.Figures(None, "pictures")) == text
    assert spectra in markdown(report.theory(store, figures))


def test_fp32_means_fp32():
    """Singular values near the edge, norms and sums must not depend on TF32, whatever was set before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        run.execute(resolve({**SIZE, "steps": 1}), Settings(), lambda step, row: None)
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_file_has_several_sections_and_each_report_writes_its_own(tmp_path):
    page = tmp_path / "page.md"
    plain, named = report.markers(), report.markers("theory")
    page.write_text("\n".join(["a", *plain, "b", *named, "c"]))
    assert not report.write("one", page, False, plain) and not report.write("two", page, False, named)
    text = page.read_text()
    assert text.index("one") < text.index("\nb\n") < text.index("two") < text.index("\nc")
    assert report.write("one", page, True, plain) and not report.write("three", page, True, named)
