"""Run ids, resolution of settings, suites and their errors."""

import dataclasses

import pytest

from dpft.harness.errors import BadInput
from dpft.harness.runs import registry, spec, suites
from dpft.harness.runs.resolve import resolve


def a_spec(**more):
    return resolve({"task": "sst2", "method": "dp-adam", **more})


def test_run_id_ignores_how_numbers_are_written_and_fields_at_their_default():
    assert a_spec(epsilon=8).run_id == a_spec(epsilon=8.0).run_id == a_spec(epsilon=8.0, weight_decay=0).run_id
    assert a_spec(seed=1).run_id != a_spec(seed=0).run_id
    assert '"weight_decay"' not in a_spec().canonical()


def test_run_id_is_pinned():
    """Canonical JSON is a format on disk: this id may change only with a version of the task or method."""
    pinned = spec.RunSpec(
        task="t", task_version=1, model="m", head="mean", max_length=8, method="x", method_version=1, epsilon=8.0,
        clip_norm=1.0, batch_size=4, steps=2, optimizer="adam", lr=0.1, eval_every=1,
    )  # fmt: skip
    assert pinned.canonical() == (
        '{"batch_size":4,"clip_norm":1.0,"epsilon":8.0,"eval_every":1,"head":"mean","lr":0.1,"max_length":8,"method":"x",'
        '"method_version":1,"model":"m","optimizer":"adam","steps":2,"task":"t","task_version":1}'
    )
    assert pinned.run_id == "56ee0f23306f382a"


def test_mechanisms_leave_old_run_ids_alone():
    assert a_spec(mechanism="gaussian", noise_shape="spherical").run_id == a_spec().run_id
    laplace = [a_spec(mechanism="laplace", noise_shape=shape).run_id for shape in ("spherical", "coordinates")]
    assert len({a_spec().run_id, *laplace}) == 3
    assert resolve({"task": "sst2", "method": "non-private", "mechanism": "lmo"}).mechanism == "gaussian"


def test_defaults_are_general_then_the_tasks_then_the_methods_then_given():
    assert a_spec().lr == registry.method("dp-adam").defaults["lr"]
    assert a_spec(lr=0.25).lr == 0.25
    lora = resolve({"task": "sst2", "method": "dp-lora", "rank": 2})
    assert lora.options == {"rank": 2}
    assert resolve({"task": "sst2", "method": "dp-lora", "rank": 8}).options == {}


def test_a_method_that_is_not_private_has_no_budget():
    found = resolve({"task": "sst2", "method": "non-private", "epsilon": 3})
    assert found.epsilon is None and found.clip_norm is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dp-adm"}, "did you mean 'dp-adam'"),
        ({"task": "sst3"}, "did you mean 'sst2'"),
        ({"learning_rate": 1}, "no setting of dp-adam called 'learning_rate'"),
        ({"lr": "fast"}, "lr must be a number, not 'fast'"),
        ({"steps": 1.5}, "steps must be a whole number, not 1.5"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"epsilon": float("nan")}, "epsilon must be a finite number, not nan"),
        ({"delta": 2.0}, "delta must be less than 1, not 2"),
        ({"optimizer": "adamm"}, "did you mean 'adam'"),
        ({"warmup_steps": 100, "steps": 100}, "must be fewer than steps"),
        ({"method": "dp-lora", "rank": "many"}, "must look like its default 8"),
        ({"mechanism": "laplas"}, "did you mean 'laplace'"),
        ({"mechanism": "laplace", "noise_shape": "scalar"}, "no noise_shape called 'scalar'"),
        ({"noise_shape": "coordinates"}, "gaussian with noise_shape coordinates has no certificate"),
        ({"mechanism": "lmo", "noise_shape": "coordinates"}, "lmo with noise_shape coordinates has no certificate"),
        ({"noise_law": "gamma(3,1)"}, "Mechanism gaussian has no noise_law"),
        ({"mechanism": "laplace", "noise_law": "gamma(3,1)"}, "Mechanism laplace has no noise_law"),
        ({"mechanism": "plrv", "noise_law": "gamma(3,1)+gamma(4,1)"}, "plrv is one gamma term"),
        ({"mechanism": "plrv", "noise_law": "uniform(1,2)"}, "made of gamma, not of uniform"),
        ({"mechanism": "lmo", "noise_law": "gamma(3)"}, "takes 2 numbers"),
        ({"mechanism": "lmo", "noise_law": "exponential(1)"}, "infinite variance"),
    ],
)
def test_bad_settings_are_one_sentence(settings, message):
    with pytest.raises(BadInput, match=message):
        a_spec(**settings)


def test_lists_span_a_grid_and_equal_runs_are_made_once(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[mine]\n[mine.base]\ntask="sst2"\nseed=[0,1]\n[[mine.arms]]\nmethod="dp-adam"\nlr=[0.1,0.2]\n'
        '[[mine.arms]]\nmethod=["dp-adam","non-private"]\nlr=0.1\n'
    )
    runs = suites.load_suite(str(path)).runs
    assert len(runs) == 6
    assert {(r.method, r.lr, r.seed) for r in runs} == {
        ("dp-adam", lr, seed) for lr in (0.1, 0.2) for seed in (0, 1)
    } | {("non-private", 0.1, seed) for seed in (0, 1)}
    assert {r.seed for r in suites.load_suite(str(path), {"seed": 7}).runs} == {7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [", "cannot be read"),
        ("[a]\narms=[{}]\n[b]\narms=[{}]\n", "exactly one suite"),
        ('[a]\nbase={task="sst2"}\n', "a lacks arms"),
    ],
)
def test_bad_suite_files(tmp_path, text, message):
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        suites.load_suite(str(path))


def test_every_suite_of_the_package_resolves():
    for name in suites.suites():
        suite = suites.load_suite(name)
        assert suite.runs and suite.description
        assert len({r.run_id for r in suite.runs}) == len(suite.runs)


def test_unknown_suite_names_the_nearest():
    with pytest.raises(BadInput, match="did you mean 'demo'"):
        suites.load_suite("dmo")


def test_spec_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_spec().lr = 1.0
