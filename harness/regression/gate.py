"""The quality gate: runs of the same seeds against a baseline, paired, with a confirmation on seeds kept back.

The rule, for each configuration and each measure (metric; step time and peak memory where asked for): it is *suspected* to be
worse when the one-sided exact sign-flip test over the first half of the baseline's seeds rejects at `level` and the mean loss
exceeds the margin. Then, and only then, the other half is compared (runs that are missing are made), and it is a regression when
the same holds there. The halves share no seed, so a change that alters nothing but chance is called a regression with probability
at most level squared. A baseline with too few seeds for two halves is tested once, on all of them, at `level`.
"""

from __future__ import annotations

import json
import math
import statistics as plain
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpft.harness import statistics
from dpft.harness.errors import BadInput
from dpft.harness.regression.baseline import Configuration, Run
from dpft.harness.runs.registry import is_current
from dpft.harness.runs.spec import RunSpec

CODES = {"fine": 0, "not confirmed": 0, "new": 0, "regression": 1, "failed": 1}  # verdict -> exit code; any other: 2
MAIN = "metric"
SETTING = ("task", "task_version", "task_options", "model", "head", "split")


@dataclass(frozen=True)
class Rule:
    """What counts as worse.

    Attributes:
        level: of each one-sided test.
        margin: of the metric, as a share of the way from chance to the best of the same setting in the baseline. (In units of the
            metric, .01 is nothing where accuracies lie .4 apart, and a sixth of everything where r2 does not pass .06.)
        time, memory: as shares of the baseline; None: no gate.
    """

    level: float = statistics.LEVEL
    margin: float = 0.05
    time: float | None = None
    memory: float | None = None

    @property
    def fewest(self) -> int:
        """Seeds without which no data can make the test reject."""
        return statistics.fewest_seeds(self.level, "less")

    def halves(self, seeds: Sequence[int]) -> tuple[list[int], list[int]]:
        """The seeds compared first and those kept back; none is kept back where either half could not reject."""
        ordered = sorted(seeds)
        cut = len(ordered) - len(ordered) // 2
        return (ordered[:cut], ordered[cut:]) if len(ordered) - cut >= self.fewest else (ordered, [])

    def rate(self, seeds: Sequence[int]) -> float:
        """An upper bound of the probability of a false alarm of the metric of a configuration with these seeds.

        Step times are left out: all runs of an hour share the machine's mood, so for them only the margin protects.
        """
        first, kept = self.halves(seeds)
        if len(first) < self.fewest:
            return 0.0
        return self.level**2 if kept else self.level


@dataclass(frozen=True)
class Measure:
    """One measure over the seeds that were compared. losses: by how much each is worse (metric: in its unit; time, memory: log
    ratio); p of the first half; confirmation: p of the other, None where it was not asked for."""

    losses: dict[int, float]
    margin: float
    p: float
    confirmation: float | None = None


@dataclass(frozen=True)
class Outcome:
    """One configuration. verdict: a key of CODES, `cannot tell`, `not comparable` or `missing`; reason: what it rests on.

    before, now: mean metric over `seeds`, those compared; interval: of now - before. steps: to the threshold, infinite when it
    is not reached, None where that is not known.
    """

    spec: dict[str, Any]
    verdict: str
    reason: str = ""
    seeds: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    before: float | None = None
    now: float | None = None
    interval: statistics.Interval | None = None
    steps: tuple[float | None, float | None] | None = None
    measures: dict[str, Measure] = field(default_factory=dict)
    rate: float = 0.0

    @property
    def code(self) -> int:
        return CODES.get(self.verdict, 2)


Confirm = Callable[[list[dict[str, Any]]], Configuration]


def check(
    baseline: Mapping[str, Configuration], now: Mapping[str, Configuration], rule: Rule, confirm: Confirm
) -> list[Outcome]:
    """One outcome per configuration of the baseline, then those that it does not hold.

    confirm: makes the runs of the specs it is given (all of one configuration) and returns that configuration with them.
    Raises BadInput when the two share nothing at all.
    """
    fresh = [one for key, one in now.items() if key not in baseline]
    ways = _ways(list(baseline.values()))
    found = []
    for key, old in baseline.items():
        if key in now:
            found.append(
                _configuration(old, now[key], replace(rule, margin=rule.margin * ways[_setting(old)]), confirm)
            )
        else:
            found.append(_absent(old, fresh))
    shared = any(
        key in now and old.runs.keys() & (now[key].runs | now[key].failed).keys() for key, old in baseline.items()
    )
    if not shared and all(one.verdict == "missing" for one in found):
        raise BadInput("No run here has a configuration and seed of the baseline; give the folder of the same suite.")
    explained = {id(_nearest(old, fresh)) for key, old in baseline.items() if key not in now}
    return found + [Outcome(one.spec, "new", "not in the baseline") for one in fresh if id(one) not in explained]


def lacking(
    baseline: Mapping[str, Configuration], now: Mapping[str, Configuration], rule: Rule
) -> list[dict[str, Any]]:
    """The runs that `check` compares first and `now` lacks, of those of the baseline that this dpft can make: another version of
    a method is another method.
    """
    found = []
    for key, old in baseline.items():
        if not is_current(RunSpec(**old.spec, seed=0)):
            continue
        have = now[key].runs.keys() | now[key].failed.keys() if key in now else set()
        found += [{**old.spec, "seed": seed} for seed in rule.halves(list(old.runs))[0] if seed not in have]
    return found


def _setting(one: Configuration) -> str:
    return json.dumps([one.spec.get(key) for key in SETTING], sort_keys=True)


def _ways(blessed: Sequence[Configuration]) -> dict[str, float]:
    """Setting -> how far it is from chance to the best mean of its configurations, controls among them."""
    found: dict[str, float] = {}
    for one in blessed:
        if one.chance is None:
            raise BadInput("The baseline is older than the margin it is to be held to: it lacks chance; bless it anew.")
        sign = 1 if one.higher_is_better else -1
        way = sign * (plain.mean(run.final for run in one.runs.values()) - one.chance)
        found[_setting(one)] = max(found.get(_setting(one), 0.0), way)
    return found


def _nearest(old: Configuration, fresh: Sequence[Configuration]) -> Configuration | None:
    """The configuration of the same task, model and method that differs in the fewest fields."""
    same = [one for one in fresh if all(one.spec.get(k) == old.spec[k] for k in ("task", "model", "method"))]
    same = same or [one for one in fresh if all(one.spec.get(k) == old.spec[k] for k in ("task", "method"))]
    return min(same, key=lambda one: len(_changes(old.spec, one.spec)), default=None)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{k} is {new.get(k)}, was {old.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]


def _absent(old: Configuration, fresh: Sequence[Configuration]) -> Outcome:
    near = _nearest(old, fresh)
    if near is not None:
        return Outcome(old.spec, "not comparable", "; ".join(_changes(old.spec, near.spec)))
    if not is_current(RunSpec(**old.spec, seed=0)):
        return Outcome(old.spec, "not comparable", "the baseline is of another version of its task, method or decoder")
    seeds = tuple(sorted(old.runs))
    return Outcome(old.spec, "missing", f"no run of seeds {_span(seeds)}", missing=seeds)


def _configuration(old: Configuration, new: Configuration, rule: Rule, confirm: Confirm) -> Outcome:
    first, kept = rule.halves(list(old.runs))
    base = Outcome(old.spec, "fine", rate=rule.rate(list(old.runs)))
    outcome = _compare(base, old, new, first, rule)
    suspected = {name for name, one in outcome.measures.items() if _worse(one, one.p, rule)}
    if outcome.code or not suspected:
        return outcome
    names = " and ".join(sorted(suspected))
    if not kept:
        return replace(outcome, verdict="regression", reason=f"{names} is worse; no seeds are left to confirm it on")
    absent = [seed for seed in kept if seed not in new.runs and seed not in new.failed]
    if absent:
        new = confirm([{**old.spec, "seed": seed} for seed in absent])
    second = _compare(base, old, new, kept, rule)
    if second.code:
        return replace(second, reason=f"{second.reason} (while confirming a suspicion: {names})")
    both = _compare(base, old, new, first + kept, rule)
    measures = {
        name: replace(
            one, p=outcome.measures[name].p, confirmation=second.measures[name].p if name in suspected else None
        )
        for name, one in both.measures.items()
    }
    held = [name for name in sorted(suspected) if _worse(second.measures[name], second.measures[name].p, rule)]
    if held:
        return replace(
            both, measures=measures, verdict="regression", reason=f"{' and '.join(held)} is worse, confirmed"
        )
    reason = f"{names} was worse on seeds {_span(first)}, not on seeds {_span(kept)}"
    return replace(both, measures=measures, verdict="not confirmed", reason=reason)


def _compare(base: Outcome, old: Configuration, new: Configuration, seeds: Sequence[int], rule: Rule) -> Outcome:
    """`base` with the measures over `seeds`, or with the reason why there are none."""
    failed = {seed: new.failed[seed] for seed in seeds if seed in new.failed}
    if failed:
        seed, why = min(failed.items())
        return replace(base, verdict="failed", reason=f"{len(failed)} of {len(seeds)} runs; seed {seed}: {why}")
    missing = tuple(seed for seed in seeds if seed not in new.runs)
    if missing:
        return replace(base, verdict="missing", reason=f"no run of seeds {_span(missing)}", missing=missing)
    pairs = {seed: (old.runs[seed], new.runs[seed]) for seed in seeds}
    for was, run in pairs.values():
        changes = _changes(was.made_with, run.made_with)
        if rule.time is not None or rule.memory is not None:
            changes += _changes(was.hardware, run.hardware)
        if changes:
            return replace(base, verdict="not comparable", reason="; ".join(changes))
    sign = 1 if old.higher_is_better else -1
    differences = [run.final - was.final for was, run in pairs.values()]
    found = replace(
        base,
        seeds=tuple(seeds),
        before=plain.mean(was.final for was, _ in pairs.values()),
        now=plain.mean(run.final for _, run in pairs.values()),
        interval=statistics.interval(differences),
        steps=tuple(_median_steps([pair[i] for pair in pairs.values()]) for i in (0, 1)),
        measures={MAIN: _measure({s: -sign * d for s, d in zip(seeds, differences, strict=True)}, rule.margin)},
    )
    if rule.time is not None:
        found.measures["step time"] = _measure(_ratios(pairs, "step_s"), math.log1p(rule.time))
    if rule.memory is not None:
        found.measures["peak memory"] = _measure(_ratios(pairs, "peak_bytes"), math.log1p(rule.memory))
    if len(seeds) < rule.fewest and any(loss for one in found.measures.values() for loss in one.losses.values()):
        told = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: {rule.fewest} are the fewest that can show a loss"
        return replace(found, verdict="cannot tell", reason=f"{told} at level {rule.level:g}")
    return found


def _measure(losses: dict[int, float], margin: float) -> Measure:
    return Measure(losses, margin, statistics.sign_flip([-x for x in losses.values()], "less").p)


def _worse(measure: Measure, p: float, rule: Rule) -> bool:
    return p <= rule.level and plain.mean(measure.losses.values()) > measure.margin


def _ratios(pairs: Mapping[int, tuple[Run, Run]], name: str) -> dict[int, float]:
    """Log ratios by seed. Raises BadInput where a run has no such measurement."""
    found = {}
    for seed, pair in pairs.items():
        was, run = (getattr(one, name) for one in pair)
        if not was or not run:
            raise BadInput(f"The run of seed {seed} has no {name}; leave its margin out, or make runs of more steps.")
        found[seed] = math.log(run / was)
    return found


def _median_steps(runs: Sequence[Run]) -> float | None:
    middle = statistics.median_reached([_reached(run) for run in runs])
    return None if middle is None else middle.step


def _reached(run: Run) -> statistics.Reached | None:
    if run.steps_to_threshold is not None:
        return statistics.Reached(run.steps_to_threshold, None)
    return statistics.Reached(math.inf, None) if run.censored else None


def _span(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 when anything got worse, else 2 when something could not be compared, else 0."""
    codes = {one.code for one in outcomes}
    return 1 if 1 in codes else max(codes)
