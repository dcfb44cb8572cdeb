"""Audits: no correct method is accused, every planted bug rings, and the bounds are what theory says."""

import json
import math

import numpy
import pytest
from click.testing import CliRunner
from scipy import stats

from dpft.harness import registry
from dpft.harness.audit import bounds, bugs, checks, guessing
from dpft.harness.audit.audit import audit
from dpft.harness.audit.observe import Observation
from dpft.harness.audit.one_run import one_run
from dpft.harness.audit.subject import Question
from dpft.harness.cli import cli
from dpft.harness.errors import BadInput

PRIVATE = [name for name, method in registry.methods().items() if method.private]


def in_phases(name):
    method = registry.make(name, registry.methods()[name].defaults.get("decoder", "mean"), {})
    method.schedule(24)
    return len(method.phases()) > 1


PHASED = [name for name in PRIVATE if in_phases(name)]
SMALL = dict(steps=24, canaries=32, sampling_rate=0.25, epsilon=4.0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", PHASED)
def test_a_method_in_phases_is_audited_as_a_whole(method):
    with pytest.raises(BadInput, match="several phases; use --one-run"):
        audit(Question(method, **SMALL))
    assert one_run(Question(method, **SMALL)).verdict == "consistent"


@pytest.mark.parametrize("method", [name for name in PRIVATE if name not in PHASED])
def test_no_registered_method_is_accused(method):
    found = audit(Question(method, **SMALL))
    assert found.verdict == "consistent", found
    assert found.bound.epsilon <= found.certificate
    assert found.replayed == SMALL["steps"] and found.departed is None
    if registry.methods()[method].query == "gradient":
        assert found.sensitivity.worst == pytest.approx(1.0, abs=1e-6), "the canaries must reach the bound"
        assert found.bound.epsilon > 0.5, "an audit that sees nothing proves nothing"


@pytest.mark.parametrize(
    "method, engine, changes",
    [
        ("dp-adam", "opacus", {}),
        ("dp-adam", "reference", {"precision": "bf16"}),
        ("dp-lora", "factored", {"precision": "bf16", "clip_groups": "layer"}),
        ("dp-grape", "factored", {"projection": "srht", "embeddings": "projected", "refresh": 3}),
    ],
)
def test_nor_is_another_engine_or_setting(method, engine, changes):
    found = audit(Question(method, engine=engine, changes=changes, **SMALL))
    assert found.verdict == "consistent", found


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.name)
def test_every_planted_bug_rings(bug):
    with bug.plant():
        found = audit(Question(bug.method, changes=bug.changes, **SMALL))
    assert bug.rings in found.violations, found
    assert found.verdict.startswith("VIOLATION: ")


def test_a_bug_is_gone_when_its_context_ends():
    for bug in bugs.BUGS:
        with bug.plant():
            pass
    assert audit(Question("dp-adam", **SMALL)).verdict == "consistent"


def simulated(rng, steps=40, canaries=32, q=0.25, sigma=2.0, coordinates=400):
    """What an audit would see of a correct run, drawn directly."""
    member = rng.random((steps, canaries)) < q
    seen = member + sigma * rng.standard_normal((steps, canaries))
    noise = rng.standard_normal((steps, coordinates)).astype("float32")
    quiet = rng.random((steps, coordinates)) < 0.8
    groups = (noise**2 * quiet).reshape(steps, 8, -1), quiet.reshape(steps, 8, -1)
    return Observation(
        spec=Question("dp-sgd", steps=steps, canaries=canaries, sampling_rate=q).spec(),
        privacy=None,
        places=numpy.array([i % 4 if i % 4 == 3 else -1 for i in range(canaries)]),
        sampling_probability=q,
        noise_multiplier=numpy.full(steps, sigma),
        member=member,
        seen=seen,
        squares=groups[0].sum(2, dtype=float),
        counts=groups[1].sum(2),
        noise=noise * quiet,
        quiet=quiet,
        repeated=0.0,
        events=[],
        releases=steps,
        replayed=steps,
        departed=None,
    )


def test_false_alarms_stay_under_the_stated_level():
    """500 correct runs: at most LEVEL alarm (within what chance allows), and no p-value is small too often."""
    rng = numpy.random.default_rng(7)
    found = [checks.run_checks(simulated(rng)) for _ in range(500)]
    accused = sum(bool(checks.alarms(one)) for one in found)
    assert stats.binom.sf(accused - 1, len(found), checks.LEVEL) > 1e-3, accused
    for number, check in enumerate(found[0]):
        low = sum(one[number].p_value < 0.05 for one in found)
        assert stats.binom.sf(low - 1, len(found), 0.05) > 1e-4, (check.name, low)


def test_the_bound_covers_and_tightens():
    """On simulated runs: at most 5% above the truth, and closer to it with more steps' worth of data."""
    rng = numpy.random.default_rng(8)
    limits = [
        bounds._effective(s.seen[s.member], s.seen[~s.member], 0.025) for s in (simulated(rng) for _ in range(400))
    ]
    assert stats.binom.sf(sum(limit < 2.0 for limit in limits) - 1, 400, 0.05) > 1e-3
    few, many = (bounds.reachable(60, 1e-5, 4.0, 0.25, 3.0, n, 1).epsilon for n in (32, 3200))
    exact = bounds._composed(0.25, 3.0, 60, 1e-5, 4.0, -1).epsilon
    assert few < many < exact < 1.15 * many


def test_a_noise_too_small_for_the_accountant_is_capped_and_not_an_error():
    found = bounds._composed(0.125, 0.01, 20, 1e-5, 4.0, -1)
    assert found.capped and 8 < found.epsilon <= 20
    assert bounds._composed(0.125, math.inf, 200, 1e-5, 4.0, -1).epsilon == 0


def test_guesses_known_answers():
    """2305.08846: with all right and delta 0, epsilon solves p^m = .05; randomised response is covered exactly."""
    for m in (10, 100, 1000):
        p = 0.05 ** (1 / m)
        assert guessing.by_guesses(0.0, m, m, m) == pytest.approx(math.log(p / (1 - p)), abs=1e-3)
        assert guessing.ceiling(1e-5, m) <= guessing.by_guesses(0.0, m, m, m)
    assert guessing.by_guesses(1e-5, 100, 100, 50) == 0
    for right in (60, 80, 95):
        assert guessing.p_value(1.0, 0.0, 200, 100, right) == pytest.approx(
            stats.binom.sf(right - 1, 100, 1 / (1 + math.exp(-1)))
        )
        assert guessing.p_value(1.0, 1e-3, 200, 100, right) >= guessing.p_value(1.0, 0.0, 200, 100, right)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.0])
def test_the_tradeoff_audit_is_exact_for_randomised_response(epsilon):
    """2410.22235: for a pure epsilon the least refuted count is the binomial's 95% quantile, or one more."""

    def inverse(y):
        return max(0.0, y * math.exp(-epsilon), 1 - math.exp(epsilon) * (1 - y))

    m, p = 200, 1 / (1 + math.exp(-epsilon))
    least = next(v for v in range(1, m) if guessing.refuted(inverse, m, m, v))
    exact = next(v for v in range(1, m) if stats.binom.sf(v - 1, m, p) < 0.05)
    assert exact <= least <= exact + 1


def test_the_tradeoff_function_of_one_gaussian_step():
    for y in (0.01, 0.3, 0.9):
        exact = stats.norm.cdf(stats.norm.ppf(y) - 1 / 0.8)
        assert 0.97 * exact - 1e-5 <= guessing.inverse_tradeoff(1.0, 0.8, 1, y) <= exact * 1.001


def test_one_run_finds_missing_noise_and_nothing_else():
    question = Question("dp-sgd", steps=20, canaries=100, sampling_rate=0.25, epsilon=4.0)
    honest = one_run(question)
    assert honest.verdict == "consistent" and honest.ceiling < 5
    weak = Question("dp-sgd", steps=20, canaries=100, sampling_rate=0.25, epsilon=1.0)
    with next(bug for bug in bugs.BUGS if bug.name == "noise-over-batch").plant():
        assert one_run(weak).verdict == "VIOLATION: bound exceeds certificate"


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
                setup, lambda batch, noisy, step, seen=seen: seen.append((batch, noisy.tensors["head.weight"].clone()))
            )
            train(setup)
            first.append(seen[0])
            sigma.append(setup.mechanism.noise_multiplier)
    assert first[0][0] == first[1][0]
    clean = (sigma[1] * first[0][1] - sigma[0] * first[1][1]) / (sigma[1] - sigma[0])
    in_batch = clean.abs().max(dim=1).values > 1e-3
    assert in_batch.nonzero().flatten().tolist() == first[0][0], "who was in the batch is read off without any noise"


def ran(*arguments):
    try:
        result = CliRunner().invoke(cli, ["audit", *arguments], standalone_mode=False)
    except BadInput as error:  # pragma: no cover - click hands exceptions over
        return None, str(error)
    return result, str(result.exception or "")


def test_the_command():
    few = ["--steps", "24", "--canaries", "32", "--sampling-rate", "0.25", "--quiet"]
    result, _ = ran("dp-bitfit", *few, "--json")
    document = json.loads(result.stdout)
    assert result.return_value == 0 and document["verdict"] == "consistent"
    assert document["certificate"] <= 4 and {c["name"] for c in document["checks"]} >= {"noise std", "inclusion rate"}
    assert "within reach" in ran("last-layer", *few)[0].output
    with next(bug for bug in bugs.BUGS if bug.name == "shuffled").plant():
        assert ran("last-layer", *few)[0].return_value == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "Name one method"),
        (["dp-adm"], "did you mean 'dp-adam'?"),
        (["non-private"], "is not private"),
        (["dp-adam", "--check"], "belong to --planted"),
        (["--planted", "--check"], "-o"),
        (["--planted", "--only", "shufled"], "did you mean 'shuffled'?"),
        (["dp-adam", "--engine", "fast"], "engine"),
        (["dp-adam", "--sampling-rate", "0"], "sampling rate"),
        (["dp-adam", "--sampling-rate", "nan"], "sampling rate"),
        (["dp-adam", "--canaries", "1000"], "at most 256"),
        (["dp-adam", "--epsilon", "1000"], "epsilon"),
        (["dp-adam", "--set", "rank=3"], "rank"),
    ],
)
def test_bad_questions_are_one_sentence(arguments, words):
    result, message = ran(*arguments)
    assert isinstance(result.exception, BadInput) and words in message and "\n" not in message


def test_the_planted_table_stands_between_its_markers(tmp_path):
    from dpft.harness.audit.report import MARKERS

    path = tmp_path / "page.md"
    path.write_text("before\n" + "\n".join(MARKERS) + "\nafter\n")
    few = ["--planted", "--only", "clean-mask", "--steps", "16", "--canaries", "32", "--sampling-rate", "0.25"]
    assert ran(*few, "-o", str(path))[0].return_value == 0
    text = path.read_text()
    assert "replay (step 1)" in text and "| nothing " in text
    assert ran(*few, "-o", str(path), "--check")[0].return_value == 0, "a seed repeats exactly"
    path.write_text(text.replace("4.00", "4.01"))
    assert ran(*few, "-o", str(path), "--check")[0].return_value == 1
