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
    """

    number: int
    begin_s: float
    end_s: float
    spans: tuple[Span, ...] = field(repr=False)


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
    """

    instructions: dict[ChunkKind, PowerEstimate]
    waiting: PowerEstimate
    outside: PowerEstimate
    num_intervals: int


def solve_powers(iterations: Sequence[Iteration], readings: Sequence[CounterReading]) -> Powers | None:
    """Powers of everything that one GPU did in iterations at one clock.

    Only intervals between readings that lie within the iterations are used. Of consecutive iterations the time between
    them counts as outside, unless it is longer than half an iteration: then something else was done (evaluation, a
    checkpoint). Intervals in which an instruction was disturbed (an interpreter's pause) are left out.

    Args:
        iterations: in order of time, each with one span at least.
        readings: of that time, in order; more may be given.

    Returns:
        The powers, or None if no interval with an instruction lies within the iterations.
    """
    types = sorted({span.type for iteration in iterations for span in iteration.spans})
    occupancy = _Occupancy(types, iterations)
    begins, ends = _intervals(readings)
    lengths_s = np.array([end.time_s - begin.time_s for begin, end in zip(begins, ends, strict=True)])
    energies_j = np.array([end.energy_j - begin.energy_j for begin, end in zip(begins, ends, strict=True)])
    seconds = occupancy.before([end.time_s for end in ends]) - occupancy.before([begin.time_s for begin in begins])
    # Disturbed executions are in no column, and neither is the time beyond the iterations.
    inside = seconds.sum(axis=1) > lengths_s - 1e-6
    if not seconds[inside, : len(types)].any():
        return None
    timing_s = np.array([math.hypot(b.uncertainty_s, e.uncertainty_s) for b, e in zip(begins, ends, strict=True)])
    powers_w, errors_w = _solve(
        seconds[inside], energies_j[inside], timing_s[inside] / math.sqrt(12), num_instructions=len(types)
    )
    estimates = [
        PowerEstimate(float(power), float(error), float(observed))
        for power, error, observed in zip(powers_w, errors_w, seconds[inside].sum(axis=0), strict=True)
    ]
    return Powers(
        dict(zip(types, estimates[: len(types)], strict=True)), estimates[-2], estimates[-1], int(inside.sum())
    )


def undisturbed(durations_s: Sequence[float]) -> NDArray[np.bool_]:
    """Which executions of one type took about as long as the others, shape (n,). Three or fewer are all believed."""
    durations = np.asarray(durations_s)
    if len(durations) <= 3:
        return np.ones(len(durations), bool)
    usual = float(np.median(durations))
    spread = _STD_PER_MAD * float(np.median(np.abs(durations - usual)))
    limit = max(_DISTURBED_DEVIATIONS * spread, _DISTURBED_RELATIVE * usual)
    undisturbed_ones: NDArray[np.bool_] = np.abs(durations - usual) <= limit
    return undisturbed_ones


class _Occupancy:
    """How many seconds of each activity lie before a moment: instruction types in order, then waiting, then outside."""

    def __init__(self, types: Sequence[ChunkKind], iterations: Sequence[Iteration]) -> None:
        segments: dict[ChunkKind | Activity, list[tuple[float, float]]] = {a: [] for a in (*types, *Activity)}
        disturbed = _disturbed_spans(iterations)
        for i, iteration in enumerate(iterations):
            last_s = iteration.begin_s
            for span in iteration.spans:
                segments[Activity.WAITING].append((last_s, span.begin_s))
                if span not in disturbed:
                    segments[span.type].append((span.begin_s, span.end_s))
                last_s = span.end_s
            until_s = iteration.end_s
            following = iterations[i + 1] if i + 1 < len(iterations) else None
            if following is not None and following.number == iteration.number + 1:
                gap_s = following.begin_s - iteration.end_s
                if gap_s < 0.5 * (iteration.end_s - iteration.begin_s):
                    until_s = following.begin_s
            segments[Activity.OUTSIDE].append((last_s, until_s))
        self._segments = [np.array(of_activity).reshape(-1, 2) for of_activity in segments.values()]

    def before(self, times_s: Sequence[float]) -> Array:
        """Shape (times, activities)."""
        columns = []
        for of_activity in self._segments:
            edges = of_activity.ravel()
            total_s = np.repeat(np.concatenate([[0.0], np.cumsum(of_activity[:, 1] - of_activity[:, 0])]), 2)[1:-1]
            columns.append(np.interp(times_s, edges, total_s) if len(edges) else np.zeros(len(times_s)))
        return np.column_stack(columns)


def _disturbed_spans(iterations: Sequence[Iteration]) -> set[Span]:
    by_type: dict[ChunkKind, list[Span]] = {}
    for iteration in iterations:
        for span in iteration.spans:
            by_type.setdefault(span.type, []).append(span)
    return {
        span
        for spans in by_type.values()
        for span, usual in zip(spans, undisturbed([s.end_s - s.begin_s for s in spans]), strict=True)
        if not usual
    }


def _intervals(readings: Sequence[CounterReading]) -> tuple[list[CounterReading], list[CounterReading]]:
    """Begins and ends of the intervals to use.

    An interval is at least ten times as long as its ends are uncertain, so readings of a thread that ran late, or of a
    fast counter, are passed over. Where the counter fell (a reset, a wrap) a new interval begins.
    """
    begins: list[CounterReading] = []
    ends: list[CounterReading] = []
    begin: CounterReading | None = None
    for reading in readings:
        if begin is None or reading.energy_j < begin.energy_j:
            begin = reading
            continue
        uncertainty_s = max(begin.uncertainty_s, reading.uncertainty_s)
        if reading.time_s - begin.time_s >= max(_MIN_SPACING_UNCERTAINTIES * uncertainty_s, _MIN_SPACING_S):
            begins.append(begin)
            ends.append(reading)
            begin = reading
    return begins, ends


def _solve(seconds: Array, energies_j: Array, timing_s: Array, num_instructions: int) -> tuple[Array, Array]:
    """Weighted least squares with the prior.

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
    relative_lengths = lengths_s / lengths_s.mean()
    shares = seconds[:, :num_instructions].sum(axis=0) + 1e-9
    shares /= shares.sum()
    mean_power_w = float(energies_j.sum() / lengths_s.sum())
    prior_scatter_j = _PRIOR_SCATTER * float(np.median(energies_j / np.sqrt(relative_lengths)))
    scatter_j = prior_scatter_j
    for _ in range(5):  # weights and prior depend on the solution, which soon hardly changes
        known_variance = mean_power_w**2 * ((_OUTSIDE_SCATTER * seconds[:, -1]) ** 2 + timing_s**2)
        root = np.sqrt(relative_lengths + known_variance / scatter_j**2)
        matrix, target = seconds / root[:, None], energies_j / root
        prior, prior_target = _prior_rows(shares, mean_power_w)
        stacked = np.vstack([matrix, prior * scatter_j])
        precision = stacked.T @ stacked
        powers_w = np.linalg.solve(precision, stacked.T @ np.concatenate([target, prior_target * scatter_j]))
        covariance = np.linalg.inv(precision)
        freedom = len(target) - float(np.trace(matrix @ covariance @ matrix.T))
        square_sum = float(np.sum((target - matrix @ powers_w) ** 2)) + _PRIOR_SCATTER_INTERVALS * prior_scatter_j**2
        errors_w = scatter_j * np.sqrt(np.diag(covariance))
        scatter_j = math.sqrt(square_sum / (freedom + _PRIOR_SCATTER_INTERVALS))
        mean_power_w = float(shares @ powers_w[:num_instructions])
    return np.maximum(powers_w, 0.0), errors_w


def _prior_rows(shares: Array, mean_power_w: float) -> tuple[Array, Array]:
    """The prior as equations of unit variance: each instruction's power is near their mean, the others are a part."""
    num_instructions = len(shares)
    rows = np.zeros((num_instructions + 2, num_instructions + 2))
    rows[:num_instructions, :num_instructions] = (np.eye(num_instructions) - shares) / (
        _INSTRUCTION_PRIOR_STD * mean_power_w
    )
    target = np.zeros(num_instructions + 2)
    for row, (mean, std) in ((num_instructions, _WAITING_PRIOR), (num_instructions + 1, _OUTSIDE_PRIOR)):
        rows[row, row] = 1 / (std * mean_power_w)
        target[row] = mean / std
    return rows, target
