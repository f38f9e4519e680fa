"""The sweep: which clock to hold in which iteration, and what the iterations at each clock tell.

All ranks of a job hold the same step of it in the same iteration: the clock follows from the iteration's number alone,
so nobody is measured while his neighbours run at another step's clock, and nobody waits for an order in between.

Each step is as long as times need to become certain. Energies are read from a counter that moves a few times a second;
they may be less certain, and their standard errors say so.

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
from perseus_core.runtime.measure.energy import Iteration, solve_powers
from perseus_core.runtime.measure.sampler import CounterReading
from perseus_core.runtime.measure.stage_measurements import (
    ClockMeasurements,
    InstructionMeasurement,
    StageMeasurements,
)

# Least effective energy was found at 0.48 to 0.63 of the highest clock on the published and the modelled profiles.
_LOWEST_USEFUL_SHARE = 0.45
# A clock read back so near the one asked for, relative, is that one.
_CLOCK_TOLERANCE = 0.02
# So many readings of an iteration may show another clock: clock and throttle reasons are not read at the same moment.
_TOLERATED_SHARE = 0.1
# After a change of clock one iteration is discarded, and any other that begins so soon after it.
_SETTLING_S = 0.1
# The steps are gone through so often at most, for clocks that could not be measured the first time.
_MOST_ROUNDS = 2


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        clock_mhz: the clock that is held now, None when complete.
        clocks_done: clocks that need no more iterations.
        num_clocks: clocks of the sweep.
        iterations_done: iterations handed in so far.
        iterations_left: about how many more.
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


def sweep_clocks(supported_clocks_mhz: Sequence[int], num_clocks: int, unlocked_mhz: int = 0) -> tuple[int, ...]:
    """Evenly spread clocks of the useful range, in the order of the sweep.

    From the highest supported one, every second one down to 45 % of it and the others back up, so that a GPU which
    warms up meanwhile makes neither end look costly. With the highest the sweep begins again while ranks wait for its
    end, and so that costs no time.

    Args:
        supported_clocks_mhz: of the GPU.
        num_clocks: how many, if there are so many.
        unlocked_mhz: what the job's GPUs hold at unlocked clocks at most, 0 if that is not known. Where it is below the
            highest supported clock, all clocks in between are the same to a GPU at its power limit: one is enough.
    """
    supported = sorted(set(supported_clocks_mhz), reverse=True)
    lowest = max(supported[-1], _LOWEST_USEFUL_SHARE * supported[0])
    highest = unlocked_mhz if lowest < unlocked_mhz < (1 - _CLOCK_TOLERANCE) * supported[0] else supported[0]
    # The highest supported clock takes the place of the highest that is held: asking for it gives that one.
    steps = max(1, num_clocks - 1)
    wanted = [supported[0], *(highest + (lowest - highest) * i / steps for i in range(1, num_clocks))]
    clocks = sorted({min(supported, key=lambda clock: abs(clock - w)) for w in wanted}, reverse=True)
    return (*clocks[::2], *reversed(clocks[1::2]))


class Sweep:
    """Measures one rank's stage at one clock after the other.

    In each iteration: hold `clock_at`; when what happened in it is known, which may be some iterations later,
    `add_iteration`.
    """

    def __init__(
        self,
        stage: int,
        supported_clocks_mhz: Sequence[int],
        clocks_mhz: Sequence[int],
        iterations_of_step: int,
        counter_window_s: float = 0.0,
    ) -> None:
        """Plans the sweep.

        Args:
            stage: the rank's stage.
            supported_clocks_mhz: of its GPU.
            clocks_mhz: the clocks to measure, in this order: see `sweep_clocks`.
            iterations_of_step: how many iterations each is held; the first is discarded.
            counter_window_s: see `solve_powers`.

        Raises:
            InputError: if a step has no iteration that counts.
        """
        if iterations_of_step < 2:
            raise InputError(f"iterations_of_step is {iterations_of_step}; it must be 2 or more: one is discarded")
        self._stage = stage
        self._supported = tuple(supported_clocks_mhz)
        self._clocks = tuple(clocks_mhz)
        self._of_step = iterations_of_step
        self._counter_window_s = counter_window_s
        self._iterations: dict[int, list[Iteration]] = {}
        self._readings: list[CounterReading] = []
        self._measured: dict[int, ClockMeasurements | None] = {}
        self._measured_from: dict[int, tuple[int, int, int]] = {}
        # Of the step that is under way.
        self._asked_mhz: int | None = None
        self._last_number: int | None = None  # of the iteration before, if that ran at the same clock
        self._settled_from_s = math.inf
        self._tries = 0
        self._done: set[int] = set()
        self._num_added = 0
        self._overridden_to_mhz: set[int] = set()
        self._notes: list[str] = []

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to measure."""
        return len(self._done) == len(self._clocks) or self._num_added >= _MOST_ROUNDS * self._iterations_of_round

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as asked, a sentence each, for the log."""
        missing = [clock for clock in self._clocks if clock not in self._done]
        if not self.is_complete or not missing:
            return tuple(self._notes)
        clocks = ", ".join(f"{clock}" for clock in sorted(missing, reverse=True))
        return (*self._notes, f"stage {self._stage}: {clocks} MHz could not be measured")

    def clock_at(self, iterations_since_begin: int) -> int:
        """The clock to hold in an iteration [MHz], the same on all ranks, also after this one's sweep is complete."""
        return self._clocks[iterations_since_begin // self._of_step % len(self._clocks)]

    def add_iteration(self, iteration: Iteration, asked_mhz: int | None, readings: Sequence[CounterReading]) -> None:
        """Hands in one iteration.

        Args:
            iteration: what happened in it; iterations come in order, skipped ones are not handed in.
            asked_mhz: the clock that was held from its beginning to its end; None where it was another thing.
            readings: of the energy counter, all that came since the last call; they may reach beyond the iteration.
        """
        self._readings += readings
        if asked_mhz != self._asked_mhz:
            if self._asked_mhz is not None:
                self._end_step(self._asked_mhz)
            self._asked_mhz, self._tries, self._last_number = asked_mhz, 0, None
        has_changed = self._last_number is None or iteration.number != self._last_number + 1
        self._last_number = iteration.number
        if asked_mhz is None or not iteration.spans:
            return
        self._num_added += 1
        if has_changed:
            self._settled_from_s = iteration.begin_s + _SETTLING_S
        if has_changed or iteration.begin_s < self._settled_from_s:
            return
        self._tries += 1
        in_force_mhz = self._clock_in_force(iteration, asked_mhz)
        if in_force_mhz is not None:
            self._iterations.setdefault(in_force_mhz, []).append(iteration)
        if self._tries == self._of_step - 1:
            self._end_step(asked_mhz)

    def measurements(self) -> StageMeasurements:
        """What was measured so far, also at clocks that were in force without being asked for."""
        found = (self._measure(clock) for clock in sorted(self._iterations, reverse=True))
        return StageMeasurements(self._stage, tuple(c for c in found if c is not None))

    def progress(self) -> Progress:
        """How far it is."""
        left = self._iterations_of_round - self._num_added % self._iterations_of_round
        return Progress(
            None if self.is_complete else self.clock_at(self._num_added),
            len(self._done),
            len(self._clocks),
            self._num_added,
            0 if self.is_complete else left,
        )

    @property
    def _iterations_of_round(self) -> int:
        return self._of_step * len(self._clocks)

    def _clock_in_force(self, iteration: Iteration, asked_mhz: int) -> int | None:
        """The clock an iteration really ran at, None where it was not the same throughout.

        A clock below the one asked for because of the power limit is what asking for this clock gives, now and later:
        it is not told apart. Heat and other programs are. Of an iteration that is not on the host's time nobody knows.
        """
        if not iteration.on_host_time:
            return asked_mhz
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

    def _end_step(self, clock_mhz: int) -> None:
        """A clock needs no second step if half of its iterations were seen, and the counter beside them."""
        if clock_mhz in self._done or 2 * self._tries < self._of_step - 1:
            return
        if clock_mhz in self._iterations:
            if self._measure(clock_mhz) is not None:
                self._done.add(clock_mhz)
            return
        held_instead = [clock for clock in self._iterations if clock < clock_mhz]
        if held_instead:
            self._done.add(clock_mhz)
        self._note_override(clock_mhz, max(held_instead, default=None))

    def _note_override(self, asked_mhz: int, held_mhz: int | None) -> None:
        asked_for = f"stage {self._stage}: {asked_mhz} MHz was asked for, but "
        if held_mhz is None:
            self._notes.append(asked_for + "other clocks were in force")
        elif held_mhz not in self._overridden_to_mhz:
            self._overridden_to_mhz.add(held_mhz)
            self._notes.append(asked_for + f"{held_mhz} MHz was in force")

    def _measure(self, clock_mhz: int) -> ClockMeasurements | None:
        """What the iterations at a clock tell; solved anew only when more has become known of them."""
        iterations = self._iterations[clock_mhz]
        first, last = self._places_between(iterations[0].begin_s, iterations[-1].end_s)
        known = (len(iterations), first, last)
        if self._measured_from.get(clock_mhz) != known:
            self._measured_from[clock_mhz] = known
            self._measured[clock_mhz] = _measure(
                clock_mhz, iterations, self._readings[first:last], self._counter_window_s
            )
        return self._measured[clock_mhz]

    def _readings_between(self, begin_s: float, end_s: float) -> list[CounterReading]:
        first, last = self._places_between(begin_s, end_s)
        return self._readings[first:last]

    def _places_between(self, begin_s: float, end_s: float) -> tuple[int, int]:
        first = bisect_left(self._readings, begin_s, key=_time_s)
        return first, bisect_right(self._readings, end_s, lo=first, key=_time_s)


def _measure(
    clock_mhz: int, iterations: Sequence[Iteration], readings: Sequence[CounterReading], counter_window_s: float
) -> ClockMeasurements | None:
    powers = solve_powers(iterations, readings, counter_window_s)
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
