"""What only rank 0 does: it turns what was collected into plans, in the background, and keeps them for distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from perseus_core.errors import InputError
from perseus_core.planning.policy import Policy
from perseus_core.runtime.background import Background
from perseus_core.runtime.job import Job
from perseus_core.runtime.log import logger
from perseus_core.runtime.measure.profile_cache import ProfileCache
from perseus_core.runtime.measure.stage_measurements import JobMeasurements, merge
from perseus_core.runtime.ranks.decisions import Baseline, Reason
from perseus_core.runtime.replan.job_planner import JobPlanner, MeasuredJob, PlannerState
from perseus_core.runtime.replan.plan_message import PlanMessage
from perseus_core.runtime.replan.rank_report import RankReport, said_orders, traced_orders
from perseus_core.runtime.replan.state_file import save_state


class BackgroundPlanner:
    """Takes orders from the training thread, works on them one after another, and hands out finished plans.

    Attributes:
        known_profile: measurements of this job from the cache.
        restored: the state of an earlier run of this job.
    """

    def __init__(
        self,
        job: Job,
        desk: JobPlanner,
        background: Background,
        *,
        cache: ProfileCache | None = None,
        state_file: str = "",
        known_profile: JobMeasurements | None = None,
        restored: PlannerState | None = None,
    ) -> None:
        """The desk is for the background thread only, from now on."""
        self.known_profile = known_profile
        self.restored = restored
        self._job = job
        self._desk = desk
        self._background = background
        self._cache = cache
        self._state_file = state_file
        self._working: list[Future[PlanMessage | None]] = []
        self._plans: dict[int, bytes] = {}
        if restored is not None:
            desk.restore(restored)
            self._plans[1] = replace(restored.plan, number=1).encode()

    # Orders

    def plan_from(self, contents: Sequence[bytes], reason: Reason, baseline: Baseline, measured_time_s: float) -> None:
        """A plan from what all ranks have sent.

        Args:
            contents: the parts of all ranks.
            reason: why they were collected.
            baseline: of the job.
            measured_time_s: of an iteration under the plan that runs.
        """

        def task() -> None:
            parts = [RankReport.decode(content) for content in contents]
            if reason is Reason.PROFILED:
                self._take_profile(parts, baseline)
            elif reason is Reason.RECOVERED:
                self._desk.forget_corrections()
            elif reason is Reason.BASELINE_CHANGED:
                self._desk.take_baseline(baseline, max(part.pipeline_time_s for part in parts))
            else:
                seen = [stretch for part in parts for stretch in part.stretches]
                self._desk.correct(seen, measured_time_s, speed_changed=reason is Reason.SPEED_CHANGED)

        self._order(task)

    def plan_for(self, num_microbatches: int) -> None:
        """A plan for another number of microbatches than the baseline has; none where there is no schedule for it."""

        def task() -> PlanMessage | None:
            try:
                return self._desk.plan(num_microbatches)
            except InputError as error:
                logger.warning("no plan for %d microbatches: %s", num_microbatches, error)
                return None

        self._working.append(self._background.run(task))

    def change_policy(self, policy: Policy | None, straggler_slowdown: float | None) -> None:
        """A new plan by another policy, or for another slowest pipeline; None leaves it as it is."""

        def task() -> None:
            self._desk.policy = policy or self._desk.policy
            if straggler_slowdown is not None:
                self._desk.straggler_slowdown = straggler_slowdown

        if self._desk.job is None:
            self._background.run(task)
        else:
            self._order(task)

    # Results

    def plan_after(self, number: int) -> bytes | None:
        """The plan to distribute after the one with this number, if it is ready.

        Raises:
            PerseusError: if planning failed.
        """
        still_working = []
        for future in self._working:
            if not future.done():
                still_working.append(future)
                continue
            plan = future.result()
            if plan is not None:
                self._plans[plan.number] = plan.encode()
        self._working = still_working
        return self._plans.get(number + 1)

    # The background thread

    def _order(self, prepare: Callable[[], None]) -> None:
        def task() -> PlanMessage | None:
            prepare()
            plan = self._desk.plan()
            if self._state_file:
                save_state(self._state_file, self._job.key, self._desk.state(plan))
            return plan

        self._working.append(self._background.run(task))

    def _take_profile(self, parts: Sequence[RankReport], baseline: Baseline) -> None:
        measured = self.known_profile
        if measured is None:
            measured = merge([part.measurements for part in parts])
            if self._cache is not None:
                self._cache.save(self._job.key, measured)
        traced = traced_orders(parts, said_orders(self._job, baseline.num_microbatches))
        if traced is not None:
            logger.warning(
                "instructions are executed in another order than the framework says; planning for the real one"
            )
        # The stage that begins first and ends last has seen all of the pipeline.
        pipeline_time_s = max(part.pipeline_time_s for part in parts)
        job = MeasuredJob(measured.profile, measured.blocking_power_w, baseline, pipeline_time_s)
        self._desk.take_measurements(job, traced)
