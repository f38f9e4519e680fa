"""The session: one object per rank that an adapter tells what training does, and that does all the rest.

Warm up (measure the job as it is) -> profile -> solve, in the background on rank 0 -> run -> watch. All work happens at
the iterations' boundaries and is small; what is slow happens in side threads; nothing waits for another rank for good.
"""

from __future__ import annotations

import atexit

from perseus_core.gpu.device import Device
from perseus_core.planning.policy import Policy
from perseus_core.planning.schedule import Kind
from perseus_core.runtime.background import Background
from perseus_core.runtime.clock.stage_clocks import StageClocks
from perseus_core.runtime.job import Job
from perseus_core.runtime.log import Announcer, logger
from perseus_core.runtime.measure.events import EventSource
from perseus_core.runtime.measure.meter import Meter
from perseus_core.runtime.measure.recorder import Expectation, Record
from perseus_core.runtime.measure.sweep import SweepSettings
from perseus_core.runtime.ranks.decisions import ActivePlan, Coordination, Limits, Orders, Phase, Reason
from perseus_core.runtime.ranks.exchange import Exchange, ExchangeError, Parcel
from perseus_core.runtime.ranks.heartbeat import Heartbeat, Introduction, heartbeats, introductions
from perseus_core.runtime.replan.background_planner import BackgroundPlanner
from perseus_core.runtime.replan.plan_message import PlanMessage, StagePlan
from perseus_core.runtime.replan.rank_report import RankReport, said_orders
from perseus_core.runtime.reporter import Reporter, SessionStatus
from perseus_core.runtime.settings import Settings

# Rows of two iterations ago have arrived long since. Where one has not, a rank is late, and so will be what follows.
_ROW_PATIENCE_S = 0.25
# Training keeps ranks within an iteration of each other. One that is so far behind has stopped talking.
_MOST_ITERATIONS_BEHIND = 16
_LEAVING_S = 2.0
_SWEEP_MAX_ITERATIONS = 8


class Session:
    """One rank's session. No method raises, and none does anything after something of ours has failed."""

    def __init__(
        self,
        settings: Settings,
        job: Job,
        device: Device | None,
        events: EventSource,
        exchange: Exchange,
        *,
        announcer: Announcer,
        office: BackgroundPlanner | None = None,
        background: Background | None = None,
        why_not: str = "",
    ) -> None:
        """Meets the other ranks, which make theirs at the same place. Adapters call `opening.open_session`.

        Args:
            settings: what the user wants.
            job: this rank's place.
            device: its GPU; none where there is none to be had.
            events: marks on its compute stream.
            exchange: connection to the other ranks.
            announcer: what is said is said through it.
            office: on rank 0, the planner.
            background: the side thread that `office` uses.
            why_not: without a GPU, the reason.

        Raises:
            ExchangeError: if the other ranks cannot be met.
        """
        self._settings, self._job, self._exchange = settings, job, exchange
        self._record_event = events.record
        self._office, self._background = office, background
        self._why_not = why_not
        self._meter = Meter(job.stage, device)
        self._device = device
        self._clocks = StageClocks(None if settings.measure_only else device, settings.switch_latency_s)
        self._coordination = Coordination(introductions(exchange.introduce(self._introduction().row())), self._limits())
        self._chronicle = Reporter(announcer, settings, self._coordination)

        self._iteration = 0
        self._record: Record | None = None
        self._order: StagePlan | None = None  # what the iteration should execute, where that is known
        self._plans: dict[int, PlanMessage] = {}
        self._arrived: dict[int, PlanMessage] = {}
        self._received = 0
        self._expected_plan_bytes: Parcel | None = None
        self._expected_parts: Parcel | None = None
        self._part_number, self._part = 0, b""
        self._straggler_slowdown = settings.straggler_slowdown
        self._told_slowdown = settings.straggler_slowdown
        self._last_verdict_s = 0.0
        self._num_rows_sent = 0
        self._leaving_s = _LEAVING_S
        self._failed = self._deaf = self._closed = False

        self._meter.start()
        self._clocks.start()
        atexit.register(self.close)

    # What the adapter calls

    def begin_iteration(self, num_microbatches: int, *, training: bool = True) -> None:
        """An iteration starts: a step of training, or (`training=False`) an evaluation."""
        try:
            if self._record is not None:
                self._end(complete=False)  # the framework left the last one by an exception
            number, self._iteration = self._iteration, self._iteration + 1
            self._hear(number)
            if self._is_silent:
                return
            expectation = self._set_out(num_microbatches if training else 0)
            self._record = Record(number, num_microbatches if training else 0, self._record_event(), expectation)
        except Exception as error:
            self._fail(error)

    def begin_instruction(self, chunk: int, microbatch: int, kind: Kind) -> None:
        """An instruction of this rank's stage starts."""
        record = self._record
        if record is None:
            return
        try:
            event = self._record_event()
            self._clocks.instruction_begins(event)
            step = (chunk, microbatch, kind)
            order = self._order
            if order is not None and record.in_order:
                place = len(record.steps)
                if place >= len(order.steps) or order.steps[place] != step:
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
            event = self._record_event()
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
            self._say_failed()

    def fail(self, error: Exception) -> None:
        """The adapter has failed and will pass nothing on any more: all ranks hear of it, and go on without us."""
        self._fail(error)
        self._say_failed()
        # The others answer when their iteration ends. It will not end before this rank goes on.
        self._leaving_s = 0.0

    def close(self) -> None:
        """Gives the clock back and leaves. Any number of times; takes some seconds at most, whatever hangs."""
        if self._closed:
            return
        self._closed = True
        try:
            atexit.unregister(self.close)
            self._release()
            self._exchange.close(self._leaving_s)
            self._chronicle.end(self._plans.get(self._usual_microbatches))
        except Exception as error:
            logger.debug("leaving failed", exc_info=error)

    def set_policy(self, policy: Policy) -> None:
        """From now on another policy picks the point of the frontier. Call it on rank 0; elsewhere it does nothing."""
        try:
            if self._office is not None:
                self._office.change_policy(policy, None)
        except Exception as error:
            self._fail(error)

    def set_straggler(self, slowdown: float) -> None:
        """A pipeline elsewhere takes `slowdown` (T'/T, 1 or more) times this job's baseline. Any rank may say so."""
        self._straggler_slowdown = max(1.0, slowdown)

    def status(self) -> SessionStatus:
        """Where the session stands."""
        return self._chronicle.status(
            self._iteration,
            self._plans_in_force.get(self._usual_microbatches),
            self._meter.sweep_progress,
            failed=self._failed,
        )

    # An iteration's beginning

    def _hear(self, number: int) -> None:
        """Takes in what the ranks told two iterations ago and does what follows from it."""
        if self._deaf:
            return
        for rows in self._exchange.arrived_rows(number - 1, 0.0 if self._is_silent else _ROW_PATIENCE_S):
            if self._failed:
                continue
            beats = heartbeats(rows)
            self._obey(self._coordination.observe(beats), beats)
        if number - self._coordination.observed > _MOST_ITERATIONS_BEHIND:
            if not self._is_silent:
                raise ExchangeError("the other ranks have not been heard of for many iterations")
            self._deaf = True  # after one of all ranks has failed there is nothing more to tell
        elif not self._failed:
            self._take_parcels()

    def _obey(self, orders: Orders, beats: list[Heartbeat]) -> None:
        coordination = self._coordination
        if orders.phase_changed and coordination.phase is Phase.PROFILE:
            self._start_sweep()
        if orders.verdict is not None:
            self._last_verdict_s = orders.verdict.time_s
        if coordination.collection > self._part_number:
            self._part_number = coordination.collection
            self._part = self._make_part()
        if orders.collect_sizes is not None:
            self._expected_parts = self._exchange.collect(self._part, orders.collect_sizes)
        if orders.distribute_bytes is not None:
            content = None if self._office is None else self._office.plan_after(coordination.plan)
            self._expected_plan_bytes = self._exchange.distribute(content, orders.distribute_bytes)
        if orders.apply is not None:
            self._apply(self._arrived.pop(orders.apply))
        if orders.wanted_microbatches and self._office is not None:
            self._office.plan_for(orders.wanted_microbatches)
        slowdown = max(b.straggler_slowdown for b in beats)
        if slowdown != self._told_slowdown:
            self._told_slowdown = slowdown
            if self._office is not None:
                self._office.change_policy(None, slowdown)
        if orders.aside and self._job.rank == min(orders.aside) and not self._failed:
            logger.warning("%s; all GPUs go on at the clocks the driver chooses, measuring only", self._reason_aside())
        self._chronicle.tell(orders, self._iteration - 1, self._plans.get(self._usual_microbatches))
        if coordination.phase in (Phase.STEPPED_ASIDE, Phase.MEASURE_ONLY) and orders.phase_changed:
            self._plans.clear()
            self._clocks.stop()
        if coordination.phase is Phase.STEPPED_ASIDE and orders.phase_changed:
            self._release()

    def _take_parcels(self) -> None:
        if self._expected_parts is not None and (parts := self._expected_parts.content()) is not None:
            self._expected_parts = None
            baseline = self._coordination.baseline
            if self._office is not None and baseline is not None:
                self._office.plan_from(parts, self._coordination.reason, baseline, self._last_verdict_s)
        if self._expected_plan_bytes is not None and (contents := self._expected_plan_bytes.content()) is not None:
            self._expected_plan_bytes = None
            message = PlanMessage.decode(contents[0])
            self._arrived[message.number] = message
            self._received = message.number

    def _apply(self, message: PlanMessage) -> None:
        if message.num_microbatches == self._usual_microbatches:
            self._plans.clear()  # plans for other numbers of microbatches were made from older measurements
            active = ActivePlan(
                message.number,
                message.num_microbatches,
                message.limit_time_s,
                message.promised_time_s,
                message.saving,
            )
            self._coordination.begin_watching(active, self._iteration - 1)
        self._plans[message.num_microbatches] = message
        self._chronicle.plan_applied(message, self._iteration - 1)

    def _set_out(self, num_microbatches: int) -> Expectation:
        """Sees to the clocks of the iteration that begins, and says what is expected of it."""
        phase = self._coordination.phase
        plan = self._plans_in_force.get(num_microbatches)
        self._order = None
        if plan is not None:
            stage = plan.stages[self._job.stage]
            self._order = stage
            self._clocks.follow(stage.clocks)
            durations_s = tuple(planned.duration_s for planned in stage.clocks)
            return Expectation(plan.number, None, durations_s, tuple(planned.clock_mhz for planned in stage.clocks))
        if phase is Phase.PROFILE and num_microbatches == self._usual_microbatches:
            clock_mhz = self._meter.sweep_clock_mhz
            self._clocks.hold(clock_mhz)
            return Expectation(held_mhz=clock_mhz)
        if self._plans_in_force:
            self._chronicle.cannot_follow(num_microbatches)
        self._clocks.hold(None)
        return Expectation()

    def _leave_order(self, record: Record) -> None:
        """Something else is executed than was planned: the rest of the iteration runs at the driver's clocks."""
        record.in_order = False
        self._clocks.hold(None)
        self._chronicle.order_differs()

    # An iteration's end

    def _end(self, *, complete: bool) -> None:
        record, self._record = self._record, None
        if record is not None:
            self._clocks.end_iteration()
            whole = len(record.steps) == len(record.ends)
            if self._order is not None and len(record.steps) != len(self._order.steps):
                record.in_order = False
            if complete and whole:
                record.end = self._record_event()
                self._meter.recorder.keep(record)
        if self._is_silent:
            self._say_failed()
            return
        self._meter.take_in()
        beat = self._meter.tell(Heartbeat(self._iteration - 1))
        plan = None
        if self._office is not None:
            plan = self._office.plan_after(self._coordination.plan)
        self._send(
            beat._replace(
                can_lock=float(self._clocks.can_be_set),
                part=self._part_number,
                part_bytes=len(self._part),
                plan=self._coordination.plan + 1 if plan is not None else 0,
                plan_bytes=0 if plan is None else len(plan),
                received=self._received,
                straggler_slowdown=self._straggler_slowdown,
            )
        )
        self._chronicle.sweeping(self._meter.sweep_progress, self._meter.sweep_notes)

    # Phases

    def _introduction(self) -> Introduction:
        known = restored = None
        if self._office is not None:
            known, restored = self._office.known_profile, self._office.restored
        baseline = None if restored is None else restored.job.baseline
        return Introduction(
            self._job.stage,
            self._job.data_parallel_rank,
            float(self._clocks.can_be_set),
            float(self._device is not None),
            float(known is not None),
            float(restored is not None),
            0.0 if baseline is None else baseline.time_s,
            0.0 if baseline is None else baseline.energy_j,
            0.0 if baseline is None else baseline.num_microbatches,
        )

    def _limits(self) -> Limits:
        s = self._settings
        return Limits(
            s.measure_only,
            s.warmup_iterations,
            s.baseline_iterations,
            s.watch_iterations,
            s.tolerance,
            s.slow_gpu,
        )

    def _start_sweep(self) -> None:
        assert self._device is not None, "ranks without a GPU do not profile"
        least = self._settings.profile_iterations
        thoroughness = SweepSettings(
            num_clocks=self._settings.profile_clocks,
            min_iterations=least,
            max_iterations=max(least, _SWEEP_MAX_ITERATIONS),
        )
        self._meter.start_sweep(self._device.supported_clocks_mhz(), thoroughness)

    def _make_part(self) -> bytes:
        reason = self._coordination.reason
        pipeline_time_s = self._meter.unlocked_pipeline_time_s(self._usual_microbatches)
        if reason is Reason.BASELINE_CHANGED:
            return RankReport(self._meter.no_measurements(), pipeline_time_s=pipeline_time_s).encode()
        if reason is not Reason.PROFILED:
            stretches = self._meter.stretches(3 if reason is Reason.SPEED_CHANGED else self._settings.watch_iterations)
            return RankReport(self._meter.no_measurements(), stretches).encode()
        said = said_orders(self._job, self._usual_microbatches)
        follows = bool(said) and self._meter.traced == said[self._job.stage]
        return RankReport(
            self._meter.measurements(),
            traced=() if follows else self._meter.traced,
            pipeline_time_s=pipeline_time_s,
        ).encode()

    @property
    def _usual_microbatches(self) -> int:
        baseline = self._coordination.baseline
        return -1 if baseline is None else baseline.num_microbatches

    @property
    def _plans_in_force(self) -> dict[int, PlanMessage]:
        """By number of microbatches."""
        return {} if self._coordination.phase is Phase.RECHECK else self._plans

    # When something is wrong

    @property
    def _is_silent(self) -> bool:
        return self._failed or self._coordination.phase is Phase.STEPPED_ASIDE

    def _reason_aside(self) -> str:
        return str(self._clocks.failure or self._why_not or "this job measures only")

    def _fail(self, error: Exception) -> None:
        """Says once what went wrong, gives the clock back, and lets training go on without us."""
        if self._failed:
            return
        self._failed = True
        self._record = None
        self._deaf = isinstance(error, ExchangeError)
        logger.warning("rank %d: %s: %s; training goes on without perseus", self._job.rank, type(error).__name__, error)
        logger.debug("details", exc_info=error)
        try:
            self._release()
        except Exception as second:
            logger.debug("releasing failed", exc_info=second)

    def _say_failed(self) -> None:
        """Every rank sends a row for every iteration, also one that has given up: the others must not wait for it."""
        try:
            while self._num_rows_sent < self._iteration and not self._deaf:
                self._send(Heartbeat(self._num_rows_sent, failed=float(self._failed)))
        except Exception as error:
            self._deaf = True
            logger.debug("the other ranks cannot be told", exc_info=error)

    def _send(self, beat: Heartbeat) -> None:
        self._num_rows_sent += 1
        self._exchange.send_row(beat.row())

    def _release(self) -> None:
        self._clocks.stop()
        self._meter.stop()
        if self._background is not None:
            self._background.close()
