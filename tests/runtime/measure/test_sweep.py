"""The sweep as a state machine on synthetic iterations, and in vivo on simulated GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.gpu.device import ThrottleReason
from perseus_core.runtime.measure.energy import Iteration
from perseus_core.runtime.measure.stage_measurements import SweepRows, merge
from perseus_core.runtime.measure.sweep import Sweep, SweepSettings, sweep_clocks

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
            clock = self.sweep.next_clock()
            assert clock is not None
            self.iterate(clock)

    def iterate(self, asked_mhz: int) -> None:
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
        self.sweep.add_iteration(iteration, asked_mhz, readings)


def runs(asked: Sequence[int]) -> list[int]:
    return [clock for i, clock in enumerate(asked) if i == 0 or asked[i - 1] != clock]


def test_clocks_are_even_over_the_useful_range_and_supported() -> None:
    """From the highest supported clock to 45 % of it."""
    clocks = sweep_clocks(SUPPORTED_MHZ, 8)
    assert len(clocks) == 8
    assert clocks[0] == 1410
    assert clocks[-1] == pytest.approx(0.45 * 1410, abs=8)
    assert set(clocks) <= set(SUPPORTED_MHZ)
    assert np.ptp(np.diff(clocks)) <= 15
    assert sweep_clocks((1000, 900), 8) == (1000, 900)


def test_the_sweep_goes_down_from_the_top_and_finds_the_truth() -> None:
    """Few iterations at each clock; times within 3 %, energies within 5 %."""
    training = SyntheticTraining(Sweep(0, SUPPORTED_MHZ))
    training.run()
    assert runs(training.asked) == sorted(set(training.asked), reverse=True)
    assert len(training.asked) <= 4 * len(set(training.asked))
    for c in training.sweep.measurements().clocks:
        for i in c.instructions:
            stretch = 1 if i.type == FORWARD else 2
            truth_j = stretch * time_s(c.clock_mhz) * power_w(c.clock_mhz) * (1 if i.type == FORWARD else 1.05)
            assert i.time_s == pytest.approx(stretch * time_s(c.clock_mhz), rel=0.03)
            assert i.energy_j == pytest.approx(truth_j, rel=0.05)
            assert i.samples == 8 * c.num_iterations


def test_the_sweep_ends_when_effective_energy_has_risen() -> None:
    """It goes a little below the clock of least effective energy, and not down to the end."""
    clocks = range(1410, 300, -100)
    training = SyntheticTraining(Sweep(0, SUPPORTED_MHZ, clocks_mhz=clocks))
    training.run()
    best = min(clocks, key=lambda clock: (power_w(clock) - waiting_w(clock)) * time_s(clock))
    assert best - 300 <= min(training.asked) < best
    assert training.sweep.is_complete


def test_the_first_iteration_after_a_change_is_discarded() -> None:
    """It is not among the executions that count."""
    sweep = Sweep(0, SUPPORTED_MHZ, SweepSettings(discarded_iterations=1, min_iterations=2), clocks_mhz=[1410, 1200])
    training = SyntheticTraining(sweep)
    training.run()
    for c in sweep.measurements().clocks:
        assert c.num_iterations == training.asked.count(c.clock_mhz) - 1


def test_more_iterations_are_asked_for_while_errors_are_large() -> None:
    """A limit that cannot be met is given up after the most iterations allowed."""
    settings = SweepSettings(relative_error=1e-6, min_iterations=2, max_iterations=4)
    training = SyntheticTraining(Sweep(0, SUPPORTED_MHZ, settings, clocks_mhz=[1410, 1200]))
    training.run()
    assert training.asked == [1410] * 5 + [1200] * 5


def test_heat_that_limits_the_clock_is_recorded_at_the_clock_in_force() -> None:
    """Nothing is filed under a clock that was not held; the clocks above the limit are passed over, with a note."""
    sweep = Sweep(2, SUPPORTED_MHZ)
    training = SyntheticTraining(sweep, lambda asked: (min(asked, 990), ThrottleReason.THERMAL))
    training.run()
    assert {c.clock_mhz for c in sweep.measurements().clocks} == {990} | {c for c in training.asked if c <= 990}
    assert runs(training.asked)[1] <= 990
    assert sweep.notes == ("stage 2: 1410 MHz was asked for, but 990 MHz was in force",)


def test_heat_in_the_middle_of_an_iteration_costs_that_iteration() -> None:
    """Readings at different clocks belong to none of them."""
    sweep = Sweep(0, SUPPORTED_MHZ, SweepSettings(discarded_iterations=0, min_iterations=1), clocks_mhz=[1410])
    pieces = stage_in_1f1b()
    (iteration,) = lay_out([pieces])
    readings = read_counter([pieces], clock_mhz=1410)
    half = len(readings) // 2
    hot = [replace(r, clock_mhz=900, throttle=ThrottleReason.THERMAL) for r in readings[half:]]
    sweep.add_iteration(iteration, 1410, readings[:half] + hot)
    assert sweep.measurements().clocks == ()
    assert not sweep.is_complete


def test_the_power_limit_belongs_to_the_clock_asked_for() -> None:
    """Asking for a capped clock gives the same again, so it is measured under its own name."""
    sweep = Sweep(0, SUPPORTED_MHZ, clocks_mhz=[1410, 900])
    SyntheticTraining(sweep, lambda asked: (min(asked, 1300), ThrottleReason.POWER_CAP)).run()
    assert [c.clock_mhz for c in sweep.measurements().clocks] == [1410, 900]


def test_iterations_known_late_still_count() -> None:
    """Three iterations run before the first is handed in: those of the old clock count for it, none for the new one."""
    sweep = Sweep(0, SUPPORTED_MHZ, SweepSettings(relative_error=0.05), clocks_mhz=[1410, 1200])
    training = SyntheticTraining(sweep)
    for clock in [1410] * 5 + [1200] * 3:
        training.iterate(clock)
    assert [(c.clock_mhz, c.num_iterations) for c in sweep.measurements().clocks] == [(1410, 4), (1200, 2)]
    assert sweep.is_complete


def test_an_iteration_without_instructions_or_of_something_else_is_ignored() -> None:
    """Partial and evaluation iterations leave no trace in the measurements."""
    sweep = Sweep(0, SUPPORTED_MHZ)
    sweep.add_iteration(Iteration(0, 1.0, 2.0, ()), 1410, [])
    sweep.add_iteration(Iteration(1, 2.0, 3.0, ()), None, [])
    assert sweep.measurements().clocks == ()
    assert sweep.next_clock() == 1410


def test_progress_counts_down_to_the_end() -> None:
    """What is left never grows while all goes as planned, and the end is said."""
    training = SyntheticTraining(
        Sweep(0, SUPPORTED_MHZ, SweepSettings(relative_error=0.5), clocks_mhz=[1410, 1200, 990])
    )
    left = []
    while not training.sweep.is_complete:
        left.append(training.sweep.progress().iterations_left)
        training.run(len(training.asked) + 1)
    assert left == sorted(left, reverse=True)
    assert "clock 1 of 3 (1410 MHz)" in str(Sweep(0, SUPPORTED_MHZ, clocks_mhz=[1410, 1200, 990]).progress())
    assert str(training.sweep.progress()) == "profiled 3 clocks in 9 iterations"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_clocks": 0}, "num_clocks"),
        ({"max_iterations": 1}, "max_iterations"),
        ({"rise_margin": 2.0}, "rise_margin"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, float], named: str) -> None:
    """One sentence that names the setting."""
    with pytest.raises(InputError, match=named):
        SweepSettings(**changes)  # type: ignore[arg-type]


def test_a_pipeline_of_processes_profiles_itself(tmp_path: Path) -> None:
    """Two stages on simulated GPUs behind the real `pynvml`: times within 3 %, energies within 5 %, waiting found."""
    with simulated_machine(tmp_path, noise={"time": 0.01, "energy": 0.01}, energy_counter_period_s=0.05) as node:
        settings = SweepSettings(relative_error=0.01, max_iterations=5)
        run = PipelineRun(node.folder, 2, 6, settings, clocks_mhz=(1000, 700), times_of_gpu=True)
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
