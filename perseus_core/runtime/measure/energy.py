"""From the energy counter to the power of each instruction.

The counter of a GPU moves every 20-100 ms, whatever runs at that moment, so one reading says nothing about one
instruction. But between any two readings the energy is the sum, over everything the GPU did, of power times time:

    energy_k = sum over activities a of power_a * (seconds of a between readings k and k + 1)

which is linear in the powers, and a few seconds of training give many such equations for few unknowns: one power for
each (chunk, kind), one for waiting, one for what is done outside the pipeline (gradient all-reduce, optimizer). They
are solved together by least squares.

Where the equations say little (an activity that hardly occurs, or instructions shorter than the counter's period and
always in the same proportion) a weak prior decides: instructions draw about the same power, waiting a good part less.
It is much wider than the errors of a usual measurement, and where it is all there is the standard error shows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning.schedule import Kind
from perseus_core.runtime.measure.sampler import CounterReading

Array = NDArray[np.float64]

# Readings are used no closer to each other than so many times the uncertainty of their times.
_MIN_SPACING_UNCERTAINTIES = 10
_MIN_SPACING_S = 0.02
# Prior of an activity's power, relative to the mean power of instructions: (mean, standard deviation). On the published
# A100 and A40 profiles forward and backward differ by 4 % at most.
_INSTRUCTION_PRIOR_STD = 0.1
_WAITING_PRIOR = (0.3, 0.3)
_OUTSIDE_PRIOR = (0.5, 0.5)
# Outside are several things one after another (waiting for the other stages, all-reduce, optimizer), so its power
# scatters within an iteration by so much. An interval partly outside therefore tells little about its other part.
_OUTSIDE_SCATTER = 0.3
# The scatter of one interval's energy before any was seen, relative; counts as much as so many intervals.
_PRIOR_SCATTER = 0.02
_PRIOR_SCATTER_INTERVALS = 2.0
# An execution whose time is so far from the median of its type, relative and in standard deviations, was disturbed.
_DISTURBED_RELATIVE = 0.1
_DISTURBED_DEVIATIONS = 6.0
_STD_PER_MAD = 1.4826


class ChunkKind(NamedTuple):
    """An instruction type of one stage: `planning.schedule.InstructionType` without the stage."""

    chunk: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind}" + (f" of chunk {self.chunk}" if self.chunk else "")


class Span(NamedTuple):
    """One executed instruction, begin and end in seconds of time.monotonic()."""

    type: ChunkKind
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Iteration:
    """What one GPU did in one iteration. Times are seconds of time.monotonic().

    Attributes:
        number: counts the job's iterations; those with consecutive numbers followed each other.
        begin_s: when this stage could have started.
        end_s: when it ended, with or without gradient all-reduce and optimizer.
        spans: the instructions, in order of time.
        on_host_time: the times are the host's; otherwise only differences between them mean something.
    """

    number: int
    begin_s: float
    end_s: float
    spans: tuple[Span, ...] = field(repr=False)
    on_host_time: bool = True


class Activity(Enum):
    """What a GPU does when it runs no instruction."""

    WAITING = "waiting"
    """From the iteration's begin to its last instruction's end: it waits for its neighbours."""
    OUTSIDE = "outside"
    """After the iteration's last instruction: gradient all-reduce, optimizer, data loading."""


@dataclass(frozen=True)
class PowerEstimate:
    """The power of one activity at one clock.

    Attributes:
        power_w: mean power.
        standard_error_w: its standard error. Where the activity was hardly seen it is a third of the power or more.
        observed_s: for how long the activity was seen.
    """

    power_w: float
    standard_error_w: float
    observed_s: float


@dataclass(frozen=True)
class Powers:
    """Mean powers of one GPU at one clock.

    Attributes:
        instructions: of each instruction type.
        waiting: while waiting for a neighbour.
        outside: after the last instruction of an iteration.
        num_intervals: how many counter intervals tell.
        durations_s: of each instruction type, those of the executions that were not disturbed.
    """

    instructions: dict[ChunkKind, PowerEstimate]
    waiting: PowerEstimate
    outside: PowerEstimate
    num_intervals: int
    durations_s: dict[ChunkKind, Array] = field(repr=False)


def solve_powers(
    iterations: Sequence[Iteration], readings: Sequence[CounterReading], counter_window_s: float = 0.0
) -> Powers | None:
    """Powers of everything that one GPU did in iterations at one clock.

    Only intervals between readings that lie within the iterations are used. Of consecutive iterations the time between
    them counts as outside, unless it is longer than half an iteration: then something else was done (evaluation, a
    checkpoint). Intervals in which an instruction was disturbed (an interpreter's pause) are left out. Of iterations
    that are not on the host's time only the durations count.

    Args:
        iterations: in order of time, each with one span at least.
        readings: of that time, in order; more may be given.
        counter_window_s: the counter measures so much before each move, and takes it for all that went before; 0 for a
            counter that measures all the time.

    Returns:
        The powers, or None if no interval with an instruction lies within the iterations.
    """
    times_s = np.array([reading.time_s for reading in readings])
    counter_j = np.array([reading.energy_j for reading in readings])
    uncertainties_s = np.array([reading.uncertainty_s for reading in readings])
    begins, ends = _intervals(times_s, counter_j, uncertainties_s)
    placed = [iteration for iteration in iterations if iteration.on_host_time]
    if not len(ends) or not placed:
        return None
    occupancy = _Occupancy(placed, [iteration for iteration in iterations if not iteration.on_host_time])
    num_types = len(occupancy.types)
    before = occupancy.before(times_s)
    if counter_window_s:
        stretched = np.diff(times_s, prepend=times_s[0]) / counter_window_s
        in_window = before - occupancy.before(times_s - counter_window_s)
        before = np.cumsum(in_window * stretched[:, np.newaxis], axis=0)
    seconds = before[ends] - before[begins]
    # Disturbed executions are in no column, and neither is the time beyond the iterations.
    inside = seconds.sum(axis=1) > times_s[ends] - times_s[begins] - 1e-6
    seconds = seconds[inside]
    if not seconds[:, :num_types].any():
        return None
    energies_j = (counter_j[ends] - counter_j[begins])[inside]
    timing_s = np.hypot(uncertainties_s[begins], uncertainties_s[ends])[inside] / math.sqrt(12)
    powers_w, errors_w = _solve(seconds, energies_j, timing_s, num_instructions=num_types)
    estimates = [
        PowerEstimate(power, error, observed)
        for power, error, observed in zip(
            powers_w.tolist(), errors_w.tolist(), seconds.sum(axis=0).tolist(), strict=True
        )
    ]
    return Powers(
        dict(zip(occupancy.types, estimates[:num_types], strict=True)),
        estimates[-2],
        estimates[-1],
        len(seconds),
        dict(zip(occupancy.types, occupancy.durations_s, strict=True)),
    )


def undisturbed(durations_s: Sequence[float] | Array) -> NDArray[np.bool_]:
    """Which executions of one type took about as long as the others, shape (n,). Three or fewer are all believed."""
    durations = np.asarray(durations_s)
    if len(durations) <= 3:
        return np.ones(len(durations), bool)
    usual = _median(durations)
    deviations = np.abs(durations - usual)
    limit = max(_DISTURBED_DEVIATIONS * _STD_PER_MAD * _median(deviations), _DISTURBED_RELATIVE * usual)
    undisturbed_ones: NDArray[np.bool_] = deviations <= limit
    return undisturbed_ones


def _median(values: Array) -> float:
    """As `numpy.median`, which takes ten times as long for few values."""
    in_order = np.sort(values)
    return float(in_order[(len(values) - 1) // 2] + in_order[len(values) // 2]) / 2


class _Occupancy:
    """How many seconds of each activity lie before a moment: instruction types in order, then waiting, then outside.

    Attributes:
        types: the instruction types.
        durations_s: of each of them, the executions that were not disturbed.
    """

    def __init__(self, iterations: Sequence[Iteration], not_placed: Sequence[Iteration] = ()) -> None:
        """Of iterations on the host's time; of others only the durations count."""
        of_iterations = [[span.type for span in iteration.spans] for iteration in iterations]
        # Types are compared rather than looked up, which is slow: iterations are usually all alike.
        kinds = [types for i, types in enumerate(of_iterations) if i == 0 or types != of_iterations[i - 1]]
        self.types = sorted({one for types in kinds for one in types})
        of_not_placed = [span for iteration in not_placed for span in iteration.spans]
        waiting, outside, neither = (len(self.types) + i for i in range(3))
        # Everything that was done, one after another: from each edge to the next, the activity with this number.
        edges: list[float] = []
        activities: list[int] = []
        numbers: list[int] = []
        for i, iteration in enumerate(iterations):
            if i == 0 or of_iterations[i] != of_iterations[i - 1]:
                numbers = [self.types.index(one) for one in of_iterations[i]]
            edges.append(iteration.begin_s)
            for span, number in zip(iteration.spans, numbers, strict=True):
                edges += (span.begin_s, span.end_s)
                activities += (waiting, number)
            until_s = iteration.end_s
            following = iterations[i + 1] if i + 1 < len(iterations) else None
            if following is not None and following.number == iteration.number + 1:
                gap_s = following.begin_s - iteration.end_s
                if gap_s < 0.5 * (iteration.end_s - iteration.begin_s):
                    until_s = following.begin_s
            edges.append(until_s)
            activities += (outside, neither)
        self._edges_s = np.maximum.accumulate(edges)
        self._lengths_s = np.diff(self._edges_s)
        self._activities = np.array(activities[:-1])
        self.durations_s = self._leave_out_disturbed(neither, of_not_placed)
        rows = np.arange(len(self._lengths_s))
        self._before = np.zeros((len(edges), neither + 1))
        self._before[rows + 1, self._activities] = self._lengths_s
        np.cumsum(self._before, axis=0, out=self._before)

    def before(self, times_s: Array) -> Array:
        """Shape (times, activities)."""
        places = np.searchsorted(self._edges_s, times_s, side="right") - 1
        places = np.minimum(np.maximum(places, 0), len(self._lengths_s) - 1)
        since_edge_s = np.minimum(np.maximum(times_s - self._edges_s[places], 0.0), self._lengths_s[places])
        before = self._before[places]
        before[np.arange(len(places)), self._activities[places]] += since_edge_s
        return before[:, :-1]

    def _leave_out_disturbed(self, neither: int, of_not_placed: Sequence[Span]) -> list[Array]:
        """Makes disturbed executions no activity's; returns how long the others of each type took."""
        kept = []
        for number, type_ in enumerate(self.types):
            (places,) = np.nonzero(self._activities == number)
            durations_s = self._lengths_s[places]
            if of_not_placed:
                others_s = [span.end_s - span.begin_s for span in of_not_placed if span.type == type_]
                durations_s = np.concatenate([durations_s, others_s])
            usual = undisturbed(durations_s)
            if not usual.all():
                self._activities[places[~usual[: len(places)]]] = neither
                durations_s = durations_s[usual]
            kept.append(durations_s)
        return kept


def _intervals(times_s: Array, energies_j: Array, uncertainties_s: Array) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Begins and ends of the intervals to use, as places of the readings.

    An interval is at least ten times as long as its ends are uncertain, so readings of a thread that ran late, or of a
    fast counter, are passed over. Where the counter fell (a reset, a wrap) a new interval begins.
    """
    places = np.arange(len(times_s))
    needed_s = np.maximum(_MIN_SPACING_UNCERTAINTIES * uncertainties_s, _MIN_SPACING_S)
    is_far_enough = times_s[1:] - times_s[:-1] >= np.maximum(needed_s[1:], needed_s[:-1])
    if (is_far_enough & (energies_j[1:] >= energies_j[:-1])).all():
        return places[:-1], places[1:]
    begins: list[int] = []
    ends: list[int] = []
    begin = 0
    for place in range(1, len(places)):
        if energies_j[place] < energies_j[begin]:
            begin = place
        elif times_s[place] - times_s[begin] >= max(needed_s[begin], needed_s[place]):
            begins.append(begin)
            ends.append(place)
            begin = place
    return np.array(begins, int), np.array(ends, int)


def _solve(seconds: Array, energies_j: Array, timing_s: Array, num_instructions: int) -> tuple[Array, Array]:
    """Weighted least squares with the prior, by its normal equations.

    The variance of an interval's energy has three parts: one proportional to its length, which is found from the
    residuals; that of what is outside; and that of the moments at which it begins and ends.

    Args:
        seconds: of each activity in each interval, shape (intervals, activities): instructions, waiting, outside.
        energies_j: of each interval.
        timing_s: standard deviation of each interval's length.
        num_instructions: how many of the activities are instructions.

    Returns:
        Powers and their standard errors, of shape (activities,).
    """
    lengths_s = seconds.sum(axis=1)
    relative_lengths = lengths_s / (float(lengths_s.sum()) / len(lengths_s))
    shares = seconds[:, :num_instructions].sum(axis=0) + 1e-9
    shares /= shares.sum()
    prior, prior_target = _prior(shares)
    mean_power_w = float(energies_j.sum() / lengths_s.sum())
    prior_scatter_j = _PRIOR_SCATTER * _median(energies_j / np.sqrt(relative_lengths))
    scatter_j = prior_scatter_j
    known_s2 = (_OUTSIDE_SCATTER * seconds[:, -1]) ** 2 + timing_s**2
    for _ in range(5):  # weights and prior depend on the solution, which soon hardly changes
        weights = 1 / (relative_lengths + known_s2 * (mean_power_w / scatter_j) ** 2)
        weighted = seconds.T * weights
        information = weighted @ seconds
        covariance = np.linalg.inv(information + prior * (scatter_j / mean_power_w) ** 2)
        powers_w = covariance @ (weighted @ energies_j + prior_target * (scatter_j**2 / mean_power_w))
        freedom = len(energies_j) - float((covariance * information).sum())
        residuals_j = energies_j - seconds @ powers_w
        square_sum = float(residuals_j @ (weights * residuals_j)) + _PRIOR_SCATTER_INTERVALS * prior_scatter_j**2
        errors_w = scatter_j * np.sqrt(covariance.diagonal())
        scatter_j = math.sqrt(square_sum / (freedom + _PRIOR_SCATTER_INTERVALS))
        mean_power_w = float(shares @ powers_w[:num_instructions])
    return np.maximum(powers_w, 0.0), errors_w


def _prior(shares: Array) -> tuple[Array, Array]:
    """The prior's normal equations: each instruction's power is near their mean, the others are a part of it.

    Returns:
        Matrix and right side for a mean power of 1. For another the matrix is divided by its square, the right side by
        itself.
    """
    num_instructions = len(shares)
    rows = np.zeros((num_instructions + 2, num_instructions + 2))
    rows[:num_instructions, :num_instructions] = (np.eye(num_instructions) - shares) / _INSTRUCTION_PRIOR_STD
    target = np.zeros(num_instructions + 2)
    for row, (mean, std) in ((num_instructions, _WAITING_PRIOR), (num_instructions + 1, _OUTSIDE_PRIOR)):
        rows[row, row] = 1 / std
        target[row] = mean / std
    return rows.T @ rows, rows.T @ target
