"""One rank's side of the conversation, stepped by hand: what is told arrives, and what is ordered is done in time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_core.planning.schedule import one_f_one_b
from perseus_core.runtime.job import Job
from perseus_core.runtime.log import Announcer
from perseus_core.runtime.measure.events import HostEvents
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.rank_zero import RankZero
from perseus_core.runtime.ranks import records
from perseus_core.runtime.ranks.conversation import (
    FIGURES,
    NEWS,
    ORDER,
    Conversation,
    RankZeroUnheard,
    plan_key,
    report_key,
    round_key,
    round_period_s,
    rounds_kept_open,
    talking_period_s,
)
from perseus_core.runtime.ranks.decisions import Limits
from perseus_core.runtime.ranks.order import Baseline, News, Order, Phase
from perseus_core.runtime.ranks.plan_summary import PlanSummary
from perseus_core.runtime.ranks.records import RankState, RecordKind, StateFlag, as_records
from perseus_core.runtime.ranks.store import MAX_BYTES, LocalStore, Store, StoreError
from perseus_core.runtime.replan.plan_message import StagePlan
from perseus_core.runtime.reporter import Reporter
from perseus_core.runtime.session import Prepared, Session
from perseus_core.runtime.settings import Settings
from tests.planned_clocks import without_gaps

from .interleaving import Interleaved
from .stepped_threads import SteppedThreads

SETTINGS = Settings(enabled=True, profile_cache="off")
# Of four ranks.
OPEN = rounds_kept_open(4)


class WatchedStore(LocalStore):
    """A store whose calls are counted, and fail when asked to.

    Attributes:
        calls: how often each was made, by name and key.
        error: what every call raises from now on.
        on_append: called after each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.error: Exception | None = None
        self.on_append: Callable[[], None] = lambda: None

    def append(self, key: str, value: bytes) -> None:
        self._note("append", key)
        super().append(key, value)
        self.on_append()

    def read(self, key: str) -> bytes | None:
        self._note("read", key)
        return super().read(key)

    def num_appends(self) -> int:
        return sum(number for (name, _), number in self.calls.items() if name == "append")

    def _note(self, name: str, key: str) -> None:
        self.calls[name, key] += 1
        if self.error is not None:
            raise self.error


class Talk:
    """A conversation of rank 1 of 4 and its thread; the test is rank 0.

    Attributes:
        iteration: how many have begun.
    """

    def __init__(self, **arguments: Any) -> None:
        self.iteration = 100
        self.store = WatchedStore()
        self.threads = SteppedThreads()
        self.conversation = Conversation(
            self.store,
            self.threads,
            rank=1,
            world_size=4,
            stage=1,
            data_parallel_rank=0,
            iteration=lambda: self.iteration,
            **arguments,
        )
        self.conversation.start()
        self.thread = self.threads.threads["perseus-conversation"]
        self.news = News()

    def step(self) -> Any:
        return self.thread.step()

    def publish(self, order: Order) -> None:
        self.store.set(ORDER, order.encode())
        self.tell_news(order=order.number)

    def tell_news(self, **changes: int) -> None:
        self.news = self.news._replace(**changes)
        self.store.set(NEWS, self.news.encode())

    def told_in(self, round_number: int) -> list[RecordKind]:
        content = LocalStore.read(self.store, round_key(round_number)) or b""
        return [RecordKind(kind) for kind in as_records(content)["kind"].tolist()]


def a_plan(number: int) -> PlanSummary:
    return PlanSummary(number, 2, 1.0, 1.0, 90.0, 1.0, 100.0, 0.0, 0.1)


# Telling


def test_what_is_told_first_is_who_is_there() -> None:
    """Then what is true of it, and what happens."""
    talk = Talk()
    talk.conversation.tell_state(RankState(ready=True))
    talk.conversation.tell(records.iteration_energy(1, 0, 1.0))
    talk.step()
    assert talk.told_in(0) == [RecordKind.HELLO, RecordKind.ENERGY, RecordKind.STATE]


def test_a_rank_with_nothing_new_appends_nothing() -> None:
    """It reads a few bytes, so that rounds of jobs with long iterations are empty."""
    talk = Talk()
    for number in range(5):
        talk.step()
        talk.tell_news(round=number)
    appended = talk.store.num_appends()
    for number in range(5, 100):
        talk.tell_news(round=number)
        talk.conversation.tell_state(RankState())
        talk.step()
    assert talk.store.num_appends() == appended
    assert sum(number for (name, key), number in talk.store.calls.items() if name == "read" and key != NEWS) == 0


def test_a_state_is_told_when_it_is_another_one() -> None:
    """However often the training thread hands it over."""
    talk = Talk()
    for swept in (False, False, True, True, True):
        talk.conversation.tell_state(RankState(ready=True, swept=swept))
        talk.step()
    assert talk.told_in(0).count(RecordKind.STATE) == 2


def test_what_came_too_late_for_its_round_is_told_again() -> None:
    """The rank looked, was held up, and appended to a round that had been read and taken away."""
    talk = Talk()
    talk.tell_news(round=7)
    talk.step()
    assert RecordKind.HELLO in talk.told_in(7)
    talk.store.delete(round_key(7))
    talk.tell_news(round=7 + OPEN + 1)
    talk.step()
    assert RecordKind.HELLO in talk.told_in(7 + OPEN + 1)


def test_what_may_have_come_in_time_is_not_told_again() -> None:
    """No more later rounds were open than are kept open when it had been appended, so it is going to be read."""
    talk = Talk()
    talk.tell_news(round=7)
    talk.step()
    talk.tell_news(round=7 + OPEN)
    for _ in range(3):
        talk.step()
    assert talk.store.num_appends() == 1
    assert talk.told_in(7 + OPEN) == []


def test_a_rank_that_is_slow_all_the_time_tells_everything_a_few_times_at_most() -> None:
    """Its side thread comes to its turn only when too many rounds have been opened, as where training never pauses.

    What it tells must not pile up: that would break the store's connection in the end.
    """
    talk = Talk()
    for number in range(300):
        talk.tell_news(round=(OPEN + 2) * number)
        talk.conversation.tell(records.iteration_energy(1, number, 1.0))
        talk.step()
    told: Counter[int] = Counter()
    for round_number in range((OPEN + 2) * 300):
        told_in = as_records(talk.store.read(round_key(round_number)) or b"")
        told.update(told_in["iteration"][told_in["kind"] == RecordKind.ENERGY].tolist())
    assert set(told) == set(range(300))
    assert max(told.values()) <= 3


def test_what_a_rank_tells_again_and_again_stays_small() -> None:
    """One that is never heard must not break the store for the job. The newest is worth most."""
    talk = Talk()
    for number in range(100):
        for place in range(100):
            talk.conversation.tell(records.iteration_energy(1, 100 * number + place, 1.0))
        talk.tell_news(round=1000 * number)
        opened = talk.store.read(NEWS)
        talk.store.on_append = lambda: talk.tell_news(round=talk.news.round + 500)
        talk.step()
        assert opened != talk.store.read(NEWS), "it was late once more"
    assert len(talk.store.read(round_key(99_000)) or b"") <= MAX_BYTES // 16
    last = as_records(talk.store.read(round_key(99_000)) or b"")
    energies = last[last["kind"] == RecordKind.ENERGY]
    assert energies["iteration"][-100:].tolist() == list(range(9900, 10_000))
    assert RecordKind.STATE in last["kind"], "what was left out of it is told again"


@st.composite
def _stories(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[str, int, int]], bool]:
    """Ranks, rounds kept open, iterations, what happens how often in a row, and whether all leave in the end."""
    num_ranks = draw(st.integers(1, 3))
    happening = st.tuples(st.sampled_from(["rank 0", "rank", "train", "held"]), st.integers(0, 2), st.integers(1, 20))
    iterations, happenings = draw(st.integers(1, 8)), draw(st.lists(happening, max_size=40))
    return num_ranks, draw(st.sampled_from([1, 1, 1, 3])), iterations, happenings, draw(st.booleans())


@settings(max_examples=100)
@given(_stories())
def test_nothing_is_lost_whatever_the_interleaving(
    story: tuple[int, int, int, list[tuple[str, int, int]], bool],
) -> None:
    """Each call of the store may be held up for any time: in the end all that was told is in the table, once.

    As when a rank is stalled between looking and appending, or rank 0 between opening a round and reading another.
    """
    num_ranks, num_open, num_iterations, happenings, all_leave = story
    store = LocalStore()
    threads = [SteppedThreads() for _ in range(num_ranks + 1)]
    actors = [Interleaved(store) for _ in range(num_ranks + 1)]
    announcer = Announcer(speaks=False)
    rank_zero = RankZero(
        actors[-1].store,
        threads[-1],
        world_size=num_ranks,
        limits=Limits(True, 1, 2, 2, 0.01),
        announcer=announcer,
        reporter=Reporter(announcer, 0),
        iteration=lambda: 0,
    )
    conversations = [
        Conversation(
            actors[rank].store,
            threads[rank],
            rank=rank,
            world_size=num_ranks,
            stage=rank,
            data_parallel_rank=0,
            iteration=lambda: 0,
        )
        for rank in range(num_ranks)
    ]
    for talking in (*conversations, rank_zero):
        talking._rounds_open = num_open
        talking.start()
    for actor, of_actor in zip(actors, threads, strict=True):
        (thread,) = of_actor.threads.values()
        actor.begin(thread.step)
    told = [0] * num_ranks

    def train(rank: int) -> None:
        iteration = told[rank]
        if iteration < num_iterations:
            told[rank] += 1
            conversations[rank].tell(records.iteration_time(rank, iteration, 8, iteration + rank / 8, 0, 0, False))
            conversations[rank].tell(records.iteration_energy(rank, iteration, 100 * iteration + rank))
            conversations[rank].tell_state(RankState(straggler_slowdown=1 + told[rank]))

    def advance(actor: Interleaved, times: int, *, before: str = "") -> None:
        for _ in range(times):
            if not before or actor.stands_before != before:
                actor.advance()

    try:
        for who, rank, times in happenings:
            actor = actors[rank % num_ranks]
            if who == "held":  # it has looked, and is just about to append, while rank 0 goes on for a while
                train(rank % num_ranks)
                advance(actor, 6, before="append")
                advance(actors[-1], times)
                advance(actor, 6)
            elif who == "train":
                for _ in range(times):
                    train(rank % num_ranks)
            else:
                advance(actor if who == "rank" else actors[-1], times)
        for rank in range(num_ranks):
            for _ in range(num_iterations):
                train(rank)
            if all_leave:
                conversations[rank].leave(RankState(left=True, straggler_slowdown=1 + num_iterations))
        for _ in range(60):
            for actor in actors:
                actor.advance()
    finally:
        for actor in actors:
            actor.stop()
    assert [actor.error for actor in actors] == [None] * len(actors)
    assert [actor.has_ended for actor in actors[:-1]] == [all_leave] * num_ranks
    table = rank_zero._table
    assert table.absent_ranks() == ()
    assert table.which(StateFlag.LEFT).tolist() == [all_leave] * num_ranks
    assert table.straggler_slowdown.tolist() == [1 + num_iterations] * num_ranks
    times_s = [(i, times["span_s"].tolist()) for i, times in table.times.complete()]
    energies_j = [(i, energies.tolist()) for i, energies in table.energies_j.complete()]
    assert times_s == [(i, [i + rank / 8 for rank in range(num_ranks)]) for i in range(num_iterations)]
    assert energies_j == [(i, [100 * i + rank for rank in range(num_ranks)]) for i in range(num_iterations)]


def test_a_report_is_in_the_store_before_it_is_said_to_be() -> None:
    """Behind those of other ranks; rank 0 reads it when it hears that it is there."""
    talk = Talk()
    talk.step()
    talk.store.append(report_key(3, 0), b"of rank 0, ")
    talk.conversation.report(3, b"of rank 1")
    talk.step()
    assert talk.store.read(report_key(3, 1)) == b"of rank 0, of rank 1"
    last = as_records(talk.store.read(round_key(0)) or b"")[-1]
    assert (last["kind"], last["a"]) == (RecordKind.STATE, 3)


def test_reports_of_many_ranks_are_spread_over_keys() -> None:
    """No value of a large job becomes very large."""
    keys = Counter(report_key(1, rank) for rank in range(16_384))
    assert max(keys.values()) == 512
    assert not keys.keys() & {report_key(2, rank) for rank in range(16_384)}


@pytest.mark.parametrize("world_size", [1, 8, 512, 4096, 16_384, 100_000])
def test_the_store_has_as_much_to_do_at_any_size(world_size: int) -> None:
    """Up to some thousand ranks; and a rank that talks as often as it should is heard at once, or a while later."""
    assert 0.05 <= talking_period_s(world_size) <= 1.0
    assert world_size / talking_period_s(world_size) <= max(4096, world_size)
    assert talking_period_s(world_size) < round_period_s(world_size) < 2 * talking_period_s(world_size)
    assert 0.15 <= rounds_kept_open(world_size) * round_period_s(world_size) < 0.15 + round_period_s(world_size)


# Leaving


def test_who_leaves_tells_its_last_state_at_once_and_then_no_more() -> None:
    """And is woken for it."""
    talk = Talk()
    talk.step()
    talk.conversation.tell(records.iteration_energy(1, 0, 1.0))
    talk.conversation.leave(RankState(ready=True, left=True))
    assert talk.thread.is_woken
    while talk.step() is not None:
        pass
    assert talk.told_in(0)[-2:] == [RecordKind.ENERGY, RecordKind.STATE]
    assert StateFlag.LEFT in StateFlag(int(as_records(talk.store.read(round_key(0)) or b"")[-1]["flags"]))
    appended = talk.store.num_appends()
    talk.conversation.tell(records.iteration_energy(1, 1, 1.0))
    talk.step()
    assert talk.store.num_appends() == appended


def test_who_leaves_before_anything_was_told_still_says_so() -> None:
    """As a session that is closed at once."""
    talk = Talk()
    talk.conversation.leave(RankState(left=True))
    while talk.step() is not None:
        pass
    assert talk.told_in(0) == [RecordKind.HELLO, RecordKind.STATE]


def test_who_leaves_stays_until_it_was_surely_heard() -> None:
    """Its last word may have come too late for its round."""
    talk = Talk()
    talk.tell_news(round=3)
    talk.conversation.leave(RankState(left=True))
    assert talk.step() == 0
    talk.store.delete(round_key(3))
    talk.tell_news(round=3 + OPEN + 1)
    assert talk.step() == 0
    assert talk.told_in(3 + OPEN + 1) == [RecordKind.HELLO, RecordKind.STATE]
    assert talk.step() is None


# Hearing


def test_an_order_is_fetched_once() -> None:
    """When the news say that there is another."""
    talk = Talk()
    talk.publish(Order(1, Phase.WARM_UP))
    for _ in range(5):
        talk.step()
    assert talk.conversation.order == Order(1, Phase.WARM_UP)
    assert talk.store.calls["read", ORDER] == 1


def test_whoever_missed_orders_goes_on_with_the_newest() -> None:
    """It holds everything."""
    talk = Talk()
    for number, phase in enumerate((Phase.WARM_UP, Phase.PROFILE, Phase.COLLECT, Phase.SOLVE), 1):
        talk.publish(Order(number, phase, offered=number))
        talk.store.set(plan_key(number, 1), b"plan %d" % number)
    talk.step()
    assert talk.conversation.order == Order(4, Phase.SOLVE, offered=4)
    assert talk.conversation.plan(4) == b"plan 4"
    assert talk.conversation.plan(3) is None


def test_a_plan_is_fetched_once_and_its_arrival_told() -> None:
    """Its own stage's part of it."""
    talk = Talk()
    talk.store.set(plan_key(1, 0), b"of another stage")
    talk.store.set(plan_key(1, 1), b"of this stage")
    talk.publish(Order(1, Phase.SOLVE, offered=1))
    for _ in range(5):
        talk.step()
    assert talk.conversation.plan(1) == b"of this stage"
    assert talk.store.calls["read", plan_key(1, 1)] == 1
    last = as_records(talk.store.read(round_key(0)) or b"")[-1]
    assert (last["kind"], last["b"]) == (RecordKind.STATE, 1)


def test_a_plan_that_was_taken_away_for_a_newer_one_is_not_said_to_be_here() -> None:
    """The newer one will be offered."""
    talk = Talk()
    talk.publish(Order(1, Phase.SOLVE, offered=1))
    talk.step()
    assert talk.conversation.plan(1) is None
    talk.store.set(plan_key(2, 1), b"newer")
    talk.publish(Order(2, Phase.SOLVE, offered=2))
    talk.step()
    assert talk.conversation.plan(2) == b"newer"
    talk.step()
    received = as_records(talk.store.read(round_key(0)) or b"")["b"]
    assert 1 not in received[1:].tolist()


def test_a_plan_is_kept_as_long_as_it_runs() -> None:
    """Also while the next one has come; those before are forgotten."""
    talk = Talk()
    for number in (1, 2, 3):
        talk.store.set(plan_key(number, 1), b"plan %d" % number)
        runs = () if number == 1 else (a_plan(number - 1),)
        talk.publish(Order(number, Phase.RUN, plans=runs, offered=number))
        talk.step()
    assert [talk.conversation.plan(number) for number in (1, 2, 3)] == [None, b"plan 2", b"plan 3"]


@pytest.mark.parametrize("wants_figures", [True, False])
def test_figures_are_fetched_where_they_are_wanted_and_when_they_are_new(wants_figures: bool) -> None:
    """By the rank that keeps the user's metrics."""
    talk = Talk(wants_figures=wants_figures)
    for number in (1, 2):
        talk.store.set(FIGURES, b"figures %d" % number)
        talk.tell_news(figures=number)
        for _ in range(3):
            talk.step()
    assert talk.conversation.figures == (b"figures 2" if wants_figures else b"")
    assert talk.store.calls["read", FIGURES] == (2 if wants_figures else 0)


# When something is wrong


def test_rank_zero_has_ten_seconds_and_two_iterations_to_be_heard_of() -> None:
    """It opens its session at the same iteration, but maybe a while later where iterations are long."""
    talk = Talk()
    for talk.iteration, talk.threads.time_s in ((1, 1000.0), (2, 1001.0)):
        assert talk.conversation.failure is None
        talk.step()
    assert isinstance(talk.conversation.failure, RankZeroUnheard)


def test_whatever_rank_zero_has_said_is_enough() -> None:
    """However long it is silent after that."""
    unheard, heard = Talk(), Talk()
    for talk in (unheard, heard):
        talk.threads.time_s = 9.9
        talk.step()
    heard.publish(Order(1, Phase.OPENING))
    for talk in (unheard, heard):
        talk.threads.time_s = 10.1
        talk.step()
    assert isinstance(unheard.conversation.failure, RankZeroUnheard)
    assert unheard.conversation.failure.is_first
    assert unheard.thread.has_ended
    heard.threads.time_s = 1e6
    heard.step()
    assert heard.conversation.failure is None


def test_a_store_that_fails_ends_the_conversation_and_is_kept() -> None:
    """Whoever asks hears why; nothing is called again."""
    talk = Talk()
    talk.step()
    talk.store.error = StoreError("the store is gone")
    assert talk.step() is None
    assert talk.conversation.failure is talk.store.error
    num_calls = talk.store.calls.total()
    talk.conversation.tell(records.iteration_energy(1, 0, 1.0))
    talk.conversation.leave(RankState(left=True))
    talk.conversation.join(1.0)
    talk.step()
    assert talk.store.calls.total() == num_calls


def test_what_nobody_thought_of_ends_the_conversation_in_one_sentence() -> None:
    """As an order that cannot be read."""
    talk = Talk()
    talk.store.set(ORDER, b"{")
    talk.tell_news(order=1)
    talk.step()
    assert isinstance(talk.conversation.failure, StoreError)
    assert "talking to the other ranks failed (JSONDecodeError" in str(talk.conversation.failure)


# As the session hears it


class Listening:
    """A session of one of the ranks but 0, without a GPU; the test gives it orders."""

    def __init__(self, store: Store | None = None, rank: int = 1) -> None:
        self.store = store or LocalStore()
        self.threads = SteppedThreads()
        key = ProfileKey("test", "1f1b", 2, 1, 1, 2, 1)
        job = Job(1, 2, 1, rank, 4, 0, lambda m: one_f_one_b(2, m), key)
        self.session = Session(
            SETTINGS,
            job,
            HostEvents(),
            self.store,
            prepare=lambda: Prepared(why_not="no GPU here"),
            threads=self.threads,
            announcer=Announcer(speaks=False),
        )

    def hear(self, order: Order) -> None:
        self.store.set(ORDER, order.encode())
        self.store.set(NEWS, News(order=order.number).encode())
        self.threads.step_all()

    def iterate(self, count: int = 1) -> None:
        for _ in range(count):
            self.session.begin_iteration(2)
            for instruction in one_f_one_b(2, 2).stages[1]:
                self.session.begin_instruction(0, instruction.microbatch, instruction.kind)
                self.session.end_instruction()
            self.session.end_iteration()
            self.threads.step_all()


STEPS = tuple((0, i.microbatch, i.kind) for i in one_f_one_b(2, 2).stages[1])
STAGE_PLAN = StagePlan(STEPS, tuple(without_gaps(*((1410, 0.05) for _ in STEPS))))


def test_an_order_is_followed_from_the_iteration_on_from_which_it_holds() -> None:
    """On all ranks the same, whenever each has heard it."""
    rank = Listening()
    rank.hear(Order(1, Phase.WARM_UP))
    rank.iterate(3)
    rank.hear(Order(2, Phase.MEASURE_ONLY, from_iteration=7))
    phases = []
    for _ in range(6):
        rank.iterate()
        phases.append(rank.session.status().phase)
    assert phases == [Phase.WARM_UP] * 4 + [Phase.MEASURE_ONLY] * 2


def test_an_order_that_comes_late_is_followed_at_once() -> None:
    """That harms nothing: it is the state in which the job shall be."""
    rank = Listening()
    rank.hear(Order(1, Phase.WARM_UP))
    rank.iterate(20)
    rank.hear(Order(5, Phase.MEASURE_ONLY, from_iteration=7))
    rank.iterate()
    assert rank.session.status().phase is Phase.MEASURE_ONLY


def test_an_order_that_is_taken_back_before_it_holds_was_never_followed() -> None:
    """The newest counts."""
    rank = Listening()
    rank.hear(Order(1, Phase.WARM_UP))
    rank.hear(Order(2, Phase.PROFILE, from_iteration=5))
    rank.hear(Order(3, Phase.MEASURE_ONLY, from_iteration=5))
    rank.iterate(6)
    assert rank.session.status().phase is Phase.MEASURE_ONLY
    assert rank.session.status().progress == ""


def test_a_plan_runs_from_the_iteration_on_for_which_it_was_ordered() -> None:
    """It had arrived long before."""
    rank = Listening()
    rank.store.set(plan_key(1, 1), STAGE_PLAN.encode())
    rank.hear(Order(1, Phase.SOLVE, offered=1, baseline=Baseline(2, 1.0)))
    rank.iterate(2)
    rank.hear(Order(2, Phase.RUN, 4, (a_plan(1),), offered=1, baseline=Baseline(2, 1.0)))
    plans = []
    for _ in range(4):
        rank.iterate()
        plans.append(rank.session.status().plan)
    assert plans == [0, 0, 1, 1]


def test_measurements_are_reported_as_soon_as_they_are_asked_for_and_once() -> None:
    """The plan that runs goes on until the next one holds, so there is nothing to wait for."""
    rank = Listening(WatchedStore())
    rank.hear(Order(1, Phase.WARM_UP))
    rank.iterate()
    for number in (2, 3):
        rank.hear(Order(number, Phase.COLLECT, from_iteration=100, collection=1, baseline=Baseline(2, 1.0)))
        rank.iterate(3)
    assert isinstance(rank.store, WatchedStore)
    assert rank.store.calls["append", report_key(1, 1)] == 1


def test_all_step_aside_when_rank_zero_says_so() -> None:
    """Without a word of their own, and they stop telling."""
    rank = Listening()
    rank.hear(Order(1, Phase.WARM_UP))
    rank.iterate(2)
    rank.hear(Order(2, Phase.STEPPED_ASIDE))
    rank.iterate(5)
    assert rank.session.status().phase is Phase.STEPPED_ASIDE
    assert rank.threads.threads["perseus-conversation"].has_ended
    told = as_records(rank.store.read(round_key(0)) or b"")
    assert told["iteration"][told["kind"] == RecordKind.TIME].max() <= 2


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_of_all_ranks_one_says_that_rank_zero_is_unheard_of(caplog: pytest.LogCaptureFixture) -> None:
    """Whichever notices first; all go on training."""
    store = LocalStore()
    ranks = [Listening(store, rank) for rank in (1, 2, 3)]
    for rank in reversed(ranks):
        rank.iterate(2)
        rank.threads.time_s = 11.0
        rank.iterate(2)
    assert [rank.session.status().phase for rank in ranks] == [Phase.STEPPED_ASIDE] * 3
    (line,) = _warnings(caplog)
    assert line.startswith("rank 3: RankZeroUnheard: rank 0 has not opened a session")
    assert line.endswith("training goes on without perseus")


def test_a_store_that_is_gone_when_rank_zero_is_found_to_be_unheard_of_does_no_harm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Asking who speaks is no business of the training thread."""

    class Dying(LocalStore):
        def is_first(self, key: str) -> bool:
            raise StoreError("the job's rendezvous store cannot be reached any more (Broken pipe)")

    rank = Listening(Dying())
    rank.iterate(2)
    rank.threads.time_s = 11.0
    rank.iterate(2)
    assert rank.session.status().phase is Phase.STEPPED_ASIDE
    (line,) = _warnings(caplog)
    assert line.startswith("rank 1: StoreError: ")


def test_a_store_that_is_gone_is_said_by_one(caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody can agree any more on who speaks it is rank 1, until rank 0 has said otherwise."""
    store = WatchedStore()
    ranks = [Listening(store, rank) for rank in (1, 2, 3)]
    for rank in ranks:
        rank.iterate(2)
    store.error = StoreError("the job's rendezvous store cannot be reached any more (Broken pipe)")
    for rank in ranks:
        rank.iterate(3)
        rank.session.close()
    assert [rank.session.status().phase for rank in ranks] == [Phase.STEPPED_ASIDE] * 3
    (line,) = _warnings(caplog)
    assert line.startswith("rank 1: StoreError: the job's rendezvous store cannot be reached any more (Broken pipe)")
