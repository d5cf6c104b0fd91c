"""Cohesion and coupling against naive means over pairs; latency with a fake clock."""

import itertools
import statistics

import pytest
import torch

from nemo_hf.evaluation import latency
from nemo_hf.evaluation.metrics import cohesion_and_coupling, jaccard_indices

MASKS = torch.rand(7, 12, generator=torch.Generator().manual_seed(0)) < 0.4
GROUPS = torch.tensor([0, 1, 0, 2, 1, 0, 2])


def jaccard(a: torch.Tensor, b: torch.Tensor) -> float:
    first, second = set(a.nonzero().flatten().tolist()), set(b.nonzero().flatten().tolist())
    return len(first & second) / len(first | second) if first | second else 1.0


def test_jaccard_indices_are_those_of_sets():
    masks = torch.cat([MASKS, torch.zeros(2, 12, dtype=torch.bool)])
    expected = torch.tensor([[jaccard(a, b) for b in masks] for a in masks])
    torch.testing.assert_close(jaccard_indices(masks), expected)


@pytest.mark.parametrize("several", [False, True])
def test_cohesion_and_coupling_are_the_double_loop(several):
    member = torch.nn.functional.one_hot(GROUPS) > 0
    if several:  # the first sample is of all groups, the last of none
        member[0], member[-1] = True, False
    pairs = [(i, j, bool((member[i] & member[j]).any())) for i, j in itertools.combinations(range(len(GROUPS)), 2)]
    within = [jaccard(MASKS[i], MASKS[j]) for i, j, is_shared in pairs if is_shared]
    between = [jaccard(MASKS[i], MASKS[j]) for i, j, is_shared in pairs if not is_shared]
    expected = statistics.mean(within), statistics.mean(between)
    for groups in [member] if several else [member, GROUPS]:
        assert cohesion_and_coupling(MASKS, groups) == pytest.approx(expected, abs=1e-6)
    assert cohesion_and_coupling(torch.nn.functional.one_hot(GROUPS).bool(), GROUPS) == (1.0, 0.0)
    assert cohesion_and_coupling(MASKS[:3], torch.tensor([0, 1, 2]))[0] is None  # without a pair there is no mean
    assert cohesion_and_coupling(MASKS[:3], torch.tensor([1, 1, 1]))[1] is None


class Clock:
    """Seconds that pass only while a runner runs, of which this process computes a share."""

    def __init__(self):
        self.now = self.own = 0.0
        self.share = 1.0
        self.runs = []

    def __call__(self):
        return self.now, self.own

    def runner(self, name, milliseconds):
        """A callable that takes the given times in turn, by batch size."""
        times = {size: itertools.cycle(values) for size, values in milliseconds.items()}

        def run(pixels):
            assert torch.get_num_threads() == 1
            self.runs.append((name, len(pixels)))
            seconds = next(times[len(pixels)]) / 1000
            self.now += seconds
            self.own += self.share * seconds

        return run

    def time(self, batch_sizes, **milliseconds):
        runners = {name: self.runner(name, times) for name, times in milliseconds.items()}
        return latency.time_runs(runners, {"pixels": torch.zeros(4, 3)}, batch_sizes, clock=self)


@pytest.fixture
def clock(monkeypatch):
    constants = {"WARM_UP_RUNS": 1, "RUNS_A_TURN": 3, "LATENCY_TURNS": 8, "FEWEST_TURNS": 4, "LATENCY_SECONDS": 3.0,
                 "PATIENCE": 4, "LARGEST_SPREAD": 1.05, "LARGEST_DRIFT": 1.2}  # fmt: skip
    for name, value in constants.items():
        monkeypatch.setattr(latency, name, value)
    torch.set_num_threads(2)
    yield Clock()
    torch.set_num_threads(1)


def test_latency_is_the_lower_quartile_of_interleaved_runs(clock):
    times = [7.0, *(10.0 + index % 4 / 10 for index in range(24))]  # the first warms up
    found = clock.time([1], module={1: times}, parent={1: [20.0]})
    assert found.milliseconds == {
        "module": {"1": pytest.approx(statistics.quantiles(times[1:], n=4, method="inclusive")[0])},
        "parent": {"1": 20.0},
    }
    assert found.note is None
    turn = 3 * [("module", 1)] + 3 * [("parent", 1)]
    assert clock.runs == [("module", 1), ("parent", 1), *(8 * turn)]
    assert found.device.endswith(", 1 thread)")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("milliseconds", "turns"), [(200.0, 5), (5000.0, 4)])
def test_slow_models_run_less_often(clock, milliseconds, turns):
    assert clock.time([8], module={8: [milliseconds]}).milliseconds == {"module": {"8": milliseconds}}
    assert len(clock.runs) == 1 + 3 * turns


def test_batch_sizes_whose_ratios_do_not_hold_are_left_out_with_the_reason(clock):
    slower = [*(14 * [4.0]), *(1000 * [4.3])]  # the first quarter of the first half is faster, of up to 96 runs
    found = clock.time([1, 8], module={1: [1.0], 8: [2.0]}, parent={1: [3.0, 3.1], 8: slower})
    assert found.milliseconds == {"module": {"1": 1.0}, "parent": {"1": 3.0}}
    assert found.note.endswith("batch size 8 (parent: 0.5 times as fast as module, then 0.465 times).")
    assert clock.runs.count(("parent", 8)) == 1 + 4 * 24


def test_a_disturbance_that_ends_is_outlasted(clock):
    found = clock.time([1], module={1: [1.0]}, parent={1: 13 * [4.0] + 1000 * [3.0]})
    assert found.milliseconds == {"module": {"1": 1.0}, "parent": {"1": 3.0}}
    assert 1 + 24 < clock.runs.count(("parent", 1)) < 1 + 4 * 24


@pytest.mark.parametrize(("late", "holds"), [(1.19, True), (1.21, False)])
def test_a_machine_that_slows_down_changes_no_ratio_but_times(clock, late, holds):
    times = [*(14 * [1.0]), *(1000 * [late])]
    found = clock.time([1], module={1: times}, parent={1: [3 * each for each in times]})
    assert (found.note is None) == holds
    assert holds or found.note.endswith(f"(module: 1 ms, then {late} ms).")


@pytest.mark.parametrize(("share", "holds"), [(0.96, True), (0.94, False)])
def test_processes_beside_leave_no_figure(clock, share, holds):
    clock.share = share
    found = clock.time([1], module={1: [1.0]}, parent={1: [3.0]})
    assert found.milliseconds == {"module": {"1": 1.0} if holds else {}, "parent": {"1": 3.0} if holds else {}}
    assert holds or "module: computes in 94% of its time, the rest goes to other processes" in found.note
