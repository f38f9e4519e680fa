"""The sweep as a state machine on synthetic iterations, and in vivo on simulated GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.gpu.device import ThrottleReason
from perseus_core.runtime.measure.energy import Iteration
from perseus_core.runtime.measure.stage_measurements import SweepRows, merge
from perseus_core.runtime.measure.sweep import Sweep, sweep_clocks

from ..emulated_pipeline import PipelineRun, profile_pipeline
from ..simulated_machine import duration_s, simulated_machine
from .synthetic_counter import FORWARD, lay_out, read_counter, stage_in_1f1b

SUPPORTED_MHZ = tuple(range(1410, 209, -15))


def waiting_w(clock_mhz: float) -> float:
    return 40 + 40 * clock_mhz / 1410


def power_w(clock_mhz: float) -> float:
    """Dynamic power goes with clock and voltage squared, and voltage stops falling at three quarters of the clock."""
    share = clock_mhz / 1410
    return 110 + 250 * share * max(0.8, 1 - 0.8 * (1 - share)) ** 2


def time_s(clock_mhz: float) -> float:
    return 0.06 * 1410 / clock_mhz


class SyntheticTraining:
    """Runs a sweep: in each iteration the clock asked for is in force, unless `in_force` says otherwise."""

    def __init__(self, sweep: Sweep, in_force: Callable[[int], tuple[int, ThrottleReason]] | None = None) -> None:
        self.sweep = sweep
        self.asked: list[int] = []
        self._in_force = in_force or (lambda clock: (clock, ThrottleReason.NONE))
        self._random = np.random.default_rng(0)
        self._now_s = 100.0
        self._energy_j = 0.0

    def run(self, num_iterations: int = 200) -> None:
        while not self.sweep.is_complete and len(self.asked) < num_iterations:
            self.iterate(self.sweep.clock_at(len(self.asked)))

    def iterate(self, asked_mhz: int, *, counter: bool = True) -> None:
        clock, throttle = self._in_force(asked_mhz)
        pieces = stage_in_1f1b(
            forward=(time_s(clock), power_w(clock)),
            backward=(2 * time_s(clock), power_w(clock) * 1.05),
            waiting_w=waiting_w(clock),
            noise=0.01,
            random=self._random,
        )
        (iteration,) = lay_out([pieces], self._now_s)
        iteration = replace(iteration, number=len(self.asked))
        readings = [
            replace(r, energy_j=r.energy_j + self._energy_j, throttle=throttle)
            for r in read_counter([pieces], begin_s=self._now_s, clock_mhz=clock, random=self._random)
        ]
        self.asked.append(asked_mhz)
        self._now_s = iteration.end_s
        self._energy_j += sum(seconds * watts for _, seconds, watts in pieces)
        self.sweep.add_iteration(iteration, asked_mhz, readings if counter else [])


def sweep_of(clocks_mhz: tuple[int, ...], *, stage: int = 0, iterations_of_step: int = 3) -> Sweep:
    return Sweep(stage, SUPPORTED_MHZ, clocks_mhz, iterations_of_step)


def measured(sweep: Sweep) -> list[tuple[int, int]]:
    """Clocks, and how many iterations count for each."""
    return [(c.clock_mhz, c.num_iterations) for c in sweep.measurements().clocks]


def test_clocks_are_even_over_the_useful_range_and_supported() -> None:
    """From the highest supported clock to 45 % of it."""
    clocks = sweep_clocks(SUPPORTED_MHZ, 8)
    assert len(clocks) == 8
    assert max(clocks) == clocks[0] == 1410
    assert min(clocks) == pytest.approx(0.45 * 1410, abs=8)
    assert set(clocks) <= set(SUPPORTED_MHZ)
    assert np.ptp(np.diff(sorted(clocks))) <= 15
    assert sweep_clocks((1000, 900), 8) == (1000, 900)


@pytest.mark.parametrize(("unlocked_mhz", "second_mhz"), [(0, 1305), (1395, 1305), (1200, 1110), (600, 1305)])
def test_clocks_that_are_never_held_are_measured_once(unlocked_mhz: int, second_mhz: int) -> None:
    """The highest supported one stands for all of them; what is hardly below it, or of no use, is another matter."""
    clocks = sorted(sweep_clocks(SUPPORTED_MHZ, 8, unlocked_mhz), reverse=True)
    assert len(clocks) == 8
    assert clocks[0] == 1410
    assert clocks[1] == pytest.approx(second_mhz, abs=15)
    assert clocks[-1] == pytest.approx(0.45 * 1410, abs=8)


def test_a_gpu_that_warms_up_meanwhile_does_not_make_one_end_look_costly() -> None:
    """The order goes down and up again: clocks of the beginning and of the end lie beside each other."""
    in_order = sorted(sweep_clocks(SUPPORTED_MHZ, 8), reverse=True)
    places = [in_order.index(clock) for clock in sweep_clocks(SUPPORTED_MHZ, 8)]
    assert abs(np.corrcoef(places, range(8))[0, 1]) < 0.3


@pytest.mark.parametrize("iterations_of_step", [2, 4])
def test_the_clock_follows_from_the_iteration_alone(iterations_of_step: int) -> None:
    """Whatever a rank has measured: all hold the same step, over and over until an order ends it."""
    sweep = sweep_of((1410, 990, 1200), iterations_of_step=iterations_of_step)
    expected = [clock for clock in (1410, 990, 1200) for _ in range(iterations_of_step)] * 2
    assert [sweep.clock_at(i) for i in range(len(expected))] == expected
    training = SyntheticTraining(sweep)
    training.run()
    assert sweep.is_complete
    assert [sweep.clock_at(i) for i in range(len(expected))] == expected


def test_the_sweep_finds_the_truth() -> None:
    """Three iterations at each clock; times within 2 %, energies within 5 %."""
    training = SyntheticTraining(sweep_of(sweep_clocks(SUPPORTED_MHZ, 8), iterations_of_step=4))
    training.run()
    assert len(training.asked) == 8 * 4
    assert training.sweep.notes == ()
    for c in training.sweep.measurements().clocks:
        for i in c.instructions:
            stretch = 1 if i.type == FORWARD else 2
            truth_j = stretch * time_s(c.clock_mhz) * power_w(c.clock_mhz) * (1 if i.type == FORWARD else 1.05)
            assert i.time_s == pytest.approx(stretch * time_s(c.clock_mhz), rel=0.02)
            assert i.energy_j == pytest.approx(truth_j, rel=0.05)
            assert i.samples == 8 * c.num_iterations


def test_the_first_iteration_after_a_change_is_discarded() -> None:
    """It is not among those that count."""
    training = SyntheticTraining(sweep_of((1410, 1200)))
    training.run()
    assert training.asked == [1410] * 3 + [1200] * 3
    assert measured(training.sweep) == [(1410, 2), (1200, 2)]


def test_what_begins_too_soon_after_a_change_is_discarded_too() -> None:
    """An iteration may be shorter than the time until a clock is in force."""
    sweep = sweep_of((1410,), iterations_of_step=9)
    pieces = [(FORWARD, 0.04, 300.0)]
    for number in range(6):
        (iteration,) = lay_out([pieces], 100 + 0.04 * number)
        sweep.add_iteration(replace(iteration, number=number), 1410, [])
    assert len(sweep._iterations[1410]) == 3, "those that begin 0.12, 0.16 and 0.20 s after the change"


def test_after_something_else_the_clock_comes_late_again() -> None:
    """An evaluation ran at the driver's clock: the next iteration is discarded."""
    sweep = sweep_of((1410,), iterations_of_step=6)
    training = SyntheticTraining(sweep)
    for _ in range(3):
        training.iterate(1410)
    training.asked.append(0)  # its number is missing among those that are handed in
    for _ in range(3):
        training.iterate(1410)
    assert measured(sweep) == [(1410, 4)]
    assert not sweep.is_complete


def test_heat_that_limits_the_clock_is_recorded_at_the_clock_in_force() -> None:
    """Nothing is filed under a clock that was not held, and the first that was not is named."""
    sweep = sweep_of((1410, 1200, 990, 800), stage=2)
    training = SyntheticTraining(sweep, lambda asked: (min(asked, 990), ThrottleReason.THERMAL))
    training.run()
    assert len(training.asked) == 12, "no second round for clocks that cannot be held"
    assert measured(sweep) == [(990, 6), (800, 2)]
    assert sweep.notes == ("stage 2: 1410 MHz was asked for, but 990 MHz was in force",)


def test_heat_in_the_middle_of_an_iteration_costs_that_iteration() -> None:
    """Readings at different clocks belong to none of them."""
    sweep = sweep_of((1410,))
    pieces = stage_in_1f1b()
    for number in range(3):
        (iteration,) = lay_out([pieces], 100.0 * number)
        readings = read_counter([pieces], begin_s=100.0 * number, clock_mhz=1410)
        half = len(readings) // 2
        hot = [replace(r, clock_mhz=900, throttle=ThrottleReason.THERMAL) for r in readings[half:]]
        sweep.add_iteration(replace(iteration, number=number), 1410, readings[:half] + hot)
    assert sweep.measurements().clocks == ()
    assert not sweep.is_complete


def test_the_power_limit_belongs_to_the_clock_asked_for() -> None:
    """Asking for a capped clock gives the same again, so it is measured under its own name."""
    sweep = sweep_of((1410, 900))
    SyntheticTraining(sweep, lambda asked: (min(asked, 1300), ThrottleReason.POWER_CAP)).run()
    assert measured(sweep) == [(1410, 2), (900, 2)]


def test_a_clock_that_was_missed_has_a_second_chance() -> None:
    """The order came late, or evaluations took its iterations: it comes again, and counts with what was seen before."""
    sweep = sweep_of((1410, 1200, 990))
    training = SyntheticTraining(sweep)
    for _ in range(3):
        training.iterate(1410)
    for _ in range(3):
        training.asked.append(0)
    for _ in range(3):
        training.iterate(990)
    assert not sweep.is_complete
    training.run()
    assert training.asked[9:] == [1410] * 3 + [1200] * 3
    assert measured(sweep) == [(1410, 4), (1200, 2), (990, 2)]
    assert sweep.notes == ()


def test_a_counter_that_stops_ends_the_sweep_after_two_rounds() -> None:
    """And the clocks that are not known are named."""
    sweep = sweep_of((1410, 990, 1200))
    training = SyntheticTraining(sweep)
    for number in range(18):
        assert not sweep.is_complete
        training.iterate(sweep.clock_at(number), counter=number < 3)
    assert sweep.is_complete
    assert measured(sweep)[0][0] == 1410
    assert len(measured(sweep)) == 1
    assert sweep.notes == ("stage 0: 1200, 990 MHz could not be measured",)


def test_an_iteration_without_instructions_or_of_something_else_is_ignored() -> None:
    """Partial and evaluation iterations leave no trace in the measurements."""
    sweep = sweep_of((1410, 990))
    sweep.add_iteration(Iteration(0, 1.0, 2.0, ()), 1410, [])
    sweep.add_iteration(Iteration(1, 2.0, 3.0, ()), None, [])
    assert sweep.measurements().clocks == ()
    assert sweep.progress().iterations_done == 0


def test_progress_counts_down_to_the_end() -> None:
    """What is left never grows while all goes as planned, and the end is said."""
    training = SyntheticTraining(sweep_of((1410, 990, 1200)))
    left, said = [], []
    while not training.sweep.is_complete:
        left.append(training.sweep.progress().iterations_left)
        said.append(str(training.sweep.progress()))
        training.run(len(training.asked) + 1)
    assert left == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert said[0] == "profiling clock 1 of 3 (1410 MHz), about 9 iterations left"
    assert said[3] == "profiling clock 2 of 3 (990 MHz), about 6 iterations left"
    assert str(training.sweep.progress()) == "profiled 3 clocks in 9 iterations"


def test_a_step_that_measures_nothing_is_refused() -> None:
    """One sentence that names the setting."""
    with pytest.raises(InputError, match="iterations_of_step is 1; it must be 2 or more: one is discarded"):
        sweep_of((1410,), iterations_of_step=1)


def test_a_pipeline_of_processes_profiles_itself(tmp_path: Path) -> None:
    """Two stages on simulated GPUs behind the real `pynvml`: times within 3 %, energies within 5 %, waiting found."""
    with simulated_machine(tmp_path, noise={"time": 0.01, "energy": 0.01}, energy_counter_period_s=0.05) as node:
        run = PipelineRun(node.folder, 2, 6, iterations_of_step=5, clocks_mhz=(1000, 700), times_of_gpu=True)
        results = profile_pipeline(run)
        for result in results:
            assert [c.clock_mhz for c in result.measurements.clocks] == [1000, 700]
            for c in result.measurements.clocks:
                assert abs(c.waiting.power_w - 50) < 5 * c.waiting.standard_error_w
                for i in c.instructions:
                    truth_s = duration_s(i.type.kind.value, c.clock_mhz)
                    assert i.time_s == pytest.approx(truth_s, rel=0.03)
                    assert i.energy_j == pytest.approx(truth_s * (100 + c.clock_mhz / 5), rel=0.05)
    assert merge(SweepRows.of(result.measurements for result in results)).blocking_power_w == pytest.approx(
        (50, 50), rel=0.25
    )
