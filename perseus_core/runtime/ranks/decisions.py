"""Where the whole job stands, worked out by every rank for itself from the same heartbeats.

All ranks feed the heartbeats of the same iteration in the same order into the same code, so they come to the same
conclusions without asking each other. What follows from the heartbeats of iteration n holds from iteration n + 2 on:
by then every rank has them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from perseus_core.runtime.ranks.heartbeat import Heartbeat, Introduction
from perseus_core.runtime.ranks.iteration_stream import IterationStream
from perseus_core.runtime.ranks.plan_watch import PlanWatch, Verdict
from perseus_core.runtime.ranks.speed_watch import RankSpeed, SlowRank, SpeedWatch

# Iterations without a plan of their own that come so often get one.
_OFTEN = 10
_MOST_COOL_PATIENCE = 1000


class Phase(Enum):
    """What the job does."""

    WARM_UP = "warm up"
    PROFILE = "profile"
    COLLECT = "collect"
    SOLVE = "solve"
    RUN = "run"
    RECHECK = "recheck"
    MEASURE_ONLY = "measure only"
    STEPPED_ASIDE = "stepped aside"


class Reason(Enum):
    """Why measurements are collected."""

    PROFILED = "profiled"
    SLOWER = "slower than allowed"
    SPEED_CHANGED = "a GPU changed its speed"
    RECOVERED = "a GPU may be as fast as before"
    BASELINE_CHANGED = "the job itself has become slower"


@dataclass(frozen=True)
class Baseline:
    """The job without us: clocks left to the driver.

    Attributes:
        num_microbatches: of one iteration.
        time_s: of one iteration.
        energy_j: of one iteration, one GPU for each stage; 0 while not known.
    """

    num_microbatches: int
    time_s: float
    energy_j: float = 0.0


@dataclass(frozen=True)
class ActivePlan:
    """What the ranks need to know of a plan to judge it.

    Attributes:
        number: plans are numbered from 1.
        num_microbatches: of the iteration it is for.
        limit_time_s: how long an iteration may take under it.
        promised_time_s: how long it should take.
        promised_saving: share of the energy that it should save.
    """

    number: int
    num_microbatches: int
    limit_time_s: float
    promised_time_s: float
    promised_saving: float


@dataclass
class Orders:
    """What the heartbeats of one iteration ask every rank to do now.

    Attributes:
        collect_sizes: bytes each rank sends to rank 0 now.
        distribute_bytes: bytes of a plan that rank 0 sends to all now.
        apply: number of the plan to run from now on.
        slow_rank: a GPU has become slower than its profile.
        wanted_microbatches: iterations of so many microbatches come often and have no plan; 0 for none.
        verdict: of the plan that runs.
        aside: ranks because of which all stop.
        phase_changed: `phase` is a new one.
    """

    collect_sizes: tuple[int, ...] | None = None
    distribute_bytes: int | None = None
    apply: int | None = None
    slow_rank: SlowRank | None = None
    wanted_microbatches: int = 0
    verdict: Verdict | None = None
    aside: tuple[int, ...] = ()
    phase_changed: bool = False


@dataclass(frozen=True)
class Limits:
    """The few settings that decisions depend on; the same on all ranks."""

    measure_only: bool
    warmup_iterations: int
    baseline_iterations: int
    watch_iterations: int
    tolerance: float
    slow_gpu: float = 0.05
    max_corrections: int = 3


@dataclass
class Coordination:
    """The job's state.

    Attributes:
        introductions: of all ranks.
        limits: settings.
        phase: what the job does.
        baseline: once measured.
        collection: how often measurements were collected, the one under way included.
        reason: what the newest collection is for.
        plan: number of the plan that runs, 0 for none.
        observed: how many iterations' heartbeats have been taken in.
    """

    introductions: Sequence[Introduction]
    limits: Limits
    phase: Phase = Phase.WARM_UP
    baseline: Baseline | None = None
    collection: int = 0
    reason: Reason = Reason.PROFILED
    plan: int = 0
    observed: int = 0
    _times: IterationStream = field(init=False)
    _energies: IterationStream = field(init=False)
    _baseline_iterations: dict[int, float] = field(default_factory=dict)
    _baseline_microbatches: int = 0
    _num_skipped: int = 0
    _energy_of: dict[int, float] = field(default_factory=dict)
    _collected: int = 0
    _distributed: int = 0
    _speeds: SpeedWatch = field(init=False)
    _watch: PlanWatch | None = None
    _corrections: int = 0
    _recheck_from: int = 0
    _others: dict[int, int] = field(default_factory=dict)
    _cool_iterations: int = 0
    _cool_patience: int = 10
    _is_speed_corrected: bool = False

    def __post_init__(self) -> None:
        self._times = IterationStream(len(self.introductions))
        self._energies = IterationStream(len(self.introductions))
        self._speeds = SpeedWatch([int(i.stage) for i in self.introductions], self.limits.slow_gpu)
        first = self.introductions[0]
        if first.saved_baseline_time_s:
            self.baseline = Baseline(
                int(first.saved_num_microbatches), first.saved_baseline_time_s, first.saved_baseline_energy_j
            )
        if first.has_plan and self.can_lock and not self.limits.measure_only:
            self.phase = Phase.SOLVE

    @property
    def can_lock(self) -> bool:
        """Whether, at the start, every rank could set its clock."""
        return all(i.can_lock for i in self.introductions)

    @property
    def slow_ranks(self) -> tuple[int, ...]:
        """Ranks that were last seen slower than their profile."""
        return self._speeds.slow_ranks

    @property
    def is_settled(self) -> bool:
        """Whether the plan in force has been judged once."""
        return self._watch is not None and self._watch.num_verdicts > 0

    @property
    def may_correct(self) -> bool:
        """Whether another correction is allowed."""
        return self._corrections < self.limits.max_corrections

    def iteration_energy_j(self, iterations: Sequence[int]) -> float | None:
        """Mean energy of some iterations, one GPU for each stage; None while it is not known."""
        known = [self._energy_of[i] for i in iterations if i in self._energy_of]
        return statistics.fmean(known) if known else None

    def observe(self, beats: Sequence[Heartbeat]) -> Orders:
        """Takes in the heartbeats of the next iteration and says what follows."""
        orders = Orders()
        before = self.phase
        self.observed += 1
        # Energies first: they are told later than times, so a verdict finds as many as possible.
        for iteration, of_ranks in self._energies.add([b.counted for b in beats], beats):
            self._note_energy(iteration, [b.energy_j for b in of_ranks])
        for iteration, of_ranks in self._times.add([b.timed for b in beats], beats):
            self._note_time(iteration, of_ranks, orders)
        if self.phase is not Phase.STEPPED_ASIDE:
            self._look_for_trouble(beats, orders)
            self._advance(beats, orders)
        orders.phase_changed = self.phase is not before
        return orders

    def begin_watching(self, plan: ActivePlan, from_iteration: int) -> None:
        """A plan is in force from an iteration on."""
        self._watch = PlanWatch(plan, self.limits.watch_iterations, self.limits.tolerance, from_iteration + 1)
        self._speeds.forget()
        self._others.clear()
        self._cool_iterations = 0

    def step_back(self) -> None:
        """Plans did not keep their promise: clocks are left to the driver for good."""
        self.phase, self.plan, self._watch = Phase.MEASURE_ONLY, 0, None

    # One iteration

    def _note_energy(self, iteration: int, energies_j: Sequence[float]) -> None:
        if any(energy <= 0 for energy in energies_j):
            return  # unknown on some rank
        by_stage: dict[int, list[float]] = {}
        for introduction, energy_j in zip(self.introductions, energies_j, strict=True):
            by_stage.setdefault(int(introduction.stage), []).append(energy_j)
        self._energy_of[iteration] = sum(statistics.fmean(of_stage) for of_stage in by_stage.values())
        for old in [i for i in self._energy_of if i < iteration - 1000]:
            del self._energy_of[old]
        is_of_baseline = iteration in self._baseline_iterations and self.phase is not Phase.RECHECK
        if is_of_baseline and self.baseline is not None:
            mean_j = self.iteration_energy_j(list(self._baseline_iterations))
            self.baseline = Baseline(self.baseline.num_microbatches, self.baseline.time_s, mean_j or 0.0)

    def _note_time(self, iteration: int, of_ranks: Sequence[Heartbeat], orders: Orders) -> None:
        counts = {int(b.num_microbatches) for b in of_ranks}
        if counts == {0} or len(counts) > 1:
            self._speeds.skip()
            return
        num_microbatches = counts.pop()
        # From its first forward to its last backward, the first stage sees the whole pipeline pass.
        time_s = max(
            b.span_s for b, introduction in zip(of_ranks, self.introductions, strict=True) if introduction.stage == 0
        )
        self._cool_iterations = 0 if any(b.throttled for b in of_ranks) else self._cool_iterations + 1
        if self.phase is Phase.WARM_UP:
            self._note_baseline(iteration, num_microbatches, time_s)
        elif self._is_recheck(iteration) and num_microbatches == self._baseline_microbatches:
            self._baseline_iterations[iteration] = time_s
        if self._watch is None or iteration >= self._watch.from_iteration:
            speeds = [RankSpeed(b.seen_s, b.expected_s, bool(b.throttled)) for b in of_ranks]
            orders.slow_rank = orders.slow_rank or self._speeds.note(speeds, iteration)
        if self.phase is Phase.RUN and self._watch is not None:
            if num_microbatches == self._watch.plan.num_microbatches:
                orders.verdict = self._watch.note(iteration, time_s) or orders.verdict
            else:
                self._count_other(num_microbatches, orders)

    def _count_other(self, num_microbatches: int, orders: Orders) -> None:
        count = self._others[num_microbatches] = self._others.get(num_microbatches, 0) + 1
        if count == _OFTEN:
            orders.wanted_microbatches = num_microbatches

    def _note_baseline(self, iteration: int, num_microbatches: int, time_s: float) -> None:
        if num_microbatches != self._baseline_microbatches:
            self._baseline_microbatches = num_microbatches
            self._baseline_iterations.clear()
            self._num_skipped = 0
        if self._num_skipped < self.limits.warmup_iterations:
            self._num_skipped += 1
        else:
            self._baseline_iterations[iteration] = time_s

    # All iterations

    def _look_for_trouble(self, beats: Sequence[Heartbeat], orders: Orders) -> None:
        failed = tuple(rank for rank, b in enumerate(beats) if b.failed)
        unable = tuple(rank for rank, b in enumerate(beats) if not b.can_lock)
        if failed:
            self.phase, self.plan, orders.aside = Phase.STEPPED_ASIDE, 0, failed
        elif unable and self.phase not in (Phase.WARM_UP, Phase.MEASURE_ONLY):
            self.phase, self.plan, self._watch, orders.aside = Phase.MEASURE_ONLY, 0, None, unable

    def _advance(self, beats: Sequence[Heartbeat], orders: Orders) -> None:
        if self.phase is Phase.WARM_UP and len(self._baseline_iterations) >= self.limits.baseline_iterations:
            self._end_warm_up(beats, orders)
        elif self.phase is Phase.PROFILE and all(b.sweep_done for b in beats):
            self._start_collection(Reason.PROFILED)
        elif self.phase is Phase.COLLECT and all(b.part == self.collection for b in beats):
            if self._collected < self.collection:
                self._collected = self.collection
                orders.collect_sizes = tuple(int(b.part_bytes) for b in beats)
            self.phase = Phase.SOLVE
        elif self.phase is Phase.RUN:
            self._react(orders)
        elif self.phase is Phase.RECHECK and len(self._baseline_iterations) >= self.limits.baseline_iterations:
            self._end_recheck()
        if self.phase in (Phase.SOLVE, Phase.RUN):
            newest = int(beats[0].plan)
            if newest > self._distributed:
                self._distributed = newest
                orders.distribute_bytes = int(beats[0].plan_bytes)
            received = min(int(b.received) for b in beats)
            if received > self.plan:
                self.plan = orders.apply = received
                self.phase = Phase.RUN

    def _end_warm_up(self, beats: Sequence[Heartbeat], orders: Orders) -> None:
        self.baseline = self._measured_baseline()
        if self.limits.measure_only:
            self.phase = Phase.MEASURE_ONLY
        elif unable := tuple(rank for rank, b in enumerate(beats) if not b.can_lock):
            self.phase, orders.aside = Phase.MEASURE_ONLY, unable
        elif self.introductions[0].has_profile:
            self._start_collection(Reason.PROFILED)
        else:
            self.phase = Phase.PROFILE

    def _measured_baseline(self) -> Baseline:
        time_s = statistics.median(self._baseline_iterations.values())
        energy_j = self.iteration_energy_j(list(self._baseline_iterations))
        return Baseline(self._baseline_microbatches, time_s, energy_j or 0.0)

    def _start_recheck(self) -> None:
        """Corrections have not helped. Whether the plan is to blame only an iteration without it can tell."""
        assert self.baseline is not None, "a plan was compared with it"
        self.phase = Phase.RECHECK
        self._baseline_microbatches = self.baseline.num_microbatches
        self._baseline_iterations.clear()
        # One iteration more goes on with the plan, and in the one after that the clocks may still change.
        self._recheck_from = self.observed + 2

    def _is_recheck(self, iteration: int) -> bool:
        return self.phase is Phase.RECHECK and iteration >= self._recheck_from

    def _end_recheck(self) -> None:
        found = self._measured_baseline()
        assert self.baseline is not None, "there was one before"
        if found.time_s > self.baseline.time_s * (1 + self.limits.tolerance):
            self.baseline = found
            self._corrections = 0
            self._start_collection(Reason.BASELINE_CHANGED)
        else:
            self.step_back()

    def _start_collection(self, reason: Reason) -> None:
        self.collection += 1
        self.reason = reason
        self.phase = Phase.COLLECT

    def _react(self, orders: Orders) -> None:
        if self._speeds.has_changed:
            self._speeds.react()
            self._is_speed_corrected = True
            self._start_collection(Reason.SPEED_CHANGED)
        elif self._is_speed_corrected and self._cool_iterations >= self._cool_patience:
            # A GPU that is asked for no more than heat allows does not show that it could do more again: try.
            self._cool_patience = min(2 * self._cool_patience, _MOST_COOL_PATIENCE)
            self._is_speed_corrected = False
            self._start_collection(Reason.RECOVERED)
        elif orders.verdict is not None and orders.verdict.is_slow:
            if self.may_correct:
                self._corrections += 1
                self._start_collection(Reason.SLOWER)
            else:
                self._start_recheck()
        elif orders.verdict is not None and self._watch is not None and self._watch.num_verdicts % 10 == 0:
            self._corrections = 0
