"""What only rank 0 does, in a side thread: it reads what all ranks tell, decides, and publishes orders and plans.

About once a second (more often in small jobs) it opens the next round, reads all records of one some rounds ago in one
go, and works on them as arrays. Whatever follows is published with the iteration from which it holds, far enough
ahead that every rank hears of it before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from perseus_core.errors import PerseusError
from perseus_core.runtime.log import Announcer, logger
from perseus_core.runtime.measure.stage_gpu import kind_of_all
from perseus_core.runtime.ranks.conversation import (
    FIGURES,
    NEWS,
    ORDER,
    plan_key,
    report_key,
    round_key,
    round_period_s,
    rounds_kept_open,
)
from perseus_core.runtime.ranks.decisions import ENDING_ITERATIONS, Conclusions, Decisions, Limits
from perseus_core.runtime.ranks.job_table import JobTable
from perseus_core.runtime.ranks.order import News, Order, Phase
from perseus_core.runtime.ranks.plan_summary import PlanSummary
from perseus_core.runtime.ranks.records import StateFlag, as_records
from perseus_core.runtime.ranks.store import Store
from perseus_core.runtime.replan.background_planner import BackgroundPlanner
from perseus_core.runtime.replan.plan_message import PlanMessage
from perseus_core.runtime.reporter import Figures, Reporter
from perseus_core.runtime.side_threads import SideThread, SideThreads

# All ranks open their sessions at the same iteration. A session that gets no answer from its GPU's driver says that it
# is ready without one long before the second limit.
_OPENING_LIMIT_S = 10.0
_READY_LIMIT_S = 60.0
# Within one round every rank has heard of an order; twice as much for threads that come late. Hosts of ranks run ahead
# of each other by an iteration or two.
_ROUNDS_TO_BE_HEARD = 2
_MOST_ITERATIONS_APART = 2
_ROUNDS_UNTIL_GONE = 16
# A rank that trains tells something at every iteration.
_SILENT_ITERATIONS = 50
_SILENT_S = 30.0
_REMEMBERED_PROGRESS = 40


class RankZero:
    """Reads, decides, publishes.

    Attributes:
        planner: makes the plans; none before rank 0 has found its GPU, and none for good if it has none.
        failure: why it does so no longer.
    """

    def __init__(
        self,
        store: Store,
        threads: SideThreads,
        *,
        world_size: int,
        limits: Limits,
        announcer: Announcer,
        reporter: Reporter,
        iteration: Callable[[], int],
    ) -> None:
        """Nobody was heard of yet.

        Args:
            store: what the ranks talk through.
            threads: time and threads.
            world_size: all ranks.
            limits: settings that decisions depend on.
            announcer: what is said is said through it.
            reporter: of what happens.
            iteration: how many iterations have begun here.
        """
        self.planner: BackgroundPlanner | None = None
        self.failure: Exception | None = None
        self._store = store
        self._threads = threads
        self._limits = limits
        self._announcer = announcer
        self._reporter = reporter
        self._iteration = iteration
        self._period_s = round_period_s(world_size)
        self._rounds_open = rounds_kept_open(world_size)
        self._opened_s = threads.now_s()
        self._table = JobTable(world_size)
        self._decisions: Decisions | None = None
        self._news = News()
        self._order = Order(store_speaker=1 if store.is_hosted_here else 0)
        self._figures = reporter.figures
        self._plans: dict[int, PlanMessage] = {}
        self._offered = 0
        self._straggler_slowdown = 1.0
        self._last_verdict_s = 0.0
        self._progress: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED_PROGRESS)
        self._failing = self._leaving = False
        self._thread: SideThread | None = None

    # What the training thread calls

    def start(self) -> None:
        """Begins, in a side thread."""
        self._thread = self._threads.start("perseus-rank-zero", self._step)

    def leave(self, *, failed: bool) -> None:
        """Tells all ranks to go on without us: at once after a failure, else when training has surely ended."""
        self._failing, self._leaving = failed, True
        if self._thread is not None:
            self._thread.wake()

    def join(self, limit_s: float) -> None:
        """Waits at most so long until that is told."""
        if self._thread is not None:
            self._thread.join(limit_s)

    # The side thread

    def _step(self) -> float | None:
        try:
            return self._work()
        except Exception as error:
            self.failure = error
            self._try_to_say_failed()
            return None

    def _work(self) -> float | None:
        now_s = self._threads.now_s()
        self._progress.append((now_s, self._iteration()))
        if self._leaving:
            self._step_aside(0 if self._failing else self._soonest(now_s) + ENDING_ITERATIONS)
            return None
        self._read_round(now_s)
        if not self._order.number:
            self._publish(replace(self._order, phase=Phase.OPENING))
        if self._decisions is None:
            return self._open(now_s)
        self._decide(self._decisions, now_s)
        return None if self._order.phase is Phase.STEPPED_ASIDE else self._period_s

    def _read_round(self, now_s: float) -> None:
        self._tell_news(self._news._replace(round=self._news.round + 1))
        closed = self._news.round - self._rounds_open - 1
        content = self._store.read(round_key(closed))
        if content is not None:
            self._store.delete(round_key(closed))
            self._table.take_in(as_records(content), now_s)
        # What came to a round too late will be told again; nobody reads it there.
        self._store.delete(round_key(closed - _ROUNDS_UNTIL_GONE))

    def _open(self, now_s: float) -> float | None:
        table, since_s = self._table, now_s - self._opened_s
        absent, has_failed = table.absent_ranks(), bool(table.ranks_with(StateFlag.FAILED))
        not_ready = sorted({*table.ranks_without(StateFlag.READY), *table.ranks_with(StateFlag.LEFT)})
        missing: Sequence[int] = absent if table.present.all() or since_s > _OPENING_LIMIT_S else ()
        if since_s > _READY_LIMIT_S:
            missing = absent or not_ready
        if has_failed or missing:
            if not has_failed:  # that rank has said why
                self._announcer.warn(
                    "%s no session of this version: perseus is missing, switched off, failed or another one there; "
                    "training goes on without it",
                    _have(missing),
                )
            self._step_aside(0)
            return None
        if not absent and not not_ready:
            self._begin()
        return self._period_s

    def _begin(self) -> None:
        planner = self.planner
        if planner is not None:
            planner.take_up(self._kinds_of_stages())
        restored = None if planner is None else planner.restored
        decisions = self._decisions = Decisions(
            self._table,
            self._limits,
            baseline=None if restored is None else restored.job.baseline,
            has_profile=planner is not None and planner.known_profile is not None,
            has_plan=restored is not None,
        )
        self._publish(replace(self._order, phase=decisions.phase, baseline=decisions.baseline))

    def _kinds_of_stages(self) -> tuple[int, ...]:
        """The kind of GPU of each stage."""
        kinds, stages = self._table.gpu_kind, self._table.stage
        return tuple(kind_of_all(kinds[stages == stage].tolist()) for stage in range(int(stages.max()) + 1))

    def _decide(self, decisions: Decisions, now_s: float) -> None:
        self._offer_next_plan(decisions)
        soonest = max(self._soonest(now_s), decisions.from_iteration)
        conclusions = decisions.conclude(soonest, self._offered)
        plans = self._plans_that_run(decisions, conclusions)
        order = replace(
            self._order,
            phase=decisions.phase,
            from_iteration=decisions.from_iteration,
            iterations_of_step=decisions.iterations_of_step,
            unlocked_mhz=decisions.unlocked_mhz,
            interlude_until=decisions.interlude_until,
            plans=plans,
            offered=self._offered,
            collection=decisions.collection,
            reason=decisions.reason,
            baseline=decisions.baseline,
            speaker=min(conclusions.aside, default=self._order.speaker),
        )
        self._reporter.tell(decisions, conclusions, replace(order, plans=plans or self._order.plans))
        self._publish(order)
        self._publish_figures()
        self._have_planned(decisions, conclusions)
        self._look_for_silent_ranks(decisions, now_s)

    def _offer_next_plan(self, decisions: Decisions) -> None:
        """Puts the next plan into the store, when the last one is in force."""
        if self.planner is None or self._offered != decisions.plan:
            return
        message = self.planner.plan_after(self._offered)
        if message is None:
            return
        number = message.summary.number
        for stage, plan in enumerate(message.stages):
            self._store.set(plan_key(number, stage), plan.encode())
            self._store.delete(plan_key(number - 2, stage))
        self._plans[number] = message
        self._offered = number

    def _plans_that_run(self, decisions: Decisions, conclusions: Conclusions) -> tuple[PlanSummary, ...]:
        plans = self._order.plans
        if conclusions.applied:
            applied = self._plans.pop(conclusions.applied).summary
            if decisions.baseline is not None and applied.num_microbatches == decisions.baseline.num_microbatches:
                plans = (applied,)  # plans for other numbers of microbatches were made from older measurements
                conclusions.out_of_reach = decisions.begin_watching(applied)
            else:
                others = (plan for plan in plans if plan.num_microbatches != applied.num_microbatches)
                plans = (*others, applied)
        return () if decisions.phase in (Phase.MEASURE_ONLY, Phase.STEPPED_ASIDE) else plans

    def _have_planned(self, decisions: Decisions, conclusions: Conclusions) -> None:
        if conclusions.verdicts:
            self._last_verdict_s = conclusions.verdicts[-1].time_s
        slowdown = float(self._table.straggler_slowdown.max())
        if self.planner is None:
            return
        if conclusions.collect_now and decisions.baseline is not None:
            reports = self._read_reports(decisions.collection)
            self.planner.plan_from(reports, decisions.reason, decisions.baseline, self._last_verdict_s)
        if conclusions.wanted_microbatches:
            self.planner.plan_for(conclusions.wanted_microbatches)
        if slowdown != self._straggler_slowdown:
            self._straggler_slowdown = slowdown
            self.planner.change_policy(None, slowdown)

    def _read_reports(self, collection: int) -> Sequence[bytes]:
        keys = dict.fromkeys(report_key(collection, rank) for rank in range(len(self._table.stage)))
        contents = [self._store.read(key) for key in keys]
        for key in keys:
            self._store.delete(key)
        return [content for content in contents if content is not None]

    def _look_for_silent_ranks(self, decisions: Decisions, now_s: float) -> None:
        """Of ranks that are not heard of any more although all train, as when one could not say that it failed."""
        if decisions.phase is Phase.STEPPED_ASIDE:
            return
        newest = self._table.newest_iteration
        silent = (newest < newest.max() - _SILENT_ITERATIONS) & (self._table.heard_s < now_s - _SILENT_S)
        if silent.any():
            ranks = tuple(silent.nonzero()[0].tolist())
            self._announcer.warn("%s not been heard of for long; training goes on without perseus", _have(ranks))
            decisions.step_aside()
            self._step_aside(0)

    # Publishing

    def _soonest(self, now_s: float) -> int:
        """The first iteration that all ranks will have heard of an order before, if it is given now."""
        iteration = self._iteration()
        then_s, then = self._progress[0]
        per_s = (iteration - then) / (now_s - then_s) if now_s > then_s else 0.0
        return iteration + _MOST_ITERATIONS_APART + max(1, math.ceil(_ROUNDS_TO_BE_HEARD * self._period_s * per_s))

    def _publish(self, order: Order) -> None:
        if self._order.number and order == self._order:
            return
        self._order = replace(order, number=self._order.number + 1)
        self._store.set(ORDER, self._order.encode())
        self._tell_news(self._news._replace(order=self._order.number))

    def _publish_figures(self) -> None:
        figures: Figures = self._reporter.figures
        if figures is not self._figures:
            self._figures = figures
            self._store.set(FIGURES, figures.encode())
            self._tell_news(self._news._replace(figures=self._news.figures + 1))

    def _tell_news(self, news: News) -> None:
        self._news = news
        self._store.set(NEWS, news.encode())

    def _step_aside(self, from_iteration: int) -> None:
        self._publish(replace(self._order, phase=Phase.STEPPED_ASIDE, from_iteration=from_iteration, plans=()))

    def _try_to_say_failed(self) -> None:
        try:
            self._step_aside(0)
        except PerseusError as error:
            logger.debug("the other ranks cannot be told", exc_info=error)


def _have(ranks: Sequence[int]) -> str:
    """The subject and verb of a sentence about some ranks, however many they are."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans[:8])
    more = f" and more, {len(ranks)} in all," if len(spans) > 8 else ""
    return f"rank {shown} has" if len(ranks) == 1 else f"ranks {shown}{more} have"
