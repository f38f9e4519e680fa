"""How a simulated GPU behaves: time, clocks and energy, integrated exactly from one change to the next.

Everything here is arithmetic on plain data. Nothing sleeps, locks or knows about processes: a state is brought forward
to a given time by `advance`, whoever asks and whenever.
"""

from __future__ import annotations

import math
import struct
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

IDLE = -1
# A work that meets more clock changes than this has its oldest segments merged; a plan changes the clock once.
_MAX_SEGMENTS = 24
_MAX_PENDING = 16
# What the counter would have counted before so many periods is forgotten.
_MOST_PERIODS = 1000
# Where a window is the whole period, one begins where the last has ended.
_ROUNDING_S = 1e-9


@dataclass(frozen=True)
class InstructionCost:
    """Time [s] and energy [J] of one instruction type at each supported clock, highest clock first."""

    time_s: tuple[float, ...]
    energy_j: tuple[float, ...]


@dataclass(frozen=True)
class GpuModel:
    """What all simulated GPUs of a machine have in common.

    Attributes:
        clocks_mhz: supported clocks, highest first.
        blocking_w: power [W] while waiting, at each of them.
        costs: one for each instruction type.
        clock_latencies_s: from a lock call until the clock changes: up, down, and by how much either may be longer.
        counter_period_s: how often the energy counter moves.
        counter_window_s: the end of each period, in which it measures; 0 for all of it.
    """

    clocks_mhz: tuple[int, ...]
    blocking_w: tuple[float, ...]
    costs: tuple[InstructionCost, ...]
    clock_latencies_s: tuple[float, float, float]
    counter_period_s: float
    counter_window_s: float = 0.0


@dataclass
class Work:
    """One instruction on a GPU, running or finished.

    Attributes:
        number: counts the works of this GPU from 1.
        cost_index: which of `GpuModel.costs`.
        time_factor: this execution's time over the profile's (noise).
        energy_factor: this execution's energy over the profile's (noise).
        start_s: when it started.
        end_s: when it finished; none while it runs.
        remaining: the fraction still to do.
        energy_j: drawn so far.
        segments: [clock in MHz, seconds at it], in order.
    """

    number: int
    cost_index: int
    time_factor: float
    energy_factor: float
    start_s: float
    end_s: float | None = None
    remaining: float = 1.0
    energy_j: float = 0.0
    segments: list[list[float]] = field(default_factory=list)


@dataclass
class GpuState:
    """Where one GPU is at `time_s`. Plain numbers, texts and lists: it goes through JSON.

    Attributes:
        time_s: the moment (CLOCK_MONOTONIC) up to which energy is integrated.
        set_clock_mhz: the clock the driver asks for, before any capping.
        pending: [time, clock] requests that are not yet in force, in order of time.
        former: [time, clock] that was set until then, of the last changes.
        locked_mhz: [lowest, highest] of the last lock call, or empty.
        energy_j: true energy since the start.
        busy_s: seconds spent working since the start.
        counter_j: what the counter has counted until its last period boundary.
        window_begin_j: `energy_j` when the window began in which the counter measures, or measured last.
        counter_busy_s: `busy_s` at the last boundary and at the one before.
        power_limit_w: power limit in force.
        thermal_limit_mhz: clock that heat allows, 0 for any.
        work: the instruction that runs or ran last.
        num_works: how many instructions were started.
        pids: processes that have used the GPU.
        faults: what is broken, see `perseus_core.gpu.simulated.faults`.
    """

    time_s: float
    set_clock_mhz: int
    power_limit_w: float
    pending: list[list[float]] = field(default_factory=list)
    former: list[list[float]] = field(default_factory=list)
    locked_mhz: list[int] = field(default_factory=list)
    energy_j: float = 0.0
    busy_s: float = 0.0
    counter_j: float = 0.0
    window_begin_j: float = 0.0
    counter_busy_s: list[float] = field(default_factory=lambda: [0.0, 0.0])
    thermal_limit_mhz: int = 0
    work: Work | None = None
    num_works: int = 0
    pids: list[int] = field(default_factory=list)
    faults: dict[str, Any] = field(default_factory=dict)

    @property
    def is_working(self) -> bool:
        """Whether an instruction is running."""
        return self.work is not None and self.work.end_s is None


def interpolate_costs(
    clocks_mhz: Sequence[int], measured: Sequence[tuple[int, float, float]], scale: float
) -> InstructionCost:
    """Time and energy at every supported clock from those at the measured ones.

    Linear between measured clocks. Above the highest measured clock nothing gets faster; below the lowest, time grows
    as 1 / clock at constant power.

    Args:
        clocks_mhz: supported clocks.
        measured: (clock, time in s, energy in J), in any order.
        scale: multiplies times and energies.
    """
    points = sorted(measured)
    known = [clock for clock, _, _ in points]
    times, energies = [], []
    for clock in clocks_mhz:
        right = bisect_left(known, clock)
        if right == 0:
            stretch = known[0] / clock
            time_s, energy_j = points[0][1] * stretch, points[0][2] * stretch
        elif right == len(known):
            _, time_s, energy_j = points[-1]
        else:
            (low, low_s, low_j), (high, high_s, high_j) = points[right - 1], points[right]
            share = (clock - low) / (high - low)
            time_s, energy_j = low_s + (high_s - low_s) * share, low_j + (high_j - low_j) * share
        times.append(time_s * scale)
        energies.append(energy_j * scale)
    return InstructionCost(tuple(times), tuple(energies))


def power_w(model: GpuModel, state: GpuState, clock_index: int) -> float:
    """Power [W] of what the GPU does now, at one of the supported clocks."""
    work = state.work
    if work is None or work.end_s is not None:
        return model.blocking_w[clock_index]
    cost = model.costs[work.cost_index]
    return cost.energy_j[clock_index] * work.energy_factor / (cost.time_s[clock_index] * work.time_factor)


def thermal_clock_index(model: GpuModel, state: GpuState) -> int:
    """Index of the clock that the lock and heat allow, before power capping."""
    wanted = state.set_clock_mhz
    if state.thermal_limit_mhz:
        wanted = min(wanted, state.thermal_limit_mhz)
    return clock_index_at_most(model, wanted)


def effective_clock_index(model: GpuModel, state: GpuState) -> int:
    """Index of the clock the GPU really runs at: the highest that the lock, heat and the power limit allow."""
    index = thermal_clock_index(model, state)
    last = len(model.clocks_mhz) - 1
    while index < last and power_w(model, state, index) > state.power_limit_w:
        index += 1
    return index


def clock_index_at_most(model: GpuModel, clock_mhz: float) -> int:
    """Index of the highest supported clock not above `clock_mhz`, or of the lowest one."""
    for index, supported in enumerate(model.clocks_mhz):
        if supported <= clock_mhz:
            return index
    return len(model.clocks_mhz) - 1


def request_clock(model: GpuModel, state: GpuState, clock_mhz: int) -> None:
    """Asks for a clock at the state's time; it is in force a latency later, and not before an earlier one."""
    if len(state.pending) >= _MAX_PENDING:
        state.pending.pop()
    earlier_s, earlier_mhz = state.pending[-1] if state.pending else (state.time_s, state.set_clock_mhz)
    up_s, down_s, jitter_s = model.clock_latencies_s
    latency_s = down_s if clock_mhz < earlier_mhz else up_s
    # By chance, but the same for the same moment.
    latency_s += jitter_s * (zlib.crc32(struct.pack("<d", state.time_s)) / 2**32)
    state.pending.append([max(earlier_s, state.time_s + latency_s), clock_mhz])


def start_work(state: GpuState, cost_index: int, time_factor: float, energy_factor: float) -> Work:
    """Starts an instruction at the state's time, on a GPU that is not working."""
    assert not state.is_working, "a GPU runs one instruction at a time"
    state.num_works += 1
    state.work = Work(state.num_works, cost_index, time_factor, energy_factor, state.time_s)
    return state.work


def finished_work(model: GpuModel, state: GpuState) -> Work:
    """The running instruction as it will have run when it is done, if nobody changes anything until then."""
    assert state.work is not None, "no instruction was ever started"
    trial = copy(state)
    trial.pending, trial.former = list(state.pending), []
    trial.work = copy(state.work)
    trial.work.segments = [list(segment) for segment in state.work.segments]
    while trial.work.end_s is None:
        _step(model, trial, math.inf)
    return trial.work


def advance(model: GpuModel, state: GpuState, time_s: float) -> None:
    """Brings a state forward to a time, sampling the energy counter at its period boundaries on the way."""
    if time_s <= state.time_s:
        return
    period_s = model.counter_period_s
    last = math.floor(time_s / period_s)
    # A counter that measures all the time needs no more than the last two boundaries.
    first = max(last - 1, math.floor(state.time_s / period_s)) if not model.counter_window_s else 0
    for number in range(max(first, math.floor(state.time_s / period_s), last - _MOST_PERIODS), last + 1):
        sample_s = number * period_s
        if state.time_s < sample_s <= time_s:
            _move_counter(model, state, sample_s)
    next_window_s = (last + 1) * period_s - model.counter_window_s
    if model.counter_window_s and next_window_s <= time_s:
        _begin_window(model, state, next_window_s)
    _integrate(model, state, time_s)


def _move_counter(model: GpuModel, state: GpuState, boundary_s: float) -> None:
    if model.counter_window_s:
        _begin_window(model, state, boundary_s - model.counter_window_s)
        _integrate(model, state, boundary_s)
        power = (state.energy_j - state.window_begin_j) / model.counter_window_s
        state.counter_j += power * model.counter_period_s
    else:
        _integrate(model, state, boundary_s)
        state.counter_j = state.energy_j
    state.counter_busy_s = [state.busy_s, state.counter_busy_s[0]]


def _begin_window(model: GpuModel, state: GpuState, begin_s: float) -> None:
    """Remembers the energy at a window's begin, unless that was passed before: a state is saved at any moment."""
    if state.time_s <= begin_s + _ROUNDING_S:
        _integrate(model, state, begin_s)
        state.window_begin_j = state.energy_j


def _integrate(model: GpuModel, state: GpuState, time_s: float) -> None:
    while state.time_s < time_s:
        _step(model, state, time_s)
    _let_take_effect(state, time_s)


def _let_take_effect(state: GpuState, time_s: float) -> None:
    while state.pending and state.pending[0][0] <= time_s:
        in_force_s, clock_mhz = state.pending.pop(0)
        state.former = [*state.former[1 - _MAX_PENDING :], [in_force_s, state.set_clock_mhz]]
        state.set_clock_mhz = int(clock_mhz)


def set_clock_at(state: GpuState, time_s: float) -> int:
    """The clock that the driver had set at some time, not long before the state's."""
    return int(next((clock_mhz for until_s, clock_mhz in state.former if time_s < until_s), state.set_clock_mhz))


def _step(model: GpuModel, state: GpuState, until_s: float) -> None:
    """Goes to the next moment at which anything changes, at most to `until_s`."""
    _let_take_effect(state, state.time_s)
    end_s = min(until_s, state.pending[0][0]) if state.pending else until_s
    index = effective_clock_index(model, state)
    power = power_w(model, state, index)
    work = state.work
    if work is not None and work.end_s is None:
        duration_s = model.costs[work.cost_index].time_s[index] * work.time_factor
        done_s = state.time_s + work.remaining * duration_s
        finishes = done_s <= end_s
        end_s = min(done_s, end_s)
        elapsed_s = end_s - state.time_s
        work.remaining = 0.0 if finishes else work.remaining - elapsed_s / duration_s
        work.end_s = end_s if finishes else None
        work.energy_j += power * elapsed_s
        state.busy_s += elapsed_s
        _add_segment(work, model.clocks_mhz[index], elapsed_s)
    state.energy_j += power * (end_s - state.time_s)
    state.time_s = end_s


def _add_segment(work: Work, clock_mhz: int, elapsed_s: float) -> None:
    if work.segments and (work.segments[-1][0] == clock_mhz or len(work.segments) >= _MAX_SEGMENTS):
        work.segments[-1][1] += elapsed_s
    else:
        work.segments.append([clock_mhz, elapsed_s])
