"""One rank's side of the conversation: a side thread that tells rank 0 what is new and fetches its newest order.

The training thread hands over records and looks at the newest order; it never waits, whatever the number of ranks.

The side thread, about once a second (more often in small jobs):

1. looks at the news, a few bytes: whether there is another round, another order, other figures;
2. appends what is new to the key of the present round; a rank with nothing new appends nothing;
3. fetches what it does not have yet: the order, a plan that is offered, figures.

Nothing is lost: rank 0 reads a round when some later ones have been opened (`rounds_kept_open`). So a rank that has
appended to a round, and after that finds no more than these open, knows that its records will be read; else it tells
them again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from perseus_core.errors import PerseusError
from perseus_core.runtime.log import logger
from perseus_core.runtime.ranks import records
from perseus_core.runtime.ranks.order import News, Order
from perseus_core.runtime.ranks.records import RankState
from perseus_core.runtime.ranks.store import Store, StoreError
from perseus_core.runtime.side_threads import SideThread, SideThreads

NEWS, ORDER, FIGURES = "news", "order", "figures"

# At 4,096 ranks and more each talks once a second; below, so often that the store has as much to do at any size.
_TALKS_PER_S = 4096
_SHORTEST_PERIOD_S = 0.05
_LONGEST_PERIOD_S = 1.0
_ROUND_OPEN_S = 0.15
_RANKS_PER_REPORT_KEY = 512
# Rank 0 is at the same place of training. If it has said nothing by then, and two more iterations have begun here, it
# does not take part.
RANK_ZERO_LIMIT_S = 10.0
_RANK_ZERO_ITERATIONS = 2
# Training may hold the connection to the store for minutes, where it waits for other ranks; then it does not go on.
_STUCK_S = 60.0
_STUCK_ITERATIONS = 16
# Records that are told again and again, because this thread is always late, are worth no more than this.
_MOST_UNCONFIRMED_BYTES = 2048 * records.RECORD.itemsize


class RankZeroUnheard(PerseusError):  # noqa: N818 (named by what happened)
    """Rank 0 has said nothing.

    Attributes:
        is_first: no other rank has noticed it before.
    """

    def __init__(self, *, is_first: bool) -> None:
        """`is_first`: no other rank has noticed it before."""
        super().__init__("rank 0 has not opened a session: perseus is missing, switched off or failed there")
        self.is_first = is_first


def talking_period_s(world_size: int) -> float:
    """How often each rank talks to the store."""
    return min(_LONGEST_PERIOD_S, max(_SHORTEST_PERIOD_S, world_size / _TALKS_PER_S))


def round_period_s(world_size: int) -> float:
    """How long a round lasts: a little longer than a talk, so that none is missed between two talks."""
    return 1.25 * talking_period_s(world_size)


def rounds_kept_open(world_size: int) -> int:
    """How many rounds rank 0 opens after one before it reads it: time for a thread that comes late."""
    return math.ceil(_ROUND_OPEN_S / round_period_s(world_size))


def round_key(number: int) -> str:
    """The key to which the records of a round are appended."""
    return f"r{number}"


def plan_key(number: int, stage: int) -> str:
    """The key that holds one stage's part of a plan."""
    return f"p{number}.{stage}"


def report_key(collection: int, rank: int) -> str:
    """The key to which a rank's report is appended: one for some hundred ranks, so that no value becomes very large."""
    return f"m{collection}.{rank // _RANKS_PER_REPORT_KEY}"


class Conversation:
    """Tells and hears, in a side thread.

    Attributes:
        order: the newest that has arrived here.
        figures: the newest measured figures, as bytes, where this rank wants them.
        failure: why there is no conversation any more.
    """

    def __init__(
        self,
        store: Store,
        threads: SideThreads,
        *,
        rank: int,
        world_size: int,
        stage: int,
        data_parallel_rank: int,
        iteration: Callable[[], int],
        wants_figures: bool = False,
    ) -> None:
        """Says that this rank takes part, as soon as `start` is called.

        Args:
            store: what the ranks talk through.
            threads: time and threads.
            rank, world_size: in the job.
            stage: of the pipeline.
            data_parallel_rank: which pipeline.
            iteration: how many iterations have begun here.
            wants_figures: whether to fetch figures, too.
        """
        self.order = Order()
        self.figures: bytes = b""
        self.failure: PerseusError | None = None
        self._store = store
        self._threads = threads
        self._rank = rank
        self._stage = stage
        self._iteration = iteration
        self._wants_figures = wants_figures
        self._rounds_open = rounds_kept_open(world_size)
        self._period_s = talking_period_s(world_size)
        self._opened_s = self._talked_s = threads.now_s()
        self._talked_at_iteration = iteration()
        self._thread: SideThread | None = None
        self._figures_number = 0
        self._new: deque[bytes] = deque([records.hello(rank, stage, data_parallel_rank)])
        self._reports: deque[tuple[int, bytes]] = deque()
        self._state = RankState()
        self._reported = self._received = 0
        self._told_state: tuple[RankState, int, int] | None = None
        self._unconfirmed = b""
        self._appended_to = -1
        self._plans: dict[int, bytes] = {}
        self._leaving = False

    # What the training thread calls

    def start(self) -> None:
        """Begins to talk, in a side thread."""
        self._thread = self._threads.start("perseus-conversation", self._step)

    def tell(self, record: bytes) -> None:
        """Hands over one of `records`."""
        self._new.append(record)

    def tell_state(self, state: RankState) -> None:
        """What is true of this rank now; told if it is new. The numbers of reports and plans are added here."""
        self._state = state

    def report(self, collection: int, content: bytes) -> None:
        """Hands over this rank's measurements for a collection, which may be put behind those of others."""
        self._reports.append((collection, content))

    def plan(self, number: int) -> bytes | None:
        """This stage's part of a plan, if it has arrived."""
        return self._plans.get(number)

    def is_stuck(self) -> bool:
        """Whether the store has not answered for long although training went on: then nobody watches this plan."""
        return (
            self._threads.now_s() - self._talked_s > _STUCK_S
            and self._iteration() - self._talked_at_iteration > _STUCK_ITERATIONS
        )

    def leave(self, state: RankState) -> None:
        """Tells this last state and says no more; at once, beside training."""
        self._state = state
        self._leaving = True
        if self._thread is not None:
            self._thread.wake()

    def join(self, limit_s: float) -> None:
        """Waits at most so long until everything is told."""
        if self._thread is not None:
            self._thread.join(limit_s)

    # The side thread

    def _step(self) -> float | None:
        try:
            return self._talk()
        except PerseusError as error:
            self.failure = error
        except Exception as error:
            self.failure = StoreError(f"talking to the other ranks failed ({type(error).__name__}: {error})")
            logger.debug("details", exc_info=error)
        return None

    def _talk(self) -> float | None:
        leaving = self._leaving
        news = self._look()
        was_late = bool(self._unconfirmed)
        self._send_reports()
        if not self._append_what_is_new(news.round) and leaving:
            return None
        if was_late:
            news = self._look()  # sooner than after a whole period
        if news.order > self.order.number and (content := self._store.read(ORDER)) is not None:
            self.order = Order.decode(content)
        self._fetch_plan(self.order)
        if self._wants_figures and news.figures != self._figures_number:
            self._figures_number = news.figures
            self.figures = self._store.read(FIGURES) or self.figures
        if not self.order.number:
            self._look_for_rank_zero()
        self._talked_s, self._talked_at_iteration = self._threads.now_s(), self._iteration()
        return 0.0 if leaving else self._period_s

    def _look(self) -> News:
        content = self._store.read(NEWS)
        news = News() if content is None else News.decode(content)
        if news.round <= self._appended_to + self._rounds_open:
            self._unconfirmed = b""
        return news

    def _look_for_rank_zero(self) -> None:
        is_over = self._threads.now_s() - self._opened_s > RANK_ZERO_LIMIT_S
        if is_over and self._iteration() >= _RANK_ZERO_ITERATIONS:
            raise RankZeroUnheard(is_first=self._store.is_first("unheard"))

    def _send_reports(self) -> None:
        while self._reports:
            collection, content = self._reports.popleft()
            self._store.append(report_key(collection, self._rank), content)
            self._reported = collection

    def _append_what_is_new(self, round_number: int) -> bool:
        """Returns whether there was anything."""
        new = [self._unconfirmed]
        while self._new:
            new.append(self._new.popleft())
        state = (self._state, self._reported, self._received)
        if state != self._told_state:
            self._told_state = state
            told = replace(self._state, reported=self._reported, received=self._received)
            new.append(records.state(self._rank, told))
        self._unconfirmed = b"".join(new)
        if len(self._unconfirmed) > _MOST_UNCONFIRMED_BYTES:
            self._unconfirmed = self._unconfirmed[-_MOST_UNCONFIRMED_BYTES:]
            self._told_state = None  # it may be among what is left out
        if not self._unconfirmed:
            return False
        self._store.append(round_key(round_number), self._unconfirmed)
        self._appended_to = round_number
        return True

    def _fetch_plan(self, order: Order) -> None:
        if not order.offered or order.offered == self._received:
            return
        content = self._store.read(plan_key(order.offered, self._stage))
        if content is None:
            return  # taken away for a newer one
        running = {plan.number for plan in order.plans}
        self._plans = {number: plan for number, plan in self._plans.items() if number in running}
        self._plans[order.offered] = content
        self._received = order.offered
