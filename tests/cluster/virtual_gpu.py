"""A GPU in virtual time, computed exactly from one change to the next: clocks, times, power, energy and its counter."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perseus_core.gpu.device import ThrottleReason
from perseus_core.gpu.errors import CallFailed, GpuError, GpuLost, NoPermission
from perseus_core.gpu.simulated.description import Description
from perseus_core.gpu.simulated.model import GpuModel, clock_index_at_most, interpolate_costs
from perseus_core.gpu.simulated.shortcomings import ClockRegister
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import InstructionType
from tests.cluster.virtual_threads import VirtualThreads

# Of what a GPU does, the number of the instruction type, or one of these.
WAITING = -2
"""For its neighbours, or for work."""
OUTSIDE = -1
"""Gradient all-reduce and optimizer: after the last instruction of an iteration, until its end."""

# What is done outside draws so much of what instructions draw.
_OUTSIDE_SHARE = 0.55


@dataclass(frozen=True)
class StageModel:
    """How the GPUs of one stage behave, made from a profile and a description of GPUs.

    Attributes:
        clocks_mhz: supported, highest first.
        times_s: of one instruction, by clock and instruction type.
        powers_w: by clock and activity: the instruction types, then `WAITING` and `OUTSIDE`, which count from the end.
        gpu: what the GPUs of all stages have in common.
        name: the product.
        power_limit_w: of it.
    """

    clocks_mhz: tuple[int, ...]
    times_s: tuple[tuple[float, ...], ...]
    powers_w: tuple[tuple[float, ...], ...]
    gpu: GpuModel
    name: str
    power_limit_w: float

    @classmethod
    def of(
        cls, description: Description, profile: Profile, types: Sequence[InstructionType], *, time_scale: float
    ) -> StageModel:
        """Of the given instruction types of one stage; times and energies are scaled, so powers stay."""
        clocks = description.supported_clocks_mhz
        costs = tuple(
            interpolate_costs(clocks, [(m.clock_mhz, m.time_s, m.energy_j) for m in profile.of(t)], time_scale)
            for t in types
        )
        blocking = tuple(description.blocking_power_at(clock) for clock in clocks)
        gpu = GpuModel(clocks, blocking, costs, description.clock_latencies_s, description.energy_counter_period_s)
        powers = []
        for index, blocking_w in enumerate(blocking):
            of_instructions = [cost.energy_j[index] / cost.time_s[index] for cost in costs]
            powers.append((*of_instructions, blocking_w, _OUTSIDE_SHARE * max(of_instructions)))
        return cls(
            clocks,
            tuple(tuple(c.time_s[index] for c in costs) for index in range(len(clocks))),
            tuple(powers),
            gpu,
            description.name,
            description.power_limit_w,
        )


@dataclass(frozen=True)
class GpuNoise:
    """By how much GPUs and their counters differ from what they should be.

    Attributes:
        power: of one GPU's power from that of its model, relative standard deviation.
        counter: of the counter, of the energy of one of its periods, relative standard deviation.
        latency_s: the time until a clock is in force is longer by as much as this, evenly.
        moves_s: the counter moves as much as this earlier or later than after whole periods, evenly.
    """

    power: float = 0.01
    counter: float = 0.005
    latency_s: float = 0.002
    moves_s: float = 0.0005


class Work:
    """What the GPUs of one tensor-parallel group do, one activity after the other.

    Attributes:
        begins: (when it begins [s], activity, this execution's time over the profile's), in order of time.
    """

    __slots__ = ("begins",)

    def __init__(self) -> None:
        """Waiting, from 0 s on."""
        self.begins: list[tuple[float, int, float]] = [(0.0, WAITING, 1.0)]

    def begin(self, time_s: float, activity: int, factor: float = 1.0) -> None:
        """Something else begins now."""
        self.begins.append((time_s, activity, factor))

    def forget(self) -> None:
        """Forgets all but the present activity."""
        del self.begins[:-1]


class VirtualGpu:
    """`perseus_core.gpu.device.Device` in virtual time, and what its work takes.

    All GPUs of a tensor-parallel group share one `Work`. Each computes an instruction at its own clock and then waits
    for the slowest.

    Attributes:
        model: how the GPUs of its stage behave.
        threads: of the rank that uses it; its calls take their time.
        on_change: called when instructions begin to take another time.
        lock_call_s: how long a call that sets the clock takes.
        num_lock_calls: how many were made.
        capped_from_mhz: at this clock and above it says that it is at its power limit.
        register: what it tells of its clock, beside the truth.
        fails: whether a call fails, for a reason that may pass, by its number.
        disobeyed_mhz: clocks that are accepted and not obeyed.
    """

    counts_energy = True

    def __init__(
        self,
        model: StageModel,
        work: Work,
        threads: VirtualThreads,
        *,
        random_numbers: random.Random,
        noise: GpuNoise,
    ) -> None:
        """Idle at its highest clock; the counter's first move comes at some time of its first period."""
        self.uuid = f"GPU-{threads.rank:08d}"
        self.name = model.name
        self.threads = threads
        self.on_change: Callable[[], None] = lambda: None
        self.lock_call_s = 0.01
        self.num_lock_calls = 0
        self.slowdown = 1.0
        self.capped_from_mhz: float = math.inf
        self.register = ClockRegister()
        self.fails: Callable[[int], bool] = lambda _: False
        self.disobeyed_mhz: frozenset[int] = frozenset()
        self._num_calls = 0
        self._former: deque[tuple[float, int]] = deque(maxlen=64)  # until when which clock was set
        self._ran: deque[tuple[float, int]] = deque(maxlen=64)  # until when it ran at which clock [MHz]
        self.model = model
        self._work = work
        self._random = random_numbers
        self._noise = noise
        self._power_factor = 1 + noise.power * random_numbers.gauss(0, 1)
        self._fault: GpuError | None = None
        self._held_by = ThrottleReason.THERMAL
        # Clocks, as places in the model's.
        self._set_clock = self._clock = self._highest_clock = 0
        self._asked: deque[tuple[float, int]] = deque()
        self._use_clock(0)
        # Energy, exact up to `_exact_at_s`.
        self._energy_j = 0.0
        self._exact_at_s = 0.0
        self._place = 0
        self._busy_until_s = -math.inf
        self._enter(0)
        self._period_s = model.gpu.counter_period_s
        self._usual_move_s = self._next_move_s = self._period_s * (1 + random_numbers.random())
        self._counter_j = self._counted_j = 0.0

    # As `Device`

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        """See `Device`."""
        return self.model.clocks_mhz

    def sm_clock_mhz(self) -> int:
        """See `Device`."""
        self._raise_if_lost()
        if self.register.reports == "clock asked for":
            place = self._asked[-1][1] if self._asked else self._set_clock
            return self.model.clocks_mhz[place] + self.register.offset_mhz
        told_s = self.threads.now_s() - self.register.lag_s
        place = self._set_clock
        for in_force_s, asked in self._asked:
            if in_force_s <= told_s:
                place = asked
        if self.register.lag_s:
            place = next((former for until_s, former in self._former if told_s < until_s), place)
        return self.model.clocks_mhz[max(place, self._highest_clock)] + self.register.offset_mhz

    def lock_clock(self, clock_mhz: int) -> None:
        """See `Device`."""
        place = clock_index_at_most(self.model.gpu, clock_mhz)
        if self.model.clocks_mhz[place] in self.disobeyed_mhz:
            place = self._asked[-1][1] if self._asked else self._set_clock
        self._ask_for(place)
        self.num_lock_calls += 1

    def reset_clock(self) -> None:
        """See `Device`."""
        self._ask_for(0)

    def power_limit_w(self) -> float:
        """See `Device`."""
        return self.model.power_limit_w

    def set_power_limit(self, limit_w: float) -> None:
        """See `Device`."""
        raise NoPermission("nobody sets power limits here")

    def power_w(self) -> float:
        """See `Device`."""
        self._raise_if_lost()
        now_s = self.threads.queue.now_s
        self._integrate(now_s)
        return self._power_w(now_s)

    def total_energy_j(self) -> float:
        """See `Device`."""
        if self._next_move_s <= self.threads.queue.now_s:
            self._move_counter(self.threads.queue.now_s)
        self._raise_if_lost()
        return self._counter_j

    def throttle_reasons(self) -> ThrottleReason:
        """See `Device`."""
        reasons = self._held_by if self._highest_clock > self._set_clock else ThrottleReason.NONE
        is_capped = self.capped_from_mhz <= self.model.clocks_mhz[self._clock]
        return reasons | ThrottleReason.POWER_CAP if is_capped else reasons

    # What its work takes

    def duration_s(self, activity: int) -> float:
        """How long an instruction takes at the clock in force."""
        return self._durations_s[activity]

    def end_of_present_s(self) -> float:
        """When the instruction that the group runs now will have ended here, if the clock stays."""
        self._integrate(self.threads.queue.now_s)
        return self._busy_until_s

    def energy_j(self) -> float:
        """Exactly, up to now; no real GPU tells."""
        self._integrate(self.threads.queue.now_s)
        return self._energy_j

    def catch_up(self) -> None:
        """Goes through all that the group did until now, so that it need not be remembered: `Work.forget` follows."""
        self._move_counter(self.threads.queue.now_s)
        self._integrate(self.threads.queue.now_s)
        self._place = 0

    def clocks_until(self) -> list[tuple[float, int]]:
        """Until when it ran at which clock [MHz], lately and from now on."""
        return [*self._ran, (math.inf, self.model.clocks_mhz[self._clock])]

    # Faults

    def throttle(self, clock_mhz: int | None, held_by: ThrottleReason = ThrottleReason.THERMAL) -> None:
        """From now on heat, or what it is held by, allows no higher clock; None: any."""
        self._held_by = held_by
        place = 0 if clock_mhz is None else clock_index_at_most(self.model.gpu, clock_mhz)
        self._change(highest_clock=place)

    def slow_down(self, factor: float) -> None:
        """From now on instructions take so many times their time, at any clock."""
        self._change(slowdown=factor)

    def deny_permission(self) -> None:
        """Whoever sets the clock is told that he may not."""
        self._fault = NoPermission(f"the clock of {self.uuid} may not be set")

    def lose(self) -> None:
        """It falls off the bus: every call fails. The work goes on."""
        self._fault = GpuLost(f"{self.uuid} is lost")

    def mend(self) -> None:
        """Calls do what they should again."""
        self._fault = None

    # Clocks

    def _ask_for(self, place: int) -> None:
        self._raise_if_failing()
        if self._fault is not None:
            raise self._fault
        up_s, down_s, jitter_s = self.model.gpu.clock_latencies_s
        asked_before = self._asked[-1][1] if self._asked else self._set_clock
        in_force_s = self.threads.now_s() + (down_s if place > asked_before else up_s)
        in_force_s += (jitter_s or self._noise.latency_s) * self._random.random()
        if self._asked:
            in_force_s = max(in_force_s, self._asked[-1][0])
        self._asked.append((in_force_s, place))
        self.threads.spend(self.lock_call_s)
        self.threads.queue.call_at(in_force_s, self._come_into_force)

    def _come_into_force(self) -> None:
        self._former.append((self.threads.queue.now_s, self._set_clock))
        self._change(set_clock=self._asked.popleft()[1])

    def _change(
        self, *, set_clock: int | None = None, highest_clock: int | None = None, slowdown: float | None = None
    ) -> None:
        now_s = self.threads.queue.now_s
        self._integrate(now_s)
        self._set_clock = self._set_clock if set_clock is None else set_clock
        self._highest_clock = self._highest_clock if highest_clock is None else highest_clock
        self.slowdown = self.slowdown if slowdown is None else slowdown
        clock = max(self._set_clock, self._highest_clock)
        if clock == self._clock and slowdown is None:
            return
        before_s = self._durations_s
        self._ran.append((now_s, self.model.clocks_mhz[self._clock]))
        self._use_clock(clock)
        if self._activity >= 0 and self._busy_until_s > now_s:
            left = (self._busy_until_s - now_s) / before_s[self._activity]
            self._busy_until_s = now_s + left * self._durations_s[self._activity]
            self.on_change()

    def _use_clock(self, place: int) -> None:
        self._clock = place
        self._durations_s = tuple(self.slowdown * time_s for time_s in self.model.times_s[place])
        self._powers_w = tuple(self._power_factor * power_w for power_w in self.model.powers_w[place])

    # Energy

    def _move_counter(self, time_s: float) -> None:
        while self._next_move_s <= time_s:
            self._integrate(self._next_move_s)
            error_j = self._noise.counter * self._random.gauss(0, 1) * (self._energy_j - self._counted_j)
            self._counted_j = self._energy_j
            self._counter_j = max(self._counter_j, self._energy_j + error_j)
            self._usual_move_s += self._period_s
            self._next_move_s = self._usual_move_s + self._noise.moves_s * (2 * self._random.random() - 1)

    def _integrate(self, time_s: float) -> None:
        """Brings the exact energy up to a time, through all that was done since."""
        begins = self._work.begins
        at_s, energy_j = self._exact_at_s, self._energy_j
        if time_s < at_s:
            return
        powers = self._powers_w
        while True:
            has_next = self._place + 1 < len(begins)
            end_s = min(begins[self._place + 1][0], time_s) if has_next else time_s
            if self._activity >= 0 and self._busy_until_s < end_s:
                if self._busy_until_s > at_s:
                    energy_j += powers[self._activity] * (self._busy_until_s - at_s)
                    at_s = self._busy_until_s
                energy_j += powers[WAITING] * (end_s - at_s)
            else:
                energy_j += powers[self._activity] * (end_s - at_s)
            at_s = end_s
            if not has_next or begins[self._place + 1][0] > time_s:
                break
            self._enter(self._place + 1)
        self._exact_at_s, self._energy_j = time_s, energy_j

    def _enter(self, place: int) -> None:
        """Goes on to something that the group does, which begins at the time to which the energy is exact."""
        begin_s, activity, factor = self._work.begins[place]
        self._place, self._activity = place, activity
        self._busy_until_s = begin_s + factor * self._durations_s[activity] if activity >= 0 else -math.inf

    def _power_w(self, time_s: float) -> float:
        is_done = self._activity >= 0 and self._busy_until_s <= time_s
        return self._powers_w[WAITING if is_done else self._activity]

    def _raise_if_failing(self) -> None:
        self._num_calls += 1
        if self.fails(self._num_calls):
            raise CallFailed(f"asking {self.uuid} something: timeout")

    def _raise_if_lost(self) -> None:
        self._raise_if_failing()
        if isinstance(self._fault, GpuLost):
            raise self._fault
