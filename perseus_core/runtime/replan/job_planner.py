"""From what a whole job has measured to its plan. Knows nothing of ranks, threads and iterations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from perseus_core.errors import InputError
from perseus_core.planning.baselines import all_max
from perseus_core.planning.dag import fitted_latency_s
from perseus_core.planning.execution import Execution
from perseus_core.planning.fitting import fit_profile
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.frontier_file import save_frontier
from perseus_core.planning.plan import make_plan
from perseus_core.planning.policy import Policy, straggler
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import Instruction, InstructionType, Placement, Schedule
from perseus_core.planning.solver import solve
from perseus_core.planning.switching import AT_ONCE, MOST_JITTER_S, SeenChanges, Switching
from perseus_core.runtime.log import logger
from perseus_core.runtime.measure.recorder import Step
from perseus_core.runtime.measure.stage_gpu import StageGpu
from perseus_core.runtime.ranks.order import Baseline
from perseus_core.runtime.replan.correction import Stretches, corrected
from perseus_core.runtime.replan.plan_message import PlanMessage

# By how much more clocks rise early and fall late, in a plan that follows a late one.
_MORE_JITTER = 3.0


@dataclass(frozen=True)
class MeasuredJob:
    """What the planner needs to know.

    Attributes:
        profile: as measured, one GPU for each stage.
        blocking_power_w: of each stage's GPU.
        baseline: the job at unlocked clocks.
        pipeline_time_s: the share of the baseline's iteration from its first instruction to its last; 0 if not known.
        gpus: of each stage; plans use the clocks that they support.
    """

    profile: Profile
    blocking_power_w: tuple[float, ...]
    baseline: Baseline
    pipeline_time_s: float = 0.0
    gpus: tuple[StageGpu, ...] = ()


@dataclass(frozen=True)
class PlannerState:
    """All that a restarted job needs to go on.

    Attributes:
        job: as measured.
        fitted: the profile, fitted and corrected.
        traced: the schedule that runs, where it is not the one the framework says.
        plan: the newest plan.
    """

    job: MeasuredJob
    fitted: Profile
    traced: Schedule | None
    plan: PlanMessage


class JobPlanner:
    """Keeps the job's profile and makes plans from it. One thread at a time.

    Attributes:
        job: what is known; none before the first measurements.
        profile: fitted, and corrected by what was seen.
        policy: picks the point of the frontier.
        straggler_slowdown: T'/T, 1 for none.
    """

    def __init__(
        self,
        schedule: Callable[[int], Schedule],
        policy: Policy,
        *,
        straggler_slowdown: float = 1.0,
        switching: Switching = AT_ONCE,
        frontier_file: str = "",
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Knows nothing yet; `switching` counts until it was measured, `now_s` tells how long planning takes."""
        self.job: MeasuredJob | None = None
        self.profile: Profile | None = None
        self._unhurried_profile: Profile | None = None  # without what was corrected because a plan was late
        self.policy = policy
        self.straggler_slowdown = straggler_slowdown
        self._schedule = schedule
        self._traced: Schedule | None = None
        self._switching = switching
        self._usual_jitter_s = switching.jitter_s
        self._max_changes_per_s = switching.max_changes_per_s
        self._frontier_file = frontier_file
        self._now_s = now_s
        self._baseline: Execution | None = None
        self._time_scale = 1.0
        self._latency_s = 0.0
        self._outside_time_s = 0.0
        self._outside_energy_j = 0.0
        self._margin_s = 0.0
        self._last_plan: PlanMessage | None = None
        self.num_plans = 0

    def take_changes(self, seen: SeenChanges) -> None:
        """What changes of clock were seen to take on the GPU where they take longest."""
        allowed = replace(self._switching, max_changes_per_s=self._max_changes_per_s)
        self._switching = allowed.as_seen(seen)

    def take_measurements(self, job: MeasuredJob, traced: Sequence[Sequence[Step]] | None = None) -> None:
        """Starts from new measurements; `traced` is what each stage executed, where that is not the schedule given."""
        self.job = job
        if traced is not None:
            self._traced = self._schedule_of(traced, job.baseline.num_microbatches)
        self.profile = self._unhurried_profile = self._fitted()
        self._forget_lateness()
        self._calibrate()

    def _fitted(self) -> Profile:
        assert self.job is not None, "there are measurements"
        profile = self.job.profile
        for missing, clock_mhz in profile.missing_at_top():
            logger.warning("%s was not measured at %d MHz: it is estimated there", missing, clock_mhz)
        clocks_mhz = {stage: gpu.supported_clocks_mhz for stage, gpu in enumerate(self.job.gpus)}
        return fit_profile(profile.with_filled_top(), clocks_mhz=clocks_mhz)

    def state(self, plan: PlanMessage) -> PlannerState:
        """What to save beside a plan."""
        assert self.job is not None, "there are measurements"
        return PlannerState(self.job, self._known_profile(), self._traced, plan)

    def restore(self, state: PlannerState) -> PlanMessage:
        """Goes on from a saved state; returns its plan, which becomes number 1."""
        self.job, self._traced = state.job, state.traced
        self.profile = self._unhurried_profile = state.fitted
        self._calibrate()
        self.num_plans = 1
        self._last_plan = state.plan.numbered(1)
        self.take_changes(state.plan.summary.changes)
        return self._last_plan

    def correct(self, stretches: Stretches, measured_time_s: float, baseline_time_s: float) -> None:
        """Takes in why a plan was late.

        Args:
            stretches: how much longer than planned instructions took.
            measured_time_s: of an iteration.
            baseline_time_s: of one without the plan, in the same minutes. What takes longer there, too, is no lateness.
        """
        profile, plan = self._known_profile(), self._last_plan
        assert plan is not None, "only a plan that ran is corrected"
        drift = baseline_time_s / plan.summary.baseline_time_s
        stretches = {which: replace(each, factor=each.factor / drift) for which, each in stretches.items()}
        # What ran faster than planned is no reason to go slower, when all are late.
        slower = {which: replace(each, factor=max(1.0, each.factor)) for which, each in stretches.items()}
        self.profile = corrected(profile, slower)
        problem = self._problem(plan.summary.num_microbatches)
        explained_s = problem.dag.iteration_time_s(_stretched(plan, stretches)) + problem.outside_time_s
        # Clocks may have risen too late, and fallen too early: threads beside training come late on a busy machine.
        jitter_s = min(MOST_JITTER_S, _MORE_JITTER * self._switching.jitter_s)
        self._switching = replace(self._switching, jitter_s=jitter_s)
        self._margin_s += max(0.0, measured_time_s / drift - max(explained_s, plan.summary.promised_time_s))

    def take_speeds(self, stretches: Stretches) -> None:
        """GPUs run at another speed than they were profiled at, with a plan and without."""
        self.profile = self._unhurried_profile = corrected(self._known_profile(), stretches)

    def take_baseline(self, baseline: Baseline, pipeline_time_s: float) -> None:
        """What the job without us is now.

        Args:
            baseline: as measured.
            pipeline_time_s: as in `MeasuredJob`; 0 if it is not known anew.
        """
        assert self.job is not None, "there are measurements"
        is_as_long = baseline.num_microbatches == self.job.baseline.num_microbatches
        known_s = pipeline_time_s or (self.job.pipeline_time_s if is_as_long else 0.0)
        self.job = replace(self.job, baseline=baseline, pipeline_time_s=known_s)
        self._calibrate()

    def forget_corrections(self) -> None:
        """Back to what was measured in the first place."""
        assert self.job is not None, "there are measurements"
        self.profile = self._unhurried_profile = self._fitted()
        self._forget_lateness()
        self._calibrate()

    def _forget_lateness(self) -> None:
        self._margin_s = 0.0
        self._switching = replace(self._switching, jitter_s=self._usual_jitter_s)

    def plan(self, num_microbatches: int | None = None) -> PlanMessage:
        """Makes a plan, by default for as many microbatches as the baseline has.

        Raises:
            InputError: if the policy asks for what cannot be, or there is no schedule for that many microbatches.
        """
        start_s = self._now_s()
        assert self.job is not None, "there are measurements"
        usual = self.job.baseline.num_microbatches
        problem = self._problem(num_microbatches or usual)
        frontier = solve(problem)
        unlocked = all_max(problem)
        if problem.schedule.num_microbatches == usual:
            assert self._baseline is not None, "it was calculated from the measurements"
            # A plan that is corrected is compared with what the job was, and not with what it would be without us now.
            unlocked = replace(
                unlocked, iteration_time_s=self._baseline.iteration_time_s, energy_j=self._baseline.energy_j
            )
        limit_s = self._target_s(frontier, unlocked.iteration_time_s)
        plan = make_plan(
            frontier,
            lambda f, _: max(f.fastest_time_s, min(limit_s, f.min_energy_time_s) - self._margin_s),
            baseline=unlocked,
            switching=self._switching,
        )
        if self._frontier_file and problem.schedule.num_microbatches == usual:
            self._save_for_others(frontier)
        message = PlanMessage.of(
            plan,
            number=self.num_plans + 1,
            # Where corrections make even the fastest plan late, it is still judged by what was promised.
            limit_time_s=max(
                unlocked.iteration_time_s * self.straggler_slowdown,
                limit_s if limit_s > frontier.fastest_time_s else 0.0,
            ),
            solve_s=self._now_s() - start_s,
        )
        self.num_plans += 1
        if message.summary.num_microbatches == usual:
            self._last_plan = message
        return message

    def _save_for_others(self, frontier: Frontier[PipelineProblem]) -> None:
        try:
            save_frontier(frontier, self._frontier_file)
        except InputError as error:
            logger.warning("the frontier is not written: %s", error)

    def _target_s(self, frontier: Frontier[PipelineProblem], baseline_time_s: float) -> float:
        def picked_by(policy: Policy) -> float:
            try:
                return policy(frontier, baseline_time_s)
            except InputError:
                # A job that has become slower may not reach its baseline any more.
                return policy(frontier, max(baseline_time_s, frontier.fastest_time_s))

        target_s = picked_by(self.policy)
        if self.straggler_slowdown > 1:
            target_s = max(target_s, picked_by(straggler(self.straggler_slowdown)))
        return target_s

    def _calibrate(self) -> None:
        """All clocks at maximum take what the baseline was measured to take.

        What it took beyond its instructions is time between them, or outside the pipeline: a constant. What it took
        less was measured too long, as when ranks wait within their instructions while they are profiled.
        """
        assert self.job is not None, "there are measurements"
        baseline = self.job.baseline
        hurried, self.profile = self.profile, self._unhurried_profile
        self._time_scale = 1.0
        self._latency_s = self._outside_time_s = self._outside_energy_j = 0.0
        instructions_s = all_max(self._problem(baseline.num_microbatches)).iteration_time_s
        self._time_scale = min(1.0, (self.job.pipeline_time_s or baseline.time_s) / instructions_s)
        problem = self._problem(baseline.num_microbatches)
        self._latency_s = fitted_latency_s(problem.dag, all_max(problem).durations_s, self.job.pipeline_time_s)
        pipeline = all_max(self._problem(baseline.num_microbatches))
        self._outside_time_s = max(0.0, baseline.time_s - pipeline.iteration_time_s)
        if baseline.energy_j:
            unlocked = all_max(self._problem(baseline.num_microbatches))
            self._outside_energy_j = max(0.0, baseline.energy_j - unlocked.energy_j)
        unlocked = all_max(self._problem(baseline.num_microbatches))
        self._baseline = replace(unlocked, iteration_time_s=baseline.time_s)
        self.profile = hurried

    def _problem(self, num_microbatches: int) -> PipelineProblem:
        assert self.job is not None, "there are measurements"
        return PipelineProblem.of(
            _scaled(self._known_profile(), self._time_scale),
            self.schedule(num_microbatches),
            self.job.blocking_power_w,
            transfer_latency_s=self._latency_s,
            gap_s=self._latency_s,
            outside_time_s=self._outside_time_s,
            outside_energy_j=self._outside_energy_j,
        )

    def schedule(self, num_microbatches: int) -> Schedule:
        """The schedule that runs: what was traced counts for more than what was said."""
        if self._traced is not None:
            if self._traced.num_microbatches != num_microbatches:
                raise InputError(f"the order of {num_microbatches} microbatches was not traced")
            return self._traced
        return self._schedule(num_microbatches)

    def _schedule_of(self, traced: Sequence[Sequence[Step]], num_microbatches: int) -> Schedule:
        """What was traced, on chunks that lie over the stages as the framework says."""
        try:
            placement = self._schedule(num_microbatches).placement
        except InputError:
            placement = Placement.LOOP
        stages = tuple(tuple(Instruction(stage, *step) for step in steps) for stage, steps in enumerate(traced))
        num_chunks = max(i.chunk for order in stages for i in order) + 1
        return Schedule("traced", num_chunks, num_microbatches, stages, placement=placement)

    def _known_profile(self) -> Profile:
        assert self.profile is not None, "there are measurements"
        return self.profile


def _scaled(profile: Profile, factor: float) -> Profile:
    """Instructions so much longer, at the same power."""
    if factor == 1:
        return profile
    return Profile(
        tuple(replace(m, time_s=factor * m.time_s, energy_j=factor * m.energy_j) for m in profile.measurements)
    )


def _stretched(plan: PlanMessage, stretches: Stretches) -> list[float]:
    """How long each instruction of a plan really takes [s], stage after stage."""
    durations_s = []
    for stage, of_stage in enumerate(plan.stages):
        for (chunk, _, kind), planned in zip(of_stage.steps, of_stage.clocks, strict=True):
            stretch = stretches.get((InstructionType(stage, chunk, kind), planned.clock_mhz))
            durations_s.append(planned.duration_s * (1.0 if stretch is None else stretch.factor))
    return durations_s
