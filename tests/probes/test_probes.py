"""Probes and thresholds against answers known by hand."""

import time

import pytest
import torch
from small_runs import trained

from dpft.harness.probes import Clock, LiveBytes, alignment, cosine, signal_to_noise
from dpft.harness.statistics.thresholds import crossing, relative_target, smoothed

MIB = 2**20


def test_alignment_overall_and_per_parameter():
    clean = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[3.0]])}
    noisy = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[3.0]])}
    update = {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([[-1.0]])}
    found, decoded = alignment(clean, noisy), alignment(clean, update)
    assert found["overall"] == pytest.approx(10 / (10 * 11) ** 0.5)
    assert decoded["overall"] == pytest.approx(-3 / (10 * 5) ** 0.5)
    assert signal_to_noise(clean, noisy) == pytest.approx(10**0.5)
    assert found["by_parameter"] == {"a": pytest.approx(0.5**0.5), "b": pytest.approx(1.0)}
    assert decoded["by_parameter"] == {"a": 0.0, "b": pytest.approx(-1.0)}


def test_an_update_in_another_shape_is_not_compared():
    found = alignment({"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.ones(3, 1)})
    assert found["overall"] is None and found["by_parameter"] == {"a": pytest.approx(1.0), "b": None}


def test_the_cosine_of_nothing_is_none():
    assert cosine({"a": torch.zeros(3)}, {"a": torch.ones(3)}) is None
    assert signal_to_noise({"a": torch.ones(2)}, {"a": torch.ones(2)}) is None


def test_a_phase_inside_another_stops_its_time():
    clock = Clock(torch.device("cpu"))
    with clock("backward"):
        time.sleep(0.02)
        with clock("clip"):
            time.sleep(0.1)
        assert clock.phase == "backward"
    seconds = clock.take()
    assert clock.phase is None and seconds["clip"] >= 0.1 and 0.02 <= seconds["backward"] < 0.1


def test_processor_seconds_are_those_of_work_in_phases():
    clock = Clock(torch.device("cpu"))
    with clock("forward"):
        time.sleep(0.3)
        begin = time.process_time()
        while time.process_time() < begin + 0.05:
            pass
    while time.process_time() < begin + 0.5:  # in no phase
        pass
    seconds = clock.take()
    assert seconds["forward"] >= 0.35 and 0.05 <= clock.processor < 0.3
    clock.take()
    assert clock.processor == 0


def test_live_bytes_of_each_phase_at_the_peak():
    clock = Clock(torch.device("cpu"))
    weight = torch.zeros(MIB // 4)
    with LiveBytes(clock) as live:
        live.label("parameters", [weight])
        with clock("forward"):
            kept = weight + 1  # 1 MiB that stays
            for _ in range(3):
                weight + 2  # 1 MiB that goes each time
        with clock("clip"):
            more = torch.zeros(2 * MIB // 4)
            view = more[:7]
        with clock("optimizer"):
            del kept
    assert live.peak == {"parameters": MIB, "activations": MIB, "per_example": 2 * MIB}
    assert live.live["activations"] == 0 and len(view) == 7


def test_a_sparse_tensor_is_what_its_indices_and_values_take():
    rows, values = torch.arange(4)[None], torch.ones(4, 1000)
    with LiveBytes(Clock(torch.device("cpu"))) as live:
        table = torch.sparse_coo_tensor(rows, values + 1, (10**6, 1000), is_coalesced=True, check_invariants=False)
    assert sum(live.peak.values()) == 4 * 1000 * 4 + rows.nbytes and table.shape[0] == 10**6


def test_clock_adds_up_and_starts_again():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock("forward"):
            pass
    assert set(clock.take()) == {"forward"} and clock.take() == {}


@pytest.mark.parametrize(
    ("values", "threshold", "expected"),
    [
        ([0.5, 0.6, 0.9, 0.9, 0.9], 0.79, 40),  # smoothed .5 .55 .67 .8 .9: reached at the fourth, and held
        ([0.9, 0.1, 0.1, 0.1], 0.8, None),  # one lucky evaluation
        ([0.5, 0.5, 0.5, 0.5, 0.99], 0.66, None),  # reached, but only at the last evaluation: censored
        ([0.9, 0.9], 0.8, 10),
        ([], 0.8, None),
    ],
)
def test_crossing_as_old_records_were_made(values, threshold, expected):
    """Rule 1; that of new records, which knows what it cannot tell, has a file of its own."""
    found = crossing([10 * (i + 1) for i in range(len(values))], values, threshold, rule=1)
    assert found.step == expected and found.censored == (expected is None)


def test_crossing_when_lower_is_better():
    assert crossing([1, 2, 3], [5.0, 1.0, 1.0], 3.0, higher_is_better=False).step == 2


def test_targets_and_smoothing():
    assert smoothed([1.0, 2.0, 3.0, 4.0]) == [1.0, 1.5, 2.0, 3.0]
    assert relative_target(0.9, 0.9) == pytest.approx(0.81)
    assert relative_target(0.9, 0.9, chance=0.5) == pytest.approx(0.86)


def test_what_a_preconditioning_decoder_takes_for_the_gradient_is_what_is_aligned(setup_of):
    """In the first step the running mean of releases is the release; Adam's direction, its sign, is something else."""
    setup = setup_of("dp-adambc", eval_every=1, steps=1)
    row = trained(setup).progress.curve[0]
    assert row["alignment_decoded"] == pytest.approx(row["alignment_noisy"], rel=1e-6)
    assert setup.method.decoder.estimate is None
