"""What only rank 0 does, stepped by hand in virtual time: it reads what ranks tell, decides, and publishes."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_core.errors import PerseusError
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.runtime.log import Announcer
from perseus_core.runtime.rank_zero import RankZero
from perseus_core.runtime.ranks import records
from perseus_core.runtime.ranks.conversation import (
    FIGURES,
    NEWS,
    ORDER,
    plan_key,
    report_key,
    round_key,
    round_period_s,
    rounds_kept_open,
    talking_period_s,
)
from perseus_core.runtime.ranks.decisions import Limits
from perseus_core.runtime.ranks.order import Baseline, News, Order, Phase, Reason
from perseus_core.runtime.ranks.plan_summary import PlanSummary
from perseus_core.runtime.ranks.records import RankState, as_records
from perseus_core.runtime.ranks.store import LocalStore, StoreError
from perseus_core.runtime.replan.plan_message import PlanMessage, StagePlan
from perseus_core.runtime.reporter import Figures, Reporter
from tests.planned_clocks import without_gaps

from .ranks.stepped_threads import SteppedThreads

LIMITS = Limits(False, 1, 2, 3, 0.01, max_corrections=3)
STAGES = 2


class WatchedStore(LocalStore):
    """A store that counts what is set, and fails when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.num_set: Counter[str] = Counter()
        self.error: Exception | None = None

    @property
    def keys(self) -> set[str]:
        return set(self._values)

    def set(self, key: str, value: bytes) -> None:
        if self.error is not None:
            raise self.error
        self.num_set[key] += 1
        super().set(key, value)


class HandPlanner:
    """Stands for a `BackgroundPlanner`: has the plans that the test gives it, and writes down what it is asked."""

    known_profile = None
    restored = None

    def __init__(self) -> None:
        self.plans: dict[int, PlanMessage] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def take_up(self, gpu_kinds: tuple[int, ...]) -> None:
        pass

    def plan_after(self, number: int) -> PlanMessage | None:
        if self.error is not None:
            raise self.error
        return self.plans.get(number + 1)

    def plan_from(self, *arguments: Any) -> None:
        self.asked.append(("from", *arguments))

    def plan_for(self, num_microbatches: int) -> None:
        self.asked.append(("for", num_microbatches))

    def change_policy(self, policy: None, straggler_slowdown: float) -> None:
        self.asked.append(("policy", policy, straggler_slowdown))


def a_plan(number: int, num_microbatches: int = 8) -> PlanMessage:
    orders = one_f_one_b(STAGES, num_microbatches).stages
    stages = tuple(
        StagePlan(
            tuple((0, i.microbatch, i.kind) for i in order),
            tuple(without_gaps(*((1000 + number, 0.05) for _ in order))),
        )
        for order in orders
    )
    return PlanMessage(PlanSummary(number, num_microbatches, 1.0, 1.0, 180.0, 1.0, 200.0, 0.0, 0.1), stages)


class Job:
    """Rank 0's thread, and ranks that tell what the test says; half of them are on each of two stages."""

    def __init__(self, world_size: int = 4, limits: Limits = LIMITS) -> None:
        self.store = WatchedStore()
        self.threads = SteppedThreads()
        self.world_size = world_size
        self.iteration = 0
        self.period_s = round_period_s(world_size)
        self.planner = HandPlanner()
        announcer = Announcer(speaks=True)
        self.reporter = Reporter(announcer, 0)
        self.rank_zero = RankZero(
            self.store,
            self.threads,
            world_size=world_size,
            limits=limits,
            announcer=announcer,
            reporter=self.reporter,
            iteration=lambda: self.iteration,
        )
        self.rank_zero.planner = self.planner  # type: ignore[assignment]
        self.rank_zero.start()
        self.thread = self.threads.threads["perseus-rank-zero"]
        self.round()

    @property
    def order(self) -> Order:
        return Order.decode(self.store.read(ORDER) or b"")

    @property
    def news(self) -> News:
        return News.decode(self.store.read(NEWS) or b"")

    def stage(self, rank: int) -> int:
        return rank * STAGES // self.world_size

    def tell(self, *told: bytes) -> None:
        """In the round that is open."""
        self.store.append(round_key(self.news.round), b"".join(told))

    def tell_state(self, *ranks: int, **state: Any) -> None:
        for rank in ranks or range(self.world_size):
            self.tell(records.state(rank, RankState(**{"ready": True, "can_lock": True, **state})))

    def hello(self, ranks: Collection[int]) -> None:
        self.tell(*(records.hello(rank, self.stage(rank), 0) for rank in ranks))

    def round(self) -> float | None:
        self.threads.time_s += self.period_s
        wait = self.thread.step()
        assert wait is None or wait == self.period_s
        return self.period_s if wait is not None else None

    def rounds(self, number: int | None = None) -> None:
        """By default as many as it takes until what was told before has been read, and one more."""
        for _ in range(rounds_kept_open(self.world_size) + 2 if number is None else number):
            self.round()

    def until_s(self, time_s: float) -> None:
        while self.threads.time_s + self.period_s < time_s:
            self.round()

    def train(self, number: int = 1, *, ranks: Collection[int] | None = None, **told: Any) -> None:
        """Iterations of which ranks tell, one each round; `unplanned_s` is what those without the plan take."""
        for _ in range(number):
            span_s = told.get("span_s", 1.0)
            if not self.order.plans_run_in(self.iteration):
                span_s = told.get("unplanned_s", span_s)
            for rank in range(self.world_size) if ranks is None else ranks:
                self.tell(
                    records.iteration_time(rank, self.iteration, told.get("num_microbatches", 8), span_s, 0, 0, False),
                    records.iteration_energy(rank, self.iteration, 100.0),
                )
            self.iteration += 1
            self.round()

    def open(self) -> None:
        self.hello(range(self.world_size))
        self.tell_state()
        self.rounds()

    def run_plan(self) -> None:
        self.open()
        self.train(6)
        assert self.order.phase is Phase.PROFILE
        self.tell_state(swept=True)
        self.rounds()
        assert self.order.phase is Phase.COLLECT
        self.tell_state(swept=True, reported=1)
        self.rounds()
        assert self.order.phase is Phase.SOLVE
        self.planner.plans[1] = a_plan(1)
        self.rounds()
        self.tell_state(swept=True, reported=1, received=1)
        self.rounds()
        assert [plan.number for plan in self.order.plans] == [1]


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Opening


def test_rank_zero_is_heard_of_at_once() -> None:
    """Whoever waits for it, waits for no rank."""
    job = Job()
    assert (job.order.number, job.order.phase, job.news.order) == (1, Phase.OPENING, 1)


def test_the_job_begins_when_all_ranks_are_there_and_have_looked_for_their_gpus() -> None:
    """A driver may take its time."""
    job = Job()
    job.hello(range(4))
    job.tell_state(0, 1, 2)
    job.until_s(50)
    assert job.order.phase is Phase.OPENING
    job.tell_state(3)
    job.rounds()
    assert (job.order.phase, job.order.number) == (Phase.WARM_UP, 2)


@pytest.mark.parametrize(
    ("present", "world_size", "named"),
    [
        (range(8), 16, "ranks 8 to 15 have no session"),
        ([0, 1, 2, 3, 4, 6, 7], 8, "rank 5 has no session"),
        ([0, 2, 3, 6], 8, "ranks 1, 4 to 5, 7 have no session"),
        (range(0, 40, 2), 40, "ranks 1, 3, 5, 7, 9, 11, 13, 15 and more, 20 in all, have no session"),
        ([0], 16_384, "ranks 1 to 16383 have no session"),
    ],
)
def test_ranks_that_are_absent_are_named_after_ten_seconds(
    present: Collection[int], world_size: int, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line, however many they are; all others step aside at once."""
    job = Job(world_size)
    job.hello(present)
    job.tell_state(*present)
    job.until_s(9.9)
    assert (_warnings(caplog), job.order.phase) == ([], Phase.OPENING)
    job.rounds()
    (line,) = _warnings(caplog)
    assert line.startswith(named)
    assert line.endswith("training goes on without it")
    assert (job.order.phase, job.order.from_iteration) == (Phase.STEPPED_ASIDE, 0)
    assert job.thread.has_ended


def test_a_rank_of_another_version_is_named_as_soon_as_all_are_there(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is waited for that does not come."""
    job = Job()
    job.hello([0, 1, 3])
    other = as_records(records.hello(2, 1, 0)).copy()
    other["b"] += 1
    job.tell(other.tobytes())
    job.rounds()
    (line,) = _warnings(caplog)
    assert line.startswith("rank 2 has no session of this version")
    assert job.order.phase is Phase.STEPPED_ASIDE
    assert job.threads.time_s < 1


def test_a_rank_that_failed_to_open_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """Others that have not introduced themselves yet are not to blame; why it failed it has said itself."""
    job = Job()
    job.hello([0, 3])
    job.tell_state(3, failed=True)
    job.rounds()
    assert _warnings(caplog) == []
    assert (job.order.phase, job.order.from_iteration) == (Phase.STEPPED_ASIDE, 0)
    assert job.threads.time_s < 1


def test_a_rank_that_fails_before_the_job_begins_says_so_itself(caplog: pytest.LogCaptureFixture) -> None:
    """All step aside without another word."""
    job = Job()
    job.hello(range(4))
    job.tell_state(2, failed=True)
    job.rounds()
    assert (_warnings(caplog), job.order.phase) == ([], Phase.STEPPED_ASIDE)


# Orders


def test_orders_are_published_only_when_something_has_changed() -> None:
    """Iterations that lead to nothing make no rank fetch anything."""
    job = Job(limits=Limits(False, 50, 2, 2, 0.01))
    job.open()
    number, num_set = job.order.number, job.store.num_set[ORDER]
    job.train(40)
    job.rounds(100)
    assert (job.order.number, job.news.order, job.store.num_set[ORDER]) == (number, number, num_set)
    job.train(20)
    job.rounds()
    assert job.order.phase is Phase.PROFILE
    assert job.store.num_set[ORDER] == job.order.number == job.news.order


def test_under_a_plan_that_keeps_its_promise_nothing_is_published_but_figures_and_interludes() -> None:
    """For as long as it runs."""
    job = Job()
    job.run_plan()
    job.train(20)
    number = job.order.number
    job.train(180)
    assert job.order.number == number
    job.train(400)
    assert job.order.number == number + 2 * 2
    assert job.news.figures > 10
    figures = Figures.decode(job.store.read(FIGURES) or b"")
    assert (figures.iteration_time_s, figures.energy_j, figures.saving) == (1.0, 200.0, 0.0)


@settings(max_examples=60)
@given(
    st.floats(0.01, 20.0),
    st.floats(0, 1),
    st.sampled_from([2, 200, 4096]),
    st.integers(0, 2),
    st.floats(0, 1),
)
def test_what_is_ordered_holds_from_an_iteration_that_no_rank_has_begun_when_it_hears_of_it(
    iteration_s: float, begin: float, world_size: int, ahead: int, lateness: float
) -> None:
    """However long iterations are, and though a rank is ahead by two and hears of it a whole talk later than others."""
    job = Job(2)
    job.period_s = job.rank_zero._period_s = round_period_s(world_size)
    job.rank_zero._rounds_open = rounds_kept_open(world_size)
    begun: Callable[[float], int] = lambda time_s: math.floor(time_s / iteration_s + begin)  # noqa: E731
    told = 0
    job.hello(range(2))
    job.tell_state()
    orders: dict[int, tuple[float, Order]] = {}
    while job.order.phase is not Phase.PROFILE:
        job.iteration = begun(job.threads.time_s + job.period_s)
        for number in range(told, job.iteration - 1):
            job.tell(*(records.iteration_time(rank, number, 8, iteration_s, 0, 0, False) for rank in range(2)))
        told = max(told, job.iteration - 1)
        job.round()
        orders.setdefault(job.order.number, (job.threads.time_s, job.order))
    for given_s, order in orders.values():
        heard_s = given_s + (1 + lateness) * talking_period_s(world_size)
        next_there = begun(heard_s) + ahead
        assert order.phase in (Phase.OPENING, Phase.WARM_UP) or order.from_iteration >= next_there


def test_decisions_never_hold_from_an_earlier_iteration_than_those_before() -> None:
    """Also where training has become faster since, so that less would do."""
    job = Job()
    job.open()
    for number in range(60):
        job.train(5 if number < 20 else 1)
    from_iterations = [job.order.from_iteration]
    for state in ({"swept": True}, {"swept": True, "reported": 1}):
        job.tell_state(**state)
        job.rounds(60)
        from_iterations.append(job.order.from_iteration)
    assert from_iterations == sorted(from_iterations)


# Plans


def test_a_plan_is_in_the_store_before_it_is_offered_and_runs_when_all_have_it() -> None:
    """Each stage's part under its own key."""
    job = Job()
    job.open()
    job.train(6)
    job.tell_state(swept=True)
    job.rounds()
    job.tell_state(swept=True, reported=1)
    job.rounds()
    job.planner.plans[1] = a_plan(1)
    assert job.store.keys.isdisjoint({plan_key(1, 0), plan_key(1, 1)})
    job.rounds()
    assert job.order.offered == 1
    for stage in range(STAGES):
        assert job.store.read(plan_key(1, stage)) == a_plan(1).stages[stage].encode()
    job.tell_state(0, 1, 2, swept=True, reported=1, received=1)
    job.rounds(20)
    assert (job.order.phase, job.order.plans) == (Phase.SOLVE, ())
    job.tell_state(3, swept=True, reported=1, received=1)
    job.rounds()
    assert (job.order.phase, job.order.plans) == (Phase.RUN, (a_plan(1).summary,))
    assert job.order.from_iteration > job.iteration


def test_the_next_plan_is_offered_when_the_last_one_is_in_force() -> None:
    """One after the other, so that no rank has to keep more than two."""
    job = Job()
    job.run_plan()
    job.planner.plans.update({2: a_plan(2), 3: a_plan(3)})
    job.rounds(20)
    assert job.order.offered == 2
    job.tell_state(swept=True, reported=1, received=2)
    job.rounds(20)
    assert ([plan.number for plan in job.order.plans], job.order.offered) == ([2], 3)


def test_a_plan_for_another_number_of_microbatches_runs_beside_the_usual_one() -> None:
    """Until the usual one is made anew: it was made from older measurements."""
    job = Job()
    job.run_plan()
    for number, num_microbatches, running in ((2, 4, [1, 2]), (3, 4, [1, 3]), (4, 8, [4])):
        job.planner.plans[number] = a_plan(number, num_microbatches)
        job.rounds()
        job.tell_state(swept=True, reported=1, received=number)
        job.rounds()
        assert [plan.number for plan in job.order.plans] == running


def test_the_planner_gets_all_reports_once_and_they_are_taken_away() -> None:
    """With the baseline; rank 0 reads the keys only when all ranks have said that theirs is there."""
    job = Job(1024)
    job.open()
    job.train(6)
    job.tell_state(swept=True)
    job.rounds()
    for rank in range(1024):
        job.store.append(report_key(1, rank), b"%d " % rank)
    job.tell_state(swept=True, reported=1)
    job.rounds()
    ((_, contents, reason, baseline, measured_time_s),) = job.planner.asked
    assert b"".join(contents).split() == [b"%d" % rank for rank in range(1024)]
    assert (reason, baseline, measured_time_s) == (Reason.PROFILED, Baseline(8, 1.0, 200.0), 0.0)
    assert job.store.keys.isdisjoint({report_key(1, rank) for rank in range(1024)})
    job.rounds(20)
    assert len(job.planner.asked) == 1


def test_a_correction_is_asked_for_with_what_was_measured() -> None:
    """The median of the last iterations under the plan, and the job as it was beside them."""
    job = Job()
    job.run_plan()
    job.train(20, span_s=1.25, unplanned_s=1.0)
    assert (job.order.phase, job.order.reason, job.order.collection) == (Phase.COLLECT, Reason.SLOWER, 2)
    job.tell_state(swept=True, reported=2, received=1)
    job.rounds()
    assert job.planner.asked[-1][2:] == (Reason.SLOWER, Baseline(8, 1.0, 200.0), 1.25)


def test_the_slowest_straggler_that_any_rank_was_told_of_counts() -> None:
    """And it is planned for when it changes."""
    job = Job()
    job.run_plan()
    for slowdowns in ((1.25, 1.5), (1.25, 1.0), (1.0, 1.0)):
        for rank, slowdown in zip((2, 3), slowdowns, strict=True):
            job.tell_state(rank, swept=True, reported=1, received=1, straggler_slowdown=slowdown)
        job.rounds(5)
    assert [asked for asked in job.planner.asked if asked[0] == "policy"] == [
        ("policy", None, 1.5),
        ("policy", None, 1.25),
        ("policy", None, 1.0),
    ]


def test_a_number_of_microbatches_that_comes_often_is_planned_for_once() -> None:
    """As in a batch size ramp-up."""
    job = Job()
    job.run_plan()
    job.train(40, num_microbatches=4)
    assert [asked for asked in job.planner.asked if asked[0] == "for"] == [("for", 4)]


# When something is wrong


def test_a_rank_that_is_silent_though_all_train_ends_it_for_all(caplog: pytest.LogCaptureFixture) -> None:
    """It could not even say that it failed."""
    job = Job()
    job.run_plan()
    caplog.clear()
    begun_s = job.threads.time_s
    while job.order.phase is Phase.RUN:
        job.train(ranks=[0, 1, 3])
        assert job.threads.time_s < begun_s + 60
    assert job.threads.time_s - begun_s > 29
    assert (job.order.phase, job.order.from_iteration, job.order.plans) == (Phase.STEPPED_ASIDE, 0, ())
    assert _warnings(caplog) == ["rank 2 has not been heard of for long; training goes on without perseus"]
    assert job.thread.has_ended


def test_nobody_is_silent_while_nobody_trains(caplog: pytest.LogCaptureFixture) -> None:
    """An evaluation or a checkpoint may take long."""
    job = Job()
    job.run_plan()
    job.until_s(job.threads.time_s + 120)
    job.train(5)
    assert (job.order.phase, _warnings(caplog)) == (Phase.RUN, [])


def test_planning_that_fails_is_told_to_all_ranks() -> None:
    """The reason is kept for the session of rank 0, which says it."""
    job = Job()
    job.run_plan()
    job.planner.error = PerseusError("no schedule of ours")
    assert job.round() is None
    assert job.rank_zero.failure is job.planner.error
    assert (job.order.phase, job.order.from_iteration, job.order.plans) == (Phase.STEPPED_ASIDE, 0, ())


def test_a_store_that_fails_ends_it_without_a_word_to_anybody() -> None:
    """Nobody could be told."""
    job = Job()
    job.run_plan()
    job.store.error = StoreError("gone")
    assert job.round() is None
    assert job.rank_zero.failure is job.store.error


def test_a_rank_because_of_which_all_stop_speaks() -> None:
    """It knows why its clock cannot be set."""
    job = Job()
    job.run_plan()
    job.tell_state(2, 3, can_lock=False, swept=True, reported=1, received=1)
    job.rounds()
    assert (job.order.phase, job.order.plans, job.order.speaker) == (Phase.MEASURE_ONLY, (), 2)


@pytest.mark.parametrize("failed", [True, False])
def test_when_rank_zero_leaves_all_others_hear_of_it(failed: bool) -> None:
    """At once after a failure, else when training has surely ended everywhere: until then they go on as they were."""
    job = Job()
    job.run_plan()
    job.rank_zero.leave(failed=failed)
    assert job.thread.is_woken
    assert job.round() is None
    assert (job.order.phase, job.order.plans) == (Phase.STEPPED_ASIDE, ())
    assert job.order.from_iteration == 0 if failed else job.order.from_iteration >= job.iteration + 16


# The store


def test_the_store_does_not_grow() -> None:
    """Over ten thousand rounds, and some hundred plans with their reports."""
    job = Job(limits=replace(LIMITS, max_corrections=10**6))
    job.run_plan()
    most, reported = 0, 1
    for number in range(2000):
        job.train()
        job.rounds(4)
        most = max(most, len(job.store.keys))
        if number % 10 == 0:
            job.planner.plans[job.order.offered + 1] = a_plan(job.order.offered + 1)
            while reported < job.order.collection:
                reported += 1
                for rank in range(4):
                    job.store.append(report_key(reported, rank), b"report")
            job.tell_state(swept=True, reported=reported, received=job.order.offered)
        if number % 100 == 55:
            late_s = 0.5 ** (number // 100)  # each correction helps
            job.train(30, span_s=1.0 + late_s, unplanned_s=1.0)
    assert job.order.collection > 5
    assert job.order.offered > 100
    assert job.order.phase in (Phase.RUN, Phase.INTERLUDE)
    assert most <= 16


def test_rounds_are_read_when_later_ones_have_been_open_for_a_while() -> None:
    """So that a rank which looked before they were opened has time to append."""
    job = Job()
    job.hello(range(4))
    told_in = job.news.round
    for number in range(1, rounds_kept_open(4) + 1):
        job.round()
        assert (job.news.round, job.store.read(round_key(told_in)) is not None) == (told_in + number, True)
    job.round()
    assert job.store.read(round_key(told_in)) is None


def test_what_came_too_late_for_its_round_is_not_left_behind() -> None:
    """Its rank tells it again in another round. Nobody reads it there."""
    job = Job()
    job.open()
    for _ in range(100):
        late = round_key(job.news.round - rounds_kept_open(4) - 1)
        job.round()
        job.store.append(late, records.state(1, RankState(failed=True)))
    job.rounds(40)
    assert not {key for key in job.store.keys if key.startswith("r")}
    assert job.order.phase is Phase.WARM_UP
