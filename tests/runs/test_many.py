"""Plans of many runs: what they should cost is found without looking at every record for every run, and as if one did."""

import math
import random

import record_cases

from dpft.harness.runs.expected import APART, Expected
from dpft.harness.runs.spec import RunSpec, completed
from dpft.harness.runs.suites import expand


class Read(dict):
    """A record that counts how often it is looked at."""

    looked = 0

    def __getitem__(self, key):
        Read.looked += 1
        return super().__getitem__(key)


def records(count, settings=12):
    """`count` runs of a few batch sizes and ranks, with seeds and rates of their own."""
    rng, base = random.Random(0), record_cases.record()
    spec = completed(base["spec"])
    made = []
    for i in range(count):
        own = {"batch_size": 2 ** (3 + i % (settings // 3)), "options": {"rank": 1 + i % 3}, "seed": rng.randrange(5)}
        own = {**spec, **own, "lr": 1e-6 * (i + 1)}
        made.append(
            Read({**base, "run_id": RunSpec(**own).run_id, "spec": own, "cost": {**base["cost"], "step_s": 1.0}})
        )
    return made


def by_hand(mine, made):
    """The id of the nearest run, all of them looked at."""

    def distance(record):
        other = record["spec"]
        differ = sum(mine[key] != other[key] for key in APART)
        apart = abs(math.log(mine["batch_size"] / other["batch_size"]))
        return differ, apart, mine["seed"] != other["seed"], record["run_id"]

    return min(made, key=distance)["run_id"]


def test_the_nearest_run_is_that_of_all_of_them():
    made = records(200)
    expected, rng = Expected(made), random.Random(1)
    for _ in range(50):
        own = {
            "batch_size": 2 ** rng.randrange(2, 9),
            "options": {"rank": rng.randrange(1, 5)},
            "seed": rng.randrange(7),
        }
        mine = {**made[0]["spec"], **own, "lr": 0.5}
        assert expected.of(RunSpec(**mine))["by"].startswith(by_hand(mine, made))


def test_looking_for_the_nearest_run_does_not_take_longer_with_more_seeds_and_rates():
    looked = []
    for count in (100, 1000):
        made = records(count)
        expected, Read.looked = Expected(made), 0
        for record in made[:100]:
            expected.of(RunSpec(**dict.__getitem__(record, "spec")))
        looked.append(Read.looked)
    assert looked[1] <= 2 * looked[0], "it was tenfold, and all of them quadratic"


def test_points_that_differ_in_their_seed_alone_are_resolved_as_if_each_were():
    given = {"task": "sentences", "method": ["dp-adam", "dp-lora"], "lr": [1e-3, 1e-4], "seed": [3, 0, 7]}
    runs = expand(given)
    alone = [
        expand({**given, "method": method, "lr": lr, "seed": seed})[0]
        for method in given["method"]
        for lr in given["lr"]
        for seed in given["seed"]
    ]
    assert runs == alone and [run.run_id for run in runs] == [run.run_id for run in alone]
