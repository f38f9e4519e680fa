"""Where the whole job stands and what follows: rank 0 works it out from what all ranks tell, as arrays.

Whatever is decided holds from an iteration that lies so far ahead that all ranks hear of it before (`soonest`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseus_core.runtime.ranks.comparison import Interval
from perseus_core.runtime.ranks.job_table import JobTable
from perseus_core.runtime.ranks.order import Baseline, Phase, Reason
from perseus_core.runtime.ranks.plan_summary import PlanSummary
from perseus_core.runtime.ranks.plan_watch import PlanWatch, Verdict
from perseus_core.runtime.ranks.records import StateFlag
from perseus_core.runtime.ranks.speed_watch import SlowRank, SpeedWatch

# Iterations without a plan of their own that come so often get one; after so many in a row under it they are the usual
# ones.
_OFTEN = 10
_FOR_GOOD = 30
_MOST_COOL_PATIENCE = 1000
# What is measured at a clock lasts so long at least: some moves of the energy counter.
_LEAST_MEASURED_S = 0.5
# What iterations took is remembered so long: verdicts and the status speak of them.
_REMEMBERED_ITERATIONS = 1000
# The baseline is measured in so many interludes.
_YOUNG_INTERLUDES = 3
# A correction that leaves more than this share of what a plan was late has not helped; another would not either.
_HARDLY_LESS = 0.5
# Ranks end their training within so many iterations of each other.
ENDING_ITERATIONS = 16


@dataclass(frozen=True)
class Limits:
    """The few settings that decisions depend on."""

    measure_only: bool
    warmup_iterations: int
    baseline_iterations: int
    watch_iterations: int
    tolerance: float
    slow_gpu: float = 0.05
    max_corrections: int = 3
    profile_iterations: int = 3
    interlude_interval: int = 200
    interlude_iterations: int = 2


@dataclass
class Conclusions:
    """What follows from what was told, beside the job's new state.

    Attributes:
        phase_changed: `phase` is a new one.
        collect_now: all ranks have put their measurements into the store.
        applied: number of the plan that all ranks run from `Decisions.from_iteration` on; 0 for none.
        slow_rank: a GPU has become slower than its profile.
        disobeying: a GPU is slower than its profile, but not where its clock is left to the driver.
        out_of_reach: no plan keeps what is allowed on GPUs as they were seen, so clocks are left to the driver.
        wanted_microbatches: iterations of so many microbatches come often and have no plan; 0 for none.
        verdicts: of the plan that runs, in order.
        aside: ranks because of which all stop.
    """

    phase_changed: bool = False
    collect_now: bool = False
    applied: int = 0
    slow_rank: SlowRank | None = None
    disobeying: SlowRank | None = None
    out_of_reach: bool = False
    wanted_microbatches: int = 0
    verdicts: tuple[Verdict, ...] = ()
    aside: tuple[int, ...] = ()


class Decisions:
    """The job's state.

    Attributes:
        phase: what the job does.
        from_iteration: it does so from this iteration on.
        iterations_of_step: while profiling, how many iterations each clock is held; the first is discarded.
        unlocked_mhz: the highest clock that a GPU of the job held at unlocked clocks; 0 if no rank has told.
        interlude_until: in an interlude, the iteration from which the plan runs again.
        baseline: once measured.
        collection: how often measurements were collected, the one under way included.
        reason: what the newest collection is for.
        plan: number of the plan that was applied last, 0 for none.
        slow_ranks: ranks that were last seen slower than their profile.
    """

    def __init__(
        self,
        table: JobTable,
        limits: Limits,
        *,
        baseline: Baseline | None = None,
        has_profile: bool = False,
        has_plan: bool = False,
    ) -> None:
        """All ranks are there, and each has found its GPU or has none.

        Args:
            table: what the ranks tell.
            limits: settings.
            baseline: of an earlier run of this job, with its plan.
            has_profile: a profile of this job is known.
            has_plan: a plan of this job is known.
        """
        self._table = table
        self._limits = limits
        self._has_profile = has_profile
        self.baseline = baseline
        self.phase = Phase.SOLVE if has_plan and self._can_lock and not limits.measure_only else Phase.WARM_UP
        self.from_iteration = 0
        self.iterations_of_step = 0
        self.unlocked_mhz = 0
        self.interlude_until = 0
        self.collection = 0
        self.reason = Reason.PROFILED
        self.plan = 0
        self._collected = 0
        self._baseline_iterations: dict[int, float] = {}
        self._baseline_microbatches = 0
        self._num_skipped = 0
        self._energy_of: dict[int, float] = {}
        self._time_of: dict[int, float] = {}
        self._newest = -1
        self._interlude_for: Reason | None = None
        self._interlude_ended = 0
        self._of_first_stage = table.stage == 0
        self._speeds = SpeedWatch(table.stage, limits.slow_gpu)
        self._watch: PlanWatch | None = None
        self._corrections = 0
        self._late_by = math.inf  # when the plan was last corrected, as a share of the limit
        self._others: dict[int, int] = {}
        # Iterations in a row with one number of microbatches that is not the baseline's, under a plan of their own.
        self._new_size = self._num_of_new_size = 0
        self._new_size_time_of: dict[int, float] = {}
        self._cool_iterations = 0
        self._cool_patience = 10
        self._is_speed_corrected = False

    @property
    def measures_only(self) -> bool:
        """Whether the user wants no more than measurements."""
        return self._limits.measure_only

    @property
    def slow_ranks(self) -> tuple[int, ...]:
        """Ranks that were last seen slower than their profile."""
        return self._speeds.slow_ranks

    def iteration_energy_j(self, iterations: Sequence[int]) -> float | None:
        """Median energy of some iterations, one GPU for each stage; None while it is not known.

        As of their times: an iteration in which a process was stopped for a minute says nothing of the others.
        """
        known = [self._energy_of[i] for i in iterations if i in self._energy_of]
        return statistics.median(known) if known else None

    def time_ratio(self) -> Interval | None:
        """Time of an iteration under the plan, as a share of one without; None while too little is known."""
        return None if self._watch is None else self._watch.compare(self._time_of)

    def energy_ratio(self) -> Interval | None:
        """The same of energies."""
        return None if self._watch is None else self._watch.compare(self._energy_of)

    def conclude(self, soonest: int, offered: int) -> Conclusions:
        """Goes through what was told since the last call, and says what follows.

        Args:
            soonest: the first iteration that an order given now can hold from.
            offered: number of the newest plan that all ranks can fetch.
        """
        conclusions = Conclusions()
        before = self.phase
        # Energies first: they are told later than times, so a verdict finds as many as possible.
        for iteration, energies_j in self._table.energies_j.complete():
            self._note_energy(iteration, energies_j)
        for iteration, times in self._table.times.complete():
            self._note_time(iteration, times, conclusions)
            if self.phase is not Phase.STEPPED_ASIDE:
                self._advance(soonest, conclusions)
        if self.phase is not Phase.STEPPED_ASIDE:
            self._look_for_trouble(soonest, conclusions)
            self._advance(soonest, conclusions)
            self._apply_what_arrived(soonest, offered, conclusions)
        conclusions.phase_changed = self.phase is not before
        return conclusions

    def begin_watching(self, plan: PlanSummary) -> bool:
        """The plan that was applied last is the one to be judged.

        Returns:
            Whether it is given up before it runs: corrected, it promises to be nearly as late as the one before was.
        """
        # In its first iteration clocks may still change.
        from_iteration = self.from_iteration + 1
        self._watch = PlanWatch(plan, self._limits.watch_iterations, from_iteration)
        self._interlude_ended = from_iteration
        self._speeds.forget()
        self._others.clear()
        self._cool_iterations = 0
        promised_late_by = plan.promised_time_s / plan.limit_time_s - 1
        if self.reason is Reason.SLOWER and promised_late_by > max(
            self._limits.tolerance, _HARDLY_LESS * self._late_by
        ):
            self._step_back(self.from_iteration)
            return True
        return False

    def step_aside(self) -> None:
        """Something failed: the job goes on without us."""
        self.phase, self.plan, self._watch, self.from_iteration = Phase.STEPPED_ASIDE, 0, None, 0

    @property
    def _can_lock(self) -> bool:
        return bool(self._table.which(StateFlag.CAN_LOCK).all())

    def _enter(self, phase: Phase, soonest: int) -> None:
        self.phase, self.from_iteration = phase, soonest

    # One iteration

    def _note_energy(self, iteration: int, energies_j: NDArray[np.float32]) -> None:
        if (energies_j <= 0).any():
            return  # unknown on some rank
        ranks_of_stage = np.bincount(self._table.stage)
        sums_j = np.bincount(self._table.stage, energies_j)
        self._energy_of[iteration] = float((sums_j / ranks_of_stage).sum())
        self._forget_old(self._energy_of, iteration)
        if iteration in self._baseline_iterations and self.baseline is not None:
            energy_j = self.iteration_energy_j(list(self._baseline_iterations))
            self.baseline = Baseline(self.baseline.num_microbatches, self.baseline.time_s, energy_j or 0.0)

    def _forget_old(self, of_iterations: dict[int, float], newest: int) -> None:
        """All but those that the plan is compared by, however far interludes lie apart."""
        kept = frozenset() if self._watch is None else self._watch.compared
        for old in [i for i in of_iterations if i < newest - _REMEMBERED_ITERATIONS and i not in kept]:
            del of_iterations[old]

    def _note_time(self, iteration: int, times: NDArray[Any], conclusions: Conclusions) -> None:
        num_microbatches = int(times["microbatches"][0])
        if num_microbatches == 0 or (times["microbatches"] != num_microbatches).any():
            self._speeds.skip()
            return
        # From its first forward to its last backward, the first stage sees the whole pipeline pass.
        time_s = float(times["span_s"][self._of_first_stage].max())
        self._cool_iterations = 0 if times["throttled"].any() else self._cool_iterations + 1
        if self.phase is Phase.WARM_UP:
            self._note_baseline(iteration, num_microbatches, time_s, times["seen_s"])
        if self.baseline is not None and num_microbatches == self.baseline.num_microbatches:
            self._time_of[iteration] = time_s
            self._forget_old(self._time_of, iteration)
        self._newest = iteration
        self._note_resized(iteration, num_microbatches, time_s, has_plan=bool((times["expected_s"] > 0).any()))
        if self._is_unplanned(iteration):
            is_settled = self.from_iteration < iteration < self.interlude_until
            usual = 0 if self.baseline is None else self.baseline.num_microbatches
            if is_settled and num_microbatches == (self._new_size if self._interlude_for is Reason.RESIZED else usual):
                self._speeds.note_unlocked(times["seen_s"])
            return
        if self._watch is not None and iteration >= self._watch.from_iteration:
            slow = self._speeds.note(iteration, times["seen_s"], times["expected_s"], times["throttled"])
            conclusions.slow_rank = conclusions.slow_rank or slow
        if self.phase in (Phase.RUN, Phase.INTERLUDE) and self._watch is not None:
            if num_microbatches == self._watch.plan.num_microbatches:
                verdict = self._watch.note(iteration, time_s)
                conclusions.verdicts += () if verdict is None else (verdict,)
            else:
                self._count_other(num_microbatches, conclusions)

    def _note_resized(self, iteration: int, num_microbatches: int, time_s: float, *, has_plan: bool) -> None:
        """Counts iterations that no baseline was measured for: nobody judges their plan."""
        if self.baseline is None or num_microbatches == self.baseline.num_microbatches:
            self._new_size = self._num_of_new_size = 0
        elif num_microbatches != self._new_size:
            self._new_size, self._num_of_new_size = num_microbatches, 0
            self._new_size_time_of.clear()
        elif not self._is_unplanned(iteration):
            self._num_of_new_size += has_plan
        elif self.from_iteration < iteration < self.interlude_until:
            self._new_size_time_of[iteration] = time_s

    def _count_other(self, num_microbatches: int, conclusions: Conclusions) -> None:
        count = self._others[num_microbatches] = self._others.get(num_microbatches, 0) + 1
        if count == _OFTEN:
            conclusions.wanted_microbatches = num_microbatches

    def _note_baseline(self, iteration: int, num_microbatches: int, time_s: float, seen_s: NDArray[np.float32]) -> None:
        if num_microbatches != self._baseline_microbatches:
            self._baseline_microbatches = num_microbatches
            self._baseline_iterations.clear()
            self._speeds.forget_unlocked()
            self._num_skipped = 0
        if self._num_skipped < self._limits.warmup_iterations:
            self._num_skipped += 1
        elif len(self._baseline_iterations) < self._limits.baseline_iterations:
            self._baseline_iterations[iteration] = time_s
            self._speeds.note_unlocked(seen_s)

    # What follows

    def _look_for_trouble(self, soonest: int, conclusions: Conclusions) -> None:
        failed = self._table.ranks_with(StateFlag.FAILED)
        if failed:
            self.step_aside()
            conclusions.aside = failed
        elif self._table.which(StateFlag.LEFT).any():
            # Training usually ends, everywhere. If it does not, half a plan is no plan.
            self.step_aside()
            self.from_iteration = soonest + ENDING_ITERATIONS
        elif not self._can_lock and self.phase not in (Phase.WARM_UP, Phase.MEASURE_ONLY):
            self._step_back(soonest)
            conclusions.aside = self._table.ranks_without(StateFlag.CAN_LOCK)

    def _advance(self, soonest: int, conclusions: Conclusions) -> None:
        if self.phase is Phase.WARM_UP and len(self._baseline_iterations) >= self._limits.baseline_iterations:
            self._end_warm_up(soonest, conclusions)
        elif self.phase is Phase.PROFILE and self._table.which(StateFlag.SWEPT).all():
            self._start_collection(Reason.PROFILED, soonest)
        elif self.phase is Phase.COLLECT and (self._table.reported == self.collection).all():
            if self._collected < self.collection:
                self._collected = self.collection
                conclusions.collect_now = True
            self._enter(Phase.SOLVE, self.from_iteration)
        elif self.phase is Phase.RUN:
            self._react(soonest, conclusions)
        elif self.phase is Phase.INTERLUDE and self._newest >= self.interlude_until - 1:
            self._end_interlude(soonest, conclusions)

    def _apply_what_arrived(self, soonest: int, offered: int, conclusions: Conclusions) -> None:
        if self.phase in (Phase.SOLVE, Phase.RUN) and offered > self.plan and (self._table.received == offered).all():
            self.plan = conclusions.applied = offered
            self._enter(Phase.RUN, soonest)

    def _end_warm_up(self, soonest: int, conclusions: Conclusions) -> None:
        self.baseline = self._measured_baseline()
        self._speeds.end_unlocked()
        if self._limits.measure_only:
            self._enter(Phase.MEASURE_ONLY, soonest)
        elif not self._can_lock:
            self._enter(Phase.MEASURE_ONLY, soonest)
            conclusions.aside = self._table.ranks_without(StateFlag.CAN_LOCK)
        elif self._has_profile:
            self._start_collection(Reason.PROFILED, soonest)
        else:
            for_energy = math.ceil(_LEAST_MEASURED_S / self.baseline.time_s)
            self.iterations_of_step = 1 + max(self._limits.profile_iterations, for_energy)
            self.unlocked_mhz = int(self._table.unlocked_mhz.max())
            self._enter(Phase.PROFILE, soonest)

    def _measured_baseline(self) -> Baseline:
        time_s = statistics.median(self._baseline_iterations.values())
        energy_j = self.iteration_energy_j(list(self._baseline_iterations))
        return Baseline(self._baseline_microbatches, time_s, energy_j or 0.0)

    # Interludes

    def _start_interlude(self, then: Reason | None, soonest: int) -> None:
        """Some iterations without a plan, the first of which does not count: clocks may still change in it.

        Args:
            then: why measurements are collected after it; none to judge the plan.
            soonest: when it begins.
        """
        self._interlude_for = then
        self.interlude_until = soonest + 1 + self._limits.interlude_iterations
        self._enter(Phase.INTERLUDE, soonest)

    def _is_unplanned(self, iteration: int) -> bool:
        """Whether an iteration belongs to the interlude, or to the way back from it."""
        return self.phase is Phase.INTERLUDE and self.from_iteration <= iteration <= self.interlude_until

    def _end_interlude(self, soonest: int, conclusions: Conclusions) -> None:
        if self._interlude_for is Reason.RESIZED:
            self._take_new_size(soonest)
            return
        unplanned = [i for i in range(self.from_iteration + 1, self.interlude_until) if i in self._time_of]
        self._enter(Phase.RUN, self.interlude_until)  # as it does already
        self._interlude_ended = self.interlude_until
        assert self._watch is not None, "a plan was judged"
        if self._speeds.has_changed:  # before the interlude, and nobody has reacted yet
            self._take_speed_change()
        self._speeds.end_unlocked()
        if self._interlude_for is Reason.RECOVERED and not self._speeds.may_be_faster_unlocked:
            self._interlude_for, self._is_speed_corrected = None, True
        disobeying = self._speeds.slow_at_set_clocks_only() if self._interlude_for is Reason.SPEED_CHANGED else None
        is_over = self._speeds.is_over if self._interlude_for is Reason.SPEED_CHANGED else False
        if disobeying is not None or is_over:
            self._interlude_for, self._is_speed_corrected = None, False
            if is_over or self._speeds.was_fine:  # it was disturbed, or may only have been
                if not is_over:
                    self._speeds.suspect()
                self._watch.pass_over_interlude(self.interlude_until + 1)
                return
            conclusions.disobeying = disobeying
        if unplanned:
            if self._interlude_for is not None or disobeying is not None:
                self._watch.interludes.clear()  # GPUs were faster, or slower, then
            self._watch.end_interlude(unplanned, self.interlude_until + 1)
            self._watch.forget_what_is_over(self._time_of)
            self._renew_baseline()
        else:  # other numbers of microbatches came, as while a batch grows
            self._watch.pass_over_interlude(self.interlude_until + 1)
        late_by = self._late_by_now()
        if late_by is not None and not self._may_be_corrected(late_by):
            self._step_back(soonest)
        elif self._interlude_for is not None:
            self._start_collection(self._interlude_for, soonest)
        elif late_by is not None:
            self._start_collection(Reason.SLOWER, soonest)

    def _take_new_size(self, soonest: int) -> None:
        """The baseline is that of the iterations that come now; their plan is made, and judged, by it."""
        self._enter(Phase.RUN, self.interlude_until)
        num_microbatches, times_s = self._new_size, dict(self._new_size_time_of)
        self._new_size = self._num_of_new_size = 0
        if not num_microbatches or not times_s:
            self._speeds.forget_unlocked()
            return  # the usual ones are back, or again others have come
        self._speeds.end_unlocked(is_comparable=False)
        self._time_of, self._baseline_iterations = times_s, dict(times_s)  # their energies are told later
        energy_j = self.iteration_energy_j(list(times_s)) or 0.0
        self.baseline = Baseline(num_microbatches, statistics.median(times_s.values()), energy_j)
        self._start_collection(Reason.RESIZED, soonest)

    def _take_speed_change(self) -> None:
        self._speeds.react()
        self._is_speed_corrected = True
        self._interlude_for = Reason.SPEED_CHANGED

    def _renew_baseline(self) -> None:
        """From the last interludes."""
        assert self.baseline is not None, "plans were made for one"
        assert self._watch is not None, "there was an interlude"
        young = [i for each in list(self._watch.interludes)[-_YOUNG_INTERLUDES:] for i in each.unplanned]
        time_s = statistics.median(self._time_of[i] for i in young)
        self._baseline_iterations = dict.fromkeys(young, time_s)  # their energies are told later
        energy_j = self.iteration_energy_j(young) or self.baseline.energy_j
        self.baseline = Baseline(self.baseline.num_microbatches, time_s, energy_j)

    def _late_by_now(self) -> float | None:
        """By how much iterations take longer under the plan than allowed, as a share; none if that may be noise."""
        assert self._watch is not None, "a plan was judged"
        found = self.time_ratio()
        if found is None or found.low <= self._watch.allowed * (1 + self._limits.tolerance):
            return None
        return found.middle / self._watch.allowed - 1

    def _may_be_corrected(self, late_by: float) -> bool:
        """Whether there shall be another plan after one that is late, whatever it is made for.

        One that heat has made late had no fault.
        """
        if self._interlude_for is not None and self._cool_iterations < self._limits.watch_iterations:
            return True
        has_helped = self._corrections == 0 or late_by <= _HARDLY_LESS * self._late_by
        self._corrections += 1
        self._late_by = late_by
        return has_helped and self._corrections <= self._limits.max_corrections

    def _interlude_is_due(self, verdict: Verdict | None) -> bool:
        watch = self._watch
        if watch is None or len(watch.newest_planned) < watch.window:
            return False
        since = self._newest - self._interlude_ended
        if not watch.interludes or since >= self._limits.interlude_interval:
            return True
        # Above the limit it is looked at more closely, but not for ever: it may be noise.
        assert self.baseline is not None, "plans were made for one"
        limit_s = self.baseline.time_s * watch.allowed * (1 + self._limits.tolerance)
        if verdict is None or verdict.time_s <= limit_s:
            return False
        found = self.time_ratio()
        is_new = found is not None and verdict.time_s > self.baseline.time_s * found.high
        return is_new or since >= len(watch.interludes) * watch.window

    def _step_back(self, soonest: int) -> None:
        """Plans did not keep their promise, or a clock cannot be set: clocks are left to the driver for good."""
        self._enter(Phase.MEASURE_ONLY, soonest)
        self.plan, self._watch = 0, None
        self._baseline_iterations.clear()

    def _start_collection(self, reason: Reason, soonest: int) -> None:
        self.collection += 1
        self.reason = reason
        self._enter(Phase.COLLECT, soonest)

    def _react(self, soonest: int, conclusions: Conclusions) -> None:
        verdict = conclusions.verdicts[-1] if conclusions.verdicts else None
        if self._num_of_new_size >= _FOR_GOOD and self._watch is not None:
            self._start_interlude(Reason.RESIZED, soonest)
        elif self._speeds.has_changed and self._watch is not None:
            self._take_speed_change()
            self._start_interlude(Reason.SPEED_CHANGED, soonest)
        elif self._is_speed_corrected and self._cool_iterations >= self._cool_patience:
            # A GPU that is asked for no more than heat allows does not show that it could do more again: try.
            self._cool_patience = min(2 * self._cool_patience, _MOST_COOL_PATIENCE)
            self._is_speed_corrected = False
            self._start_interlude(Reason.RECOVERED, soonest)
        elif self._interlude_is_due(verdict):
            self._start_interlude(None, soonest)
        elif verdict is not None and self._watch is not None and self._watch.num_verdicts % 10 == 0:
            self._corrections = 0
