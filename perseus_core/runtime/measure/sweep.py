"""The sweep: which clock to hold in which iteration, and what the iterations at each clock tell.

A plain state machine of one rank. It has no thread and touches no GPU: the session holds the clocks it asks for and
hands in what the iterations and the energy counter said.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from perseus_core.errors import InputError
from perseus_core.gpu.device import ThrottleReason
from perseus_core.runtime.measure.energy import ChunkKind, Iteration, solve_powers
from perseus_core.runtime.measure.sampler import CounterReading
from perseus_core.runtime.measure.stage_measurements import (
    ClockMeasurements,
    InstructionMeasurement,
    StageMeasurements,
    blocking_line,
)

# Least effective energy was found at 0.48 to 0.63 of the highest clock on the published and the modelled profiles.
_LOWEST_USEFUL_SHARE = 0.45
# A clock read back so near the one asked for, relative, is that one.
_CLOCK_TOLERANCE = 0.02
# So many readings of an iteration may show another clock: clock and throttle reasons are not read at the same moment.
_TOLERATED_SHARE = 0.1


@dataclass(frozen=True)
class SweepSettings:
    """How thoroughly to measure.

    Attributes:
        num_clocks: clocks of the sweep.
        discarded_iterations: iterations left out after each change of clock.
        min_iterations: measured iterations at each clock at least.
        max_iterations: and at most, also counting those that did not run at the clock asked for.
        relative_error: a clock is measured well enough when energies have this relative standard error.
        rise_margin: the sweep ends when all effective energies have risen so far above their minimum, relative.

    Raises:
        InputError: if a number cannot be.
    """

    num_clocks: int = 8
    discarded_iterations: int = 1
    min_iterations: int = 2
    max_iterations: int = 8
    relative_error: float = 0.015
    rise_margin: float = 0.02

    def __post_init__(self) -> None:
        for name, lowest in (("num_clocks", 1), ("discarded_iterations", 0), ("min_iterations", 1)):
            if getattr(self, name) < lowest:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {lowest} or more")
        if self.max_iterations < self.min_iterations:
            raise InputError(f"max_iterations is {self.max_iterations}, below min_iterations {self.min_iterations}")
        for name in ("relative_error", "rise_margin"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1, as 0.02 for 2 %")


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        clock_mhz: the clock to hold now, None when complete.
        clocks_done: clocks that need no more iterations.
        num_clocks: clocks of the sweep.
        iterations_done: iterations handed in so far.
        iterations_left: about how many more, at most.
    """

    clock_mhz: int | None
    clocks_done: int
    num_clocks: int
    iterations_done: int
    iterations_left: int

    def __str__(self) -> str:
        if self.clock_mhz is None:
            return f"profiled {self.clocks_done} clocks in {self.iterations_done} iterations"
        return (
            f"profiling clock {self.clocks_done + 1} of {self.num_clocks} ({self.clock_mhz} MHz), "
            f"about {self.iterations_left} iterations left"
        )


def sweep_clocks(supported_clocks_mhz: Sequence[int], num_clocks: int) -> tuple[int, ...]:
    """Evenly spread clocks of the useful range, highest first: from the highest supported one to 45 % of it."""
    supported = sorted(set(supported_clocks_mhz), reverse=True)
    lowest = max(supported[-1], _LOWEST_USEFUL_SHARE * supported[0])
    steps = max(1, num_clocks - 1)
    wanted = [supported[0] + (lowest - supported[0]) * i / steps for i in range(num_clocks)]
    return tuple(sorted({min(supported, key=lambda clock: abs(clock - w)) for w in wanted}, reverse=True))


class Sweep:
    """Measures one rank's stage at one clock after the other, from the highest down.

    In each iteration: hold `next_clock()`; when what happened in it is known, which may be some iterations later,
    `add_iteration`. The iterations that ran meanwhile at the same clock count as well.
    """

    def __init__(
        self,
        stage: int,
        supported_clocks_mhz: Sequence[int],
        settings: SweepSettings | None = None,
        *,
        clocks_mhz: Sequence[int] | None = None,
    ) -> None:
        """Plans the sweep.

        Args:
            stage: the rank's stage.
            supported_clocks_mhz: of its GPU.
            settings: how thorough; the defaults by default.
            clocks_mhz: the clocks to measure, by default `sweep_clocks`.
        """
        self._stage = stage
        self._settings = settings or SweepSettings()
        self._supported = tuple(sorted(supported_clocks_mhz, reverse=True))
        self._clocks = (
            sweep_clocks(self._supported, self._settings.num_clocks)
            if clocks_mhz is None
            else tuple(sorted(set(clocks_mhz), reverse=True))
        )
        self._position = 0
        self._iterations: dict[int, list[Iteration]] = {}
        self._readings: list[CounterReading] = []
        self._measured: dict[int, ClockMeasurements | None] = {}
        self._measured_from: dict[int, tuple[int, int, int]] = {}
        self._last_asked_mhz: int | None = None
        self._since_change = 0
        self._tries = 0
        self._num_added = 0
        self._notes: list[str] = []

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to measure."""
        return self._position >= len(self._clocks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as asked, a sentence each, for the log."""
        return tuple(self._notes)

    def next_clock(self) -> int | None:
        """The clock to hold in the next iteration [MHz], None when the sweep is complete."""
        return None if self.is_complete else self._clocks[self._position]

    def add_iteration(self, iteration: Iteration, asked_mhz: int | None, readings: Sequence[CounterReading]) -> None:
        """Hands in one iteration.

        Args:
            iteration: what happened in it; iterations come in order, skipped ones are not handed in.
            asked_mhz: the clock that was held from its beginning to its end; None where it was another thing.
            readings: of the energy counter, all that came since the last call; they may reach beyond the iteration.
        """
        self._num_added += 1
        self._readings += readings
        self._since_change = self._since_change + 1 if asked_mhz == self._last_asked_mhz else 1
        self._last_asked_mhz = asked_mhz
        if asked_mhz is None or not iteration.spans or self._since_change <= self._settings.discarded_iterations:
            return
        in_force_mhz = self._clock_in_force(iteration, asked_mhz)
        if in_force_mhz is not None:
            self._iterations.setdefault(in_force_mhz, []).append(iteration)
        if asked_mhz == self.next_clock():
            self._tries += 1
            self._go_on_if_done(asked_mhz)

    def measurements(self) -> StageMeasurements:
        """What was measured so far, also at clocks that were in force without being asked for."""
        found = (self._measure(clock) for clock in sorted(self._iterations, reverse=True))
        return StageMeasurements(self._stage, tuple(c for c in found if c is not None))

    def progress(self) -> Progress:
        """How far it is."""
        each = self._settings.discarded_iterations + self._settings.min_iterations
        left = len(self._clocks) - self._position
        return Progress(
            self.next_clock(),
            self._position,
            len(self._clocks),
            self._num_added,
            max(left * each - self._tries, min(left, 1)),
        )

    def _clock_in_force(self, iteration: Iteration, asked_mhz: int) -> int | None:
        """The clock an iteration really ran at, None where it was not the same throughout.

        A clock below the one asked for because of the power limit is what asking for this clock gives, now and later:
        it is not told apart. Heat and other programs are.
        """
        seen = [
            reading
            for reading in self._readings_between(iteration.begin_s, iteration.end_s)
            if reading.clock_mhz is not None
        ]
        allowed = int(_TOLERATED_SHARE * len(seen))
        if sum(not _is_as_asked(reading, asked_mhz) for reading in seen) <= allowed:
            return asked_mhz
        clocks = sorted(reading.clock_mhz for reading in seen if reading.clock_mhz is not None)
        other_mhz = clocks[len(clocks) // 2]
        if sum(not _is_near(clock, other_mhz) for clock in clocks) <= allowed:
            return min(self._supported, key=lambda clock: abs(clock - other_mhz))
        return None

    def _go_on_if_done(self, clock_mhz: int) -> None:
        num_iterations = len(self._iterations.get(clock_mhz, []))
        if num_iterations >= self._settings.min_iterations and self._is_measured_well(clock_mhz):
            self._go_to(self._position + 1)
        elif self._tries >= self._settings.max_iterations:
            next_position = self._position + 1
            if num_iterations < self._settings.min_iterations:
                next_position = self._note_override(clock_mhz)
            self._go_to(next_position)

    def _is_measured_well(self, clock_mhz: int) -> bool:
        measured = self._measure(clock_mhz)
        return (
            measured is not None
            and max(i.relative_error for i in measured.instructions) <= self._settings.relative_error
        )

    def _note_override(self, asked_mhz: int) -> int:
        """Says that a clock was not held; returns the position of the next one that could be."""
        held_instead = [clock for clock in self._iterations if clock < asked_mhz]
        if not held_instead:
            self._notes.append(f"stage {self._stage}: {asked_mhz} MHz was asked for, but other clocks were in force")
            return self._position + 1
        highest = max(held_instead)
        self._notes.append(f"stage {self._stage}: {asked_mhz} MHz was asked for, but {highest} MHz was in force")
        return next((p for p, clock in enumerate(self._clocks) if clock <= highest), len(self._clocks))

    def _go_to(self, position: int) -> None:
        self._tries = 0
        self._position = len(self._clocks) if self._has_risen() else position

    def _has_risen(self) -> bool:
        """Whether every instruction's effective energy at the lowest clock is well above its minimum."""
        clocks = self.measurements().clocks
        if len(clocks) < 3:
            return False
        blocking = blocking_line(clocks)
        effective: dict[ChunkKind, list[tuple[float, float]]] = {}
        for c in clocks:
            for i in c.instructions:
                effective_j = i.energy_j - blocking.at(c.clock_mhz) * i.time_s
                effective.setdefault(i.type, []).append((effective_j, 2 * i.relative_error * i.energy_j))
        return all(
            of_type[-1][0] - of_type[-1][1] > (1 + self._settings.rise_margin) * min(e for e, _ in of_type)
            for of_type in effective.values()
        )

    def _measure(self, clock_mhz: int) -> ClockMeasurements | None:
        """What the iterations at a clock tell; solved anew only when more has become known of them."""
        iterations = self._iterations[clock_mhz]
        first, last = self._places_between(iterations[0].begin_s, iterations[-1].end_s)
        known = (len(iterations), first, last)
        if self._measured_from.get(clock_mhz) != known:
            self._measured_from[clock_mhz] = known
            self._measured[clock_mhz] = _measure(clock_mhz, iterations, self._readings[first:last])
        return self._measured[clock_mhz]

    def _readings_between(self, begin_s: float, end_s: float) -> list[CounterReading]:
        first, last = self._places_between(begin_s, end_s)
        return self._readings[first:last]

    def _places_between(self, begin_s: float, end_s: float) -> tuple[int, int]:
        first = bisect_left(self._readings, begin_s, key=_time_s)
        return first, bisect_right(self._readings, end_s, lo=first, key=_time_s)


def _measure(
    clock_mhz: int, iterations: Sequence[Iteration], readings: Sequence[CounterReading]
) -> ClockMeasurements | None:
    powers = solve_powers(iterations, readings)
    if powers is None:
        return None
    instructions = []
    for instruction_type, power in powers.instructions.items():
        durations_s = powers.durations_s[instruction_type]
        samples = len(durations_s)
        mean_s = float(durations_s.sum()) / samples
        variance_s2 = float(((durations_s - mean_s) ** 2).sum()) / max(1, samples - 1)
        instructions.append(InstructionMeasurement(instruction_type, mean_s, math.sqrt(variance_s2), samples, power))
    return ClockMeasurements(
        clock_mhz,
        tuple(instructions),
        powers.waiting,
        powers.outside,
        sum(i.end_s - i.spans[-1].end_s for i in iterations) / len(iterations),
        len(iterations),
    )


def _is_as_asked(reading: CounterReading, asked_mhz: int) -> bool:
    assert reading.clock_mhz is not None
    if _is_near(reading.clock_mhz, asked_mhz):
        return True
    power_capped = bool(reading.throttle & ThrottleReason.POWER_CAP) and not reading.throttle & ThrottleReason.THERMAL
    return reading.clock_mhz < asked_mhz and power_capped


def _is_near(clock_mhz: int, other_mhz: int) -> bool:
    return abs(clock_mhz - other_mhz) <= _CLOCK_TOLERANCE * other_mhz


def _time_s(reading: CounterReading) -> float:
    return reading.time_s
