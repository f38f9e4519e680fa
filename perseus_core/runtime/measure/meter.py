"""What one rank measures of itself: times from events, energy from the counter, the sweep, durations under a plan."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_high

import numpy as np

from perseus_core.gpu.device import Device, ThrottleReason
from perseus_core.planning.schedule import InstructionType, Kind
from perseus_core.runtime.measure.recorder import MeasuredIteration, Recorder, Step
from perseus_core.runtime.measure.sampler import CounterReading, EnergySampler
from perseus_core.runtime.measure.stage_measurements import StageMeasurements
from perseus_core.runtime.measure.stretch import Stretch
from perseus_core.runtime.measure.sweep import Progress, Sweep
from perseus_core.runtime.side_threads import SideThreads

# Readings this far before an iteration are still needed to interpolate its beginning.
_READINGS_BEFORE_S = 2.0
_REMEMBERED_ITERATIONS = 16
_ENOUGH_UNLOCKED = 2
_REMEMBERED_READINGS = 256
# At the power limit for so much more of an iteration, as a share, than without us: something else is wrong.
_MORE_CAPPED = 0.3


@dataclass(frozen=True)
class IterationTiming:
    """How long an iteration took on this rank.

    Attributes:
        iteration: which.
        num_microbatches: 0 if it was an evaluation or ran in an order of its own.
        span_s: from its begin to its end.
        seen_s: sum of its instructions' durations.
        expected_s: what that sum should be; 0 if nothing is expected.
        throttled: heat, a power brake, or the power limit more than usual, held the clock down.
    """

    iteration: int
    num_microbatches: int
    span_s: float
    seen_s: float
    expected_s: float
    throttled: bool


class Meter:
    """Turns executed iterations into times and energies, and into measurements for the planner.

    Attributes:
        recorder: takes the iterations that were given to the GPU.
        traced: what the last whole iteration executed.
    """

    def __init__(self, stage: int, device: Device | None, threads: SideThreads, counter_window_s: float = 0.0) -> None:
        """Measures energy only where there is a GPU; its counter measures so much of its period (0: all of it)."""
        self._counter_window_s = counter_window_s
        self.recorder = Recorder()
        self.traced: tuple[Step, ...] = ()
        self._stage = stage
        self._sampler = None if device is None else EnergySampler(device, threads=threads)
        self._sweep: Sweep | None = None
        self._readings_handed_to_s = 0.0
        self._timings: deque[IterationTiming] = deque()
        self._uncounted: deque[MeasuredIteration] = deque()
        self._energies: deque[tuple[int, float]] = deque()
        self._plan = 0
        self._under_plan: deque[MeasuredIteration] = deque(maxlen=_REMEMBERED_ITERATIONS)
        # Microbatches and pipeline time of iterations at unlocked clocks, the last two stretches of them.
        self._unlocked: deque[deque[tuple[int, float]]] = deque([_remembered()], maxlen=2)
        self._was_unlocked = True
        self._unlocked_mhz: deque[int] = deque(maxlen=_REMEMBERED_READINGS)
        self._usually_capped = 0.0  # share of an unlocked iteration at the power limit

    def start(self) -> None:
        """Starts to sample the energy counter."""
        if self._sampler is not None:
            self._sampler.start()

    def stop(self, limit_s: float = 0.5) -> None:
        """Stops sampling, and waits no longer than `limit_s` for the sampler's end."""
        if self._sampler is not None:
            self._sampler.stop(limit_s)

    # The sweep

    def start_sweep(
        self, supported_clocks_mhz: Sequence[int], clocks_mhz: Sequence[int], iterations_of_step: int
    ) -> None:
        """Begins to measure the stage at one clock after the other, see `Sweep`."""
        self._sweep = Sweep(self._stage, supported_clocks_mhz, clocks_mhz, iterations_of_step, self._counter_window_s)

    def sweep_clock_mhz(self, iterations_since_begin: int) -> int | None:
        """The clock to hold in an iteration of the sweep."""
        return None if self._sweep is None else self._sweep.clock_at(iterations_since_begin)

    @property
    def has_swept(self) -> bool:
        """Whether all clocks are measured."""
        return self._sweep is not None and self._sweep.is_complete

    @property
    def sweep_progress(self) -> Progress | None:
        """How far the sweep is."""
        return None if self._sweep is None else self._sweep.progress()

    @property
    def sweep_notes(self) -> tuple[str, ...]:
        """What the sweep could not do."""
        return () if self._sweep is None else self._sweep.notes

    def no_measurements(self) -> StageMeasurements:
        """What a rank sends that has not swept anew."""
        return StageMeasurements(self._stage, ())

    def measurements(self) -> StageMeasurements:
        """What the sweep has found; nothing without one."""
        return StageMeasurements(self._stage, ()) if self._sweep is None else self._sweep.measurements()

    # Under a plan

    def stretches(self, num_iterations: int) -> tuple[Stretch, ...]:
        """How much longer than planned instructions took in the last iterations under the plan that runs."""
        factors: dict[tuple[int, Kind, int], list[float]] = {}
        iterations = list(self._under_plan)[-num_iterations:]
        held_down = any(self._is_throttled(measured) for measured in iterations)
        for measured in iterations:
            expected = measured.record.expectation
            for span, clock_mhz, planned_s in zip(
                measured.iteration.spans, expected.clocks_mhz, expected.durations_s, strict=True
            ):
                of_clock = factors.setdefault((span.type.chunk, span.type.kind, clock_mhz), [])
                of_clock.append((span.end_s - span.begin_s) / planned_s)
        return tuple(
            Stretch(InstructionType(self._stage, chunk, kind), clock_mhz, median(of_clock), len(of_clock), held_down)
            for (chunk, kind, clock_mhz), of_clock in factors.items()
        )

    # At unlocked clocks

    def unlocked_pipeline_time_s(self, num_microbatches: int) -> float:
        """Median time from the first instruction's begin to the last one's end, of the newest; 0 if none was seen."""
        for stretch in reversed(self._unlocked):
            times_s = [time_s for microbatches, time_s in stretch if microbatches == num_microbatches]
            if len(times_s) >= _ENOUGH_UNLOCKED:
                return median(times_s)
        return 0.0

    @property
    def unlocked_mhz(self) -> int:
        """The clock that the GPU held in most of its unlocked iterations; 0 while it was not read."""
        return median_high(self._unlocked_mhz) if self._unlocked_mhz else 0

    # Every iteration

    def take_in(self) -> None:
        """Reads the times of all iterations that have been finished since the last call."""
        for measured in self.recorder.measured():
            record = measured.record
            comparable = record.num_microbatches > 0 and record.in_order
            if comparable:
                self.traced = tuple(record.steps)
            self._timings.append(
                IterationTiming(
                    record.number,
                    record.num_microbatches if comparable else 0,
                    measured.span_s,
                    measured.seen_s,
                    measured.expected_s if comparable else 0.0,
                    self._is_throttled(measured),
                )
            )
            self._uncounted.append(measured)
            if comparable:
                self._remember(measured)
                self._feed_sweep(measured)
        while self._uncounted and self._count(self._uncounted[0]):
            self._uncounted.popleft()

    def new_timings(self) -> list[IterationTiming]:
        """Of the iterations whose times have become known since the last call, in order."""
        timings = list(self._timings)
        self._timings.clear()
        return timings

    def new_energies_j(self) -> list[tuple[int, float]]:
        """Iteration and energy of those whose energy has become known since; 0 where it could not be read."""
        energies = list(self._energies)
        self._energies.clear()
        return energies

    def _remember(self, measured: MeasuredIteration) -> None:
        expectation, spans = measured.record.expectation, measured.iteration.spans
        was_unlocked, self._was_unlocked = self._was_unlocked, not expectation.plan and expectation.held_mhz is None
        if self._was_unlocked and not was_unlocked:
            self._unlocked.append(_remembered())  # and clocks may still change in this iteration
        elif self._was_unlocked and spans:
            self._unlocked[-1].append((measured.record.num_microbatches, spans[-1].end_s - spans[0].begin_s))
        if not expectation.plan:
            return
        if expectation.plan != self._plan:
            # In the first iteration under a plan its clocks may come late.
            self._plan = expectation.plan
            self._under_plan.clear()
        else:
            self._under_plan.append(measured)

    def _feed_sweep(self, measured: MeasuredIteration) -> None:
        if self._sweep is None or self._sweep.is_complete:
            return
        assert self._sampler is not None, "only a rank that can measure sweeps"
        readings = self._sampler.between(self._readings_handed_to_s, np.inf)
        if readings:
            self._readings_handed_to_s = float(np.nextafter(readings[-1].time_s, np.inf))
        self._sweep.add_iteration(measured.iteration, measured.record.expectation.held_mhz, readings)

    def _is_throttled(self, measured: MeasuredIteration) -> bool:
        """Whether heat, a power brake, or the power limit more than usual, held the clock down.

        A GPU that works as hard as it can is at its power limit: an H100 at full load always is.
        """
        if self._sampler is None or not measured.iteration.on_host_time:
            return False
        readings = self._sampler.between(measured.iteration.begin_s, measured.iteration.end_s)
        if any(reason.is_trouble for reason in {reading.throttle for reading in readings}):  # mostly one
            return True
        capped = sum(ThrottleReason.POWER_CAP in reading.throttle for reading in readings) / max(1, len(readings))
        expectation = measured.record.expectation
        if not expectation.plan and expectation.held_mhz is None:
            self._usually_capped = max(self._usually_capped, capped)
            self._unlocked_mhz += [reading.clock_mhz for reading in readings if reading.clock_mhz is not None]
            return False
        return capped > self._usually_capped + _MORE_CAPPED

    def _count(self, measured: MeasuredIteration) -> bool:
        """Finds the energy of an iteration once the counter has moved beyond its end; returns whether it is settled."""
        iteration = measured.iteration
        energy_j = 0.0
        if self._sampler is not None:
            readings = self._sampler.between(iteration.begin_s - _READINGS_BEFORE_S, np.inf)
            if self._sampler.failure is None and not (readings and readings[-1].time_s >= iteration.end_s):
                return len(self._uncounted) > 8  # a counter that does not move
            if iteration.on_host_time:
                energy_j = _energy_j(readings, iteration.begin_s, iteration.end_s)
        self._energies.append((iteration.number, energy_j))
        return True


def _remembered() -> deque[tuple[int, float]]:
    return deque(maxlen=_REMEMBERED_ITERATIONS)


def _energy_j(readings: Sequence[CounterReading], begin_s: float, end_s: float) -> float:
    """Energy between two moments, interpolated; 0 where the readings do not reach so far."""
    if len(readings) < 2 or readings[0].time_s > begin_s or readings[-1].time_s < end_s:
        return 0.0
    return max(0.0, _counter_at(readings, end_s) - _counter_at(readings, begin_s))


def _counter_at(readings: Sequence[CounterReading], time_s: float) -> float:
    """The counter at a moment between the first and the last reading, interpolated."""
    place = min(bisect_right(readings, time_s, key=lambda reading: reading.time_s), len(readings) - 1)
    before, after = readings[place - 1], readings[place]
    share = (time_s - before.time_s) / (after.time_s - before.time_s)
    return before.energy_j + share * (after.energy_j - before.energy_j)
