"""What only rank 0 does: it turns what was collected into plans, beside training, and keeps them for distribution."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from perseus_core.errors import InputError
from perseus_core.planning.policy import Policy
from perseus_core.runtime.job import Job
from perseus_core.runtime.log import logger
from perseus_core.runtime.measure.profile_cache import ProfileCache
from perseus_core.runtime.measure.stage_measurements import JobMeasurements, merge
from perseus_core.runtime.ranks.order import Baseline, Reason
from perseus_core.runtime.replan.job_planner import JobPlanner, MeasuredJob, PlannerState
from perseus_core.runtime.replan.plan_message import PlanMessage
from perseus_core.runtime.replan.rank_report import JobReport, said_orders, traced_orders
from perseus_core.runtime.replan.state_file import save_state
from perseus_core.runtime.side_threads import SideThreads


class BackgroundPlanner:
    """Takes tasks from any thread, works on them one after another, and hands out finished plans.

    Attributes:
        known_profile: measurements of this job from the cache.
        restored: the state of an earlier run of this job. Both are none where `take_up` finds that GPUs were others.
    """

    def __init__(
        self,
        job: Job,
        planner: JobPlanner,
        threads: SideThreads,
        *,
        cache: ProfileCache | None = None,
        state_file: str = "",
        known_profile: JobMeasurements | None = None,
        profile_clocks: int = 2,
        restored: PlannerState | None = None,
    ) -> None:
        """From now on the planner is for the tasks only, which `threads` runs; sweeps measure `profile_clocks`."""
        self.known_profile = known_profile
        self.restored = restored
        self._job = job
        self._planner = planner
        self._threads = threads
        self._cache = cache
        self._state_file = state_file
        self._profile_clocks = profile_clocks
        self._lock = threading.Lock()  # of what follows
        self._working: deque[Future[PlanMessage | None]] = deque()
        self._plans: dict[int, PlanMessage] = {}

    def take_up(self, gpu_kinds: tuple[int, ...]) -> None:
        """Goes on with what is known, unless it was measured on other GPUs than the stages have now.

        Args:
            gpu_kinds: of each stage.
        """
        if self.known_profile is not None and self.known_profile.gpu_kinds != gpu_kinds:
            logger.warning(
                "profile cache not used, profiling again: it was measured on other GPUs than the stages have"
            )
            self.known_profile = None
        if self.restored is not None and tuple(gpu.kind for gpu in self.restored.job.gpus) != gpu_kinds:
            logger.warning("the session's state is not used, starting afresh: its stages had other GPUs")
            self.restored = None
        if self.restored is not None:
            self._begin(partial(self._planner.restore, self.restored))

    # Tasks

    def plan_from(self, contents: Sequence[bytes], reason: Reason, baseline: Baseline, measured_time_s: float) -> None:
        """A plan from what all ranks have sent.

        Args:
            contents: their reports; each element holds those of any number of ranks.
            reason: why they were collected.
            baseline: of the job.
            measured_time_s: of an iteration under the plan that runs.
        """

        def task() -> PlanMessage:
            report = JobReport.decode(contents)
            if report.num_ranks < self._job.world_size:
                logger.warning("planning with what %d of %d ranks have sent", report.num_ranks, self._job.world_size)
            self._planner.take_changes(report.changes)
            if reason is Reason.PROFILED:
                self._take_profile(report, baseline)
            else:
                if reason is Reason.SPEED_CHANGED:
                    self._planner.take_speeds(report.stretches)
                elif reason is Reason.RECOVERED:
                    self._planner.forget_corrections()
                elif reason is Reason.SLOWER:
                    self._planner.correct(report.stretches, measured_time_s, baseline.time_s)
                self._planner.take_baseline(baseline, report.pipeline_time_s)
            return self._new_plan()

        self._begin(task)

    def plan_for(self, num_microbatches: int) -> None:
        """A plan for another number of microbatches than the baseline has; none where there is no schedule for it."""

        def task() -> PlanMessage | None:
            try:
                return self._planner.plan(num_microbatches)
            except InputError as error:
                logger.warning("no plan for %d microbatches: %s", num_microbatches, error)
                return None

        self._begin(task)

    def change_policy(self, policy: Policy | None, straggler_slowdown: float | None) -> None:
        """Another policy, or another slowest pipeline, and a new plan if there was one; None leaves it as it is."""

        def task() -> PlanMessage | None:
            if policy is not None:
                self._planner.policy = policy
            if straggler_slowdown is not None:
                self._planner.straggler_slowdown = straggler_slowdown
            return None if self._planner.job is None else self._new_plan()

        self._begin(task)

    def _begin(self, task: Callable[[], PlanMessage | None]) -> None:
        with self._lock:
            self._working.append(self._threads.run(task))

    # Results

    def plan_after(self, number: int) -> PlanMessage | None:
        """The plan to distribute after the one with this number, if it is ready. Plans up to that one are forgotten.

        Raises:
            PerseusError: if planning failed.
        """
        with self._lock:
            self._plans = {known: plan for known, plan in self._plans.items() if known > number}
            while self._working and self._working[0].done():
                plan = self._working.popleft().result()
                if plan is not None:
                    self._plans[plan.summary.number] = plan
            return self._plans.get(number + 1)

    # In a side thread

    def _new_plan(self) -> PlanMessage:
        plan = self._planner.plan()
        if self._state_file:
            save_state(self._state_file, self._job.key, self._planner.state(plan))
        return plan

    def _keep(self, measured: JobMeasurements) -> None:
        """In the cache, unless so much is missing that the next run had better measure again."""
        num_clocks = measured.num_clocks
        if 2 * num_clocks < self._profile_clocks:
            logger.warning(
                "only %d of %d clocks could be measured: the plan saves less than it could, and the next run measures "
                "again",
                num_clocks,
                self._profile_clocks,
            )
        elif self._cache is not None:
            self._cache.save(self._job.key, measured)

    def _take_profile(self, report: JobReport, baseline: Baseline) -> None:
        measured = self.known_profile
        if measured is None:
            kinds = tuple(gpu.kind for gpu in report.gpus)
            measured = replace(merge(report.sweeps, kinds), changes=report.changes)
            self._keep(measured)
        else:
            self._planner.take_changes(measured.changes)
        traced = traced_orders(report, said_orders(self._job, baseline.num_microbatches))
        if traced is not None:
            logger.warning(
                "instructions are executed in another order than the framework says; planning for the real one"
            )
        job = MeasuredJob(measured.profile, measured.blocking_power_w, baseline, report.pipeline_time_s, report.gpus)
        self._planner.take_measurements(job, traced)
