"""The session: one object per rank that an adapter tells what training does, and that does all the rest.

Warm up (measure the job as it is) -> profile -> solve, in the background on rank 0 -> run -> watch. All work on the
training thread happens at the iterations' boundaries and is small; what is slow happens in side threads; nothing waits
for another rank.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from perseus_core.gpu.device import Device
from perseus_core.planning.policy import Policy
from perseus_core.planning.schedule import Kind
from perseus_core.planning.switching import Switching
from perseus_core.runtime.clock.give_back import GuardedClock
from perseus_core.runtime.clock.settable_clock import Guard
from perseus_core.runtime.clock.stage_clocks import StageClocks
from perseus_core.runtime.job import Job
from perseus_core.runtime.log import Announcer, logger
from perseus_core.runtime.measure.events import Event, EventSource, NotRecorded
from perseus_core.runtime.measure.meter import Meter
from perseus_core.runtime.measure.recorder import Expectation, Record
from perseus_core.runtime.measure.stage_gpu import UNKNOWN_GPU, StageGpu
from perseus_core.runtime.measure.sweep import sweep_clocks
from perseus_core.runtime.rank_zero import RankZero
from perseus_core.runtime.ranks import records
from perseus_core.runtime.ranks.conversation import Conversation, RankZeroUnheard
from perseus_core.runtime.ranks.decisions import Limits
from perseus_core.runtime.ranks.order import Order, Phase, Reason
from perseus_core.runtime.ranks.records import RankState
from perseus_core.runtime.ranks.store import Store, StoreError
from perseus_core.runtime.replan.background_planner import BackgroundPlanner
from perseus_core.runtime.replan.plan_message import StagePlan
from perseus_core.runtime.replan.rank_report import RankReport, said_orders
from perseus_core.runtime.reporter import NO_FIGURES, Figures, Reporter, SessionStatus
from perseus_core.runtime.settings import Settings
from perseus_core.runtime.side_threads import SideThreads

# What a session may take of training when it ends, whatever hangs.
_ENDING_S = 0.9
# So many iterations in a row may pass in which no mark can be put on the compute stream; others would miss us later.
_MOST_UNMARKED = 20
# A driver or a file system that has not answered by then has hung.
_PREPARING_LIMIT_S = 20.0


@dataclass(frozen=True)
class Prepared:
    """What is found out beside training when a session opens: it may take a driver or a file system a while.

    Attributes:
        device: this rank's GPU; none where there is none to be had.
        gpu: what kind it is, and its clocks.
        why_not: without a GPU, the reason.
        planner: on rank 0, with a GPU.
        switching: what changes of clock take, until it has been measured; none for what the settings say.
        counter_window_s: of its period, what the energy counter measures; 0 for all of it.
    """

    device: Device | None = None
    gpu: StageGpu = field(default=UNKNOWN_GPU, repr=False)
    why_not: str = ""
    planner: BackgroundPlanner | None = None
    switching: Switching | None = None
    counter_window_s: float = 0.0


class Session:
    """One rank's session. No method raises, and none does anything after something of ours has failed."""

    def __init__(
        self,
        settings: Settings,
        job: Job,
        events: EventSource,
        store: Store,
        *,
        prepare: Callable[[], Prepared],
        threads: SideThreads,
        announcer: Announcer,
        guard: Guard = GuardedClock,
    ) -> None:
        """Waits for nobody. Adapters call `opening.open_session`.

        Args:
            settings: what the user wants.
            job: this rank's place.
            events: marks on its compute stream.
            store: what the ranks talk through.
            prepare: looks for the GPU and whatever else may take a while, in a side thread.
            threads: time and threads.
            announcer: what is said is said through it.
            guard: makes the clock that is set, and given back.
        """
        self._settings, self._job = settings, job
        self._events = events
        self._threads, self._guard = threads, guard
        self._announcer = announcer
        self._iteration = 0
        self._opened_s = threads.now_s()
        self._preparing: Future[Prepared] | None = threads.run(prepare)
        self._prepared = Prepared()
        self._meter = Meter(job.stage, None, threads)
        self._clocks = StageClocks(None, settings.switching.up_s, threads=threads)
        self._conversation = Conversation(
            store,
            threads,
            rank=job.rank,
            world_size=job.world_size,
            stage=job.stage,
            data_parallel_rank=job.data_parallel_rank,
            iteration=lambda: self._iteration,
            wants_figures=announcer.has_metric and job.rank != 0,
        )
        self._reporter = Reporter(announcer, settings.log_interval)
        self._rank_zero: RankZero | None = None
        if job.rank == 0:
            self._rank_zero = RankZero(
                store,
                threads,
                world_size=job.world_size,
                limits=_limits(settings),
                announcer=announcer,
                reporter=self._reporter,
                iteration=lambda: self._iteration,
            )

        self._record: Record | None = None
        self._num_unmarked = 0  # iterations in a row that could not be followed for want of marks
        self._order = Order()  # the one in force
        self._awaited = Order()  # the newest, which may hold from a later iteration on
        self._stage_plan: StagePlan | None = None  # what the iteration should execute, where that is known
        self._stage_plans: dict[int, StagePlan] = {}
        self._collected = 0
        self._straggler_slowdown = settings.straggler_slowdown
        self._figures, self._figures_as_sent = self._reporter.figures, b""
        self._policy: Policy | None = None  # set before there was a planner
        self._pid = os.getpid()
        self._failed = self._closed = False

        self._conversation.start()
        if self._rank_zero is not None:
            self._rank_zero.start()
        atexit.register(self.close)

    # What the adapter calls

    def begin_iteration(self, num_microbatches: int, *, training: bool = True) -> None:
        """An iteration starts: a step of training, or (`training=False`) an evaluation."""
        try:
            if self._record is not None:
                self._end(complete=False)  # the framework left the last one by an exception
            number, self._iteration = self._iteration, self._iteration + 1
            if self._is_silent:
                return
            self._look_at_order(number)
            if self._is_silent or self._preparing is not None:
                return
            num_microbatches = num_microbatches if training else 0
            begin = self._mark()
            expectation = self._set_out(number, num_microbatches, begin)
            if begin is not None:
                self._record = Record(number, num_microbatches, begin, expectation, self._events.knows_host_time)
        except Exception as error:
            self._fail(error)

    def begin_instruction(self, chunk: int, microbatch: int, kind: Kind) -> None:
        """An instruction of this rank's stage starts."""
        record = self._record
        if record is None:
            return
        try:
            event = self._mark()
            if event is None:
                self._follow_no_further()
                return
            self._clocks.instruction_begins(event)
            step = (chunk, microbatch, kind)
            plan = self._stage_plan
            if plan is not None and record.in_order:
                place = len(record.steps)
                if place >= len(plan.steps) or plan.steps[place] != step:
                    self._leave_order(record)
            record.steps.append(step)
            record.begins.append(event)
        except Exception as error:
            self._fail(error)

    def end_instruction(self) -> None:
        """The instruction that started last has ended."""
        record = self._record
        if record is None:
            return
        try:
            event = self._mark()
            if event is None:
                self._follow_no_further()
                return
            self._clocks.instruction_ends(event)
            record.ends.append(event)
        except Exception as error:
            self._fail(error)

    def end_iteration(self) -> None:
        """The iteration has ended."""
        try:
            self._end(complete=True)
        except Exception as error:
            self._fail(error)

    def fail(self, error: Exception) -> None:
        """The adapter has failed and will pass nothing on any more: all ranks hear of it, and go on without us."""
        self._fail(error)

    def close(self) -> None:
        """Gives the clock back and leaves. Any number of times; takes a second at most, whatever hangs."""
        if self._closed or os.getpid() != self._pid:  # a forked child has this session's exit handler, too
            return
        self._closed = True
        try:
            atexit.unregister(self.close)
            self._release(_ENDING_S, failed=self._failed)
            self._reporter.end(self._order)
        except Exception as error:
            logger.debug("leaving failed", exc_info=error)

    def set_policy(self, policy: Policy) -> None:
        """From now on another policy picks the point of the frontier. Call it on rank 0; elsewhere it does nothing."""
        try:
            if self._prepared.planner is not None:
                self._prepared.planner.change_policy(policy, None)
            else:
                self._policy = policy
        except Exception as error:
            self._fail(error)

    def set_straggler(self, slowdown: float) -> None:
        """A pipeline elsewhere takes `slowdown` (T'/T, 1 or more) times this job's baseline. Any rank may say so."""
        self._straggler_slowdown = max(1.0, slowdown)

    def status(self) -> SessionStatus:
        """Where the session stands."""
        baseline, plan = self._order.baseline, self._order.plan_for(self._order.usual_microbatches)
        progress = self._meter.sweep_progress
        figures = self._figures if plan is not None else NO_FIGURES
        return SessionStatus(
            Phase.STEPPED_ASIDE if self._failed else self._order.phase,
            self._iteration,
            "" if progress is None else str(progress),
            0.0 if baseline is None else baseline.time_s,
            0.0 if baseline is None else baseline.energy_j,
            0 if plan is None else plan.number,
            self._stage_plan is not None,
            0.0 if plan is None else plan.saving,
            0.0 if plan is None else plan.slowdown,
            0.0 if plan is None else plan.gap,
            0.0 if plan is None else plan.solve_s,
            figures.iteration_time_s,
            figures.energy_j,
            figures.saving,
            figures.slowdown,
            figures.saving_between,
            figures.slowdown_between,
            figures.iterations,
            0 if progress is None else progress.iterations_done,
            figures.slow_ranks,
        )

    # An iteration's beginning

    def _look_at_order(self, number: int) -> None:
        """Does what rank 0 wants of this rank, as far as that is known here."""
        self._take_prepared()
        if self._conversation.failure is not None:
            raise self._conversation.failure
        if self._conversation.is_stuck():
            raise StoreError("the job's rendezvous store has not answered for a minute of training")
        if self._rank_zero is not None and self._rank_zero.failure is not None:
            raise self._rank_zero.failure
        newest = self._conversation.order
        if newest is not self._awaited:
            self._awaited = newest
            if newest.collection > self._collected:
                self._collected = newest.collection
                self._conversation.report(newest.collection, self._make_report(newest).encode())
        # One that holds from an iteration which is over already came late. That harms nothing: it holds from now on.
        if newest is not self._order and newest.from_iteration <= number:
            self._obey(newest, number)
        self._hand_on_figures()

    def _hand_on_figures(self) -> None:
        """To the user's metrics, where this rank keeps them, and to whoever asks for the status."""
        if self._rank_zero is not None:
            figures = self._reporter.figures
        elif self._conversation.figures is not self._figures_as_sent:
            self._figures_as_sent = self._conversation.figures
            figures = Figures.decode(self._figures_as_sent)
        else:
            return
        if figures is not self._figures:
            self._figures = figures
            for name, value in figures.metrics().items():
                self._announcer.measure(name, value)

    def _obey(self, order: Order, number: int) -> None:
        before, self._order = self._order, order
        for plan in order.plans:
            if plan.number not in self._stage_plans:
                content = self._conversation.plan(plan.number)
                assert content is not None, "a plan runs when all ranks have it"
                self._stage_plans[plan.number] = StagePlan.decode(content)
                self._reporter.plan_applied(plan, number, order.usual_microbatches)
        running = {plan.number for plan in order.plans}
        self._stage_plans = {plan: stage for plan, stage in self._stage_plans.items() if plan in running}
        if order.phase is before.phase:
            return
        if order.speaker == self._job.rank:
            logger.warning("%s; all GPUs go on at the clocks the driver chooses, measuring only", self._reason_aside())
        if order.phase is Phase.PROFILE:
            self._start_sweep()
        elif order.phase is Phase.MEASURE_ONLY:
            self._clocks.stop(0.0)
        elif order.phase is Phase.STEPPED_ASIDE:
            self._release(0.0, failed=False)

    def _set_out(self, number: int, num_microbatches: int, begin: Event | None) -> Expectation:
        """Sees to the clocks of the iteration that begins, and says what is expected of it.

        One without marks cannot follow a plan; one clock can be held all the same, from about its beginning on.
        """
        order, self._stage_plan = self._order, None
        runs_plan = order.plans_run_in(number) and begin is not None
        plan = order.plan_for(num_microbatches) if runs_plan else None
        if plan is not None:
            self._stage_plan = stage = self._stage_plans[plan.number]
            self._clocks.follow(stage.clocks, plan.switching)
            durations_s = tuple(planned.duration_s for planned in stage.clocks)
            return Expectation(plan.number, None, durations_s, tuple(planned.clock_mhz for planned in stage.clocks))
        if order.phase is Phase.PROFILE and num_microbatches == order.usual_microbatches:
            clock_mhz = self._meter.sweep_clock_mhz(number - order.from_iteration)
            self._clocks.hold(clock_mhz, begin)
            return Expectation(held_mhz=clock_mhz)
        if order.plans and runs_plan:
            self._reporter.cannot_follow(num_microbatches)
        self._clocks.hold(None, begin)
        return Expectation()

    def _mark(self) -> Event | None:
        """A mark on the compute stream; none where there can be none now: the iteration is not followed then."""
        try:
            return self._events.record()
        except NotRecorded as why:
            self._num_unmarked += 1
            if self._num_unmarked > _MOST_UNMARKED:
                raise
            self._reporter.not_followed(self._iteration - 1, str(why))
            return None

    def _follow_no_further(self) -> None:
        """The rest of the iteration has no marks: it follows no plan, and is not measured."""
        self._record = None
        if self._clocks.following:
            self._clocks.hold(None)

    def _leave_order(self, record: Record) -> None:
        """Something else is executed than was planned: the rest of the iteration runs at the driver's clocks."""
        record.in_order = False
        self._clocks.hold(None)
        self._reporter.order_differs()

    # An iteration's end

    def _end(self, *, complete: bool) -> None:
        record, self._record = self._record, None
        if record is not None:
            self._clocks.end_iteration()
            whole = len(record.steps) == len(record.ends)
            if self._stage_plan is not None and len(record.steps) != len(self._stage_plan.steps):
                record.in_order = False
            if complete and whole:
                record.end = self._mark()
            if record.end is not None:
                self._num_unmarked = 0
                self._meter.recorder.keep(record)
        if self._is_silent:
            return
        with self._events.between_iterations():
            self._meter.take_in()
        rank, tell = self._job.rank, self._conversation.tell
        for t in self._meter.new_timings():
            tell(
                records.iteration_time(
                    rank, t.iteration, t.num_microbatches, t.span_s, t.seen_s, t.expected_s, t.throttled
                )
            )
        for iteration, energy_j in self._meter.new_energies_j():
            tell(records.iteration_energy(rank, iteration, energy_j))
        self._conversation.tell_state(self._state())
        self._reporter.sweeping(self._meter.sweep_progress, self._meter.sweep_notes)

    def _state(self, *, left: bool = False) -> RankState:
        return RankState(
            ready=self._preparing is None,
            can_lock=self._clocks.can_be_set,
            failed=self._failed,
            left=left,
            swept=self._meter.has_swept,
            straggler_slowdown=self._straggler_slowdown,
            unlocked_mhz=self._meter.unlocked_mhz,
            gpu_kind=self._prepared.gpu.kind,
        )

    # Opening, and what is asked of this rank

    def _take_prepared(self) -> None:
        """Takes what the side thread has found, once it is there, or goes on without."""
        if self._preparing is None:
            return
        if self._preparing.done():
            self._prepared = self._preparing.result()
        elif self._threads.now_s() - self._opened_s > _PREPARING_LIMIT_S:
            self._prepared = Prepared(why_not=f"the GPU driver has not answered for {_PREPARING_LIMIT_S:g} s")
        else:
            return
        self._preparing = None
        device = self._prepared.device
        self._meter = Meter(self._job.stage, device, self._threads, self._prepared.counter_window_s)
        self._meter.start()
        settable = None if self._settings.measure_only else device
        self._clocks = StageClocks(
            settable,
            (self._prepared.switching or self._settings.switching).up_s,
            threads=self._threads,
            guard=self._guard,
            slices=None if settable is None else self._events.slices(settable.uuid),
        )
        self._clocks.start()
        if self._rank_zero is not None and self._prepared.planner is not None:
            if self._policy is not None:
                self._prepared.planner.change_policy(self._policy, None)
            self._rank_zero.planner = self._prepared.planner
        self._conversation.tell_state(self._state())

    def _start_sweep(self) -> None:
        supported = self._prepared.gpu.supported_clocks_mhz
        clocks = sweep_clocks(supported, self._settings.profile_clocks, self._order.unlocked_mhz)
        self._meter.start_sweep(supported, clocks, self._order.iterations_of_step)

    def _make_report(self, order: Order) -> RankReport:
        rank, meter, reason = self._job.rank, self._meter, order.reason
        pipeline_time_s = meter.unlocked_pipeline_time_s(order.usual_microbatches)
        changes = self._clocks.seen_changes
        if reason is not Reason.PROFILED:
            stretches = meter.stretches(3 if reason is Reason.SPEED_CHANGED else self._settings.watch_iterations)
            return RankReport(
                rank,
                meter.no_measurements(),
                stretches,
                pipeline_time_s=pipeline_time_s,
                changes=changes,
            )
        said, gpu = said_orders(self._job, order.usual_microbatches), self._prepared.gpu
        follows = bool(said) and meter.traced == said[self._job.stage]
        return RankReport(
            rank,
            meter.measurements(),
            traced=() if follows else meter.traced,
            pipeline_time_s=pipeline_time_s,
            changes=changes,
            gpu=gpu if self._job.data_parallel_rank == 0 else StageGpu(gpu.kind),
        )

    # When something is wrong

    @property
    def _is_silent(self) -> bool:
        return self._failed or self._closed or self._order.phase is Phase.STEPPED_ASIDE

    def _reason_aside(self) -> str:
        return str(self._clocks.failure or self._prepared.why_not or "this job measures only")

    def _fail(self, error: Exception) -> None:
        """Says once what went wrong, gives the clock back, and lets training go on without us."""
        if self._failed:
            return
        self._failed = True
        self._record = None
        self._say(error)
        logger.debug("details", exc_info=error)
        try:
            self._release(0.0, failed=True)
        except Exception as second:
            logger.debug("releasing failed", exc_info=second)

    def _say(self, error: Exception) -> None:
        """A failure of one rank is said there; one that all ranks have at the same time by one of them."""
        rank = self._job.rank
        if isinstance(error, RankZeroUnheard) and not error.is_first:
            return
        if isinstance(error, StoreError) and rank != self._awaited.store_speaker:
            return
        logger.warning("rank %d: %s: %s; training goes on without perseus", rank, type(error).__name__, error)

    def _release(self, limit_s: float, *, failed: bool) -> None:
        """Gives the clock back and ends all side threads; waits for them no longer than `limit_s` in all."""
        until_s = self._threads.now_s() + limit_s
        self._conversation.leave(self._state(left=True))
        if self._rank_zero is not None:
            self._rank_zero.leave(failed=failed)
        self._meter.stop(0.0)
        self._clocks.stop(limit_s)
        for join in (self._conversation.join, self._meter.stop):
            join(max(0.0, until_s - self._threads.now_s()))
        if self._rank_zero is not None:
            self._rank_zero.join(max(0.0, until_s - self._threads.now_s()))
        self._threads.close()
        self._events.close()


def _limits(settings: Settings) -> Limits:
    return Limits(
        settings.measure_only,
        settings.warmup_iterations,
        settings.baseline_iterations,
        settings.watch_iterations,
        settings.tolerance,
        settings.slow_gpu,
        interlude_interval=settings.interlude_interval,
        interlude_iterations=settings.interlude_iterations,
        profile_iterations=settings.profile_iterations,
    )
