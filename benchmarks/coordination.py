"""What the conversation between ranks costs, by the number of ranks.

    python -m benchmarks.coordination [--ranks 1,8,64,1024,10000,16384] [--rounds 8]

Rank 0 and rank 1 are real sessions in processes of their own, under a plan, on a GPU that is only said to be there.
Rank 0's hosts the job's store, a TCPStore, as in a real job. All other ranks live in one process: a connection of its
own and the real `Conversation` for each, stepped one after the other, told one iteration (time and energy) a round.
Where that process does not get around in time, all periods are stretched until it does; what is counted for each round
stays the same. One rank alone has no store to talk through.

- Training thread: CPU time (`thread_time_ns`) of `begin_iteration` and `end_iteration` together, of iterations of some
  milliseconds, on rank 0 and on rank 1, while all others talk; beside that of one rank alone just before and after.
- Rank 0's side thread: CPU time (`thread_time`) of a round, and its parts. What is neither is publishing.
- Store: CPU time of its thread, as the kernel counts it. It is torch's.
- Bytes: what the kernel has counted at the store's end of each connection (TCP_INFO), to the store and from it, without
  headers; with them, 66 bytes (Ethernet, IPv4, TCP) are added for each segment. A new plan is counted for itself: it
  comes with two orders, when it is offered and when it is applied.
- Order everywhere: from the moment rank 0 publishes it until the last rank has it, as a share of the period in which
  each rank talks once, and in seconds: that share of the unstretched period.

All stays on loopback: in a network namespace of its own where that is allowed, so that no name server is asked for each
of the 16,384 connections. What a rank opens is `benchmarks.descriptors`' business.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import logging
import multiprocessing
import os
import resource
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.common import print_table
from perseus_core.gpu.device import ThrottleReason
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.runtime import rank_zero
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.job import Job
from perseus_core.runtime.log import Announcer
from perseus_core.runtime.measure.events import HostEvents
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.rank_zero import RankZero
from perseus_core.runtime.ranks import records
from perseus_core.runtime.ranks.conversation import Conversation, round_period_s, talking_period_s
from perseus_core.runtime.ranks.order import Baseline, Phase
from perseus_core.runtime.ranks.plan_summary import PlanSummary
from perseus_core.runtime.ranks.records import RankState
from perseus_core.runtime.ranks.store import LocalStore, Store, TorchStore
from perseus_core.runtime.replan.plan_message import PlanMessage, StagePlan
from perseus_core.runtime.session import Prepared, Session
from perseus_core.runtime.settings import Settings
from perseus_core.runtime.side_threads import OwnThreads, SideThread, Step

REPOSITORY = Path(__file__).resolve().parent.parent
STAGES = 8
MICROBATCHES = 8
CLOCKS_MHZ = (1410, 1200, 1005)
INSTRUCTION_S = 0.0003
FAST_ITERATIONS = 400
# Until all sessions have opened and run a plan.
OPENING_LIMIT_S = 120.0
HEADERS = 66
CLONE_NEWNET = 0x40000000
# What torch puts before the keys of a process group.
GROUP = "default_pg/0//"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,8,64,1024,10000,16384")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    _use_own_network()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    logging.getLogger("perseus").addHandler(logging.NullHandler())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed  # noqa: F401  (once, before anything is forked)

    found = []
    for num_ranks in map(int, arguments.ranks.split(",")):
        if num_ranks > most - 200:
            print(f"{num_ranks} ranks need as many descriptors; `ulimit -n` allows {most}", file=sys.stderr)
            continue
        # Between two jobs of one rank, because the machine may be busier now than later.
        before = _measure(1, 1)
        found.append(_measure(num_ranks, arguments.rounds))
        alone = np.concatenate([before["thread_us"][0], _measure(1, 1)["thread_us"][0]])
        found[-1]["alone_us"] = np.percentile(alone, [50, 99])
        print(f"{num_ranks} ranks measured", file=sys.stderr, flush=True)
    _print(found)


def _use_own_network() -> None:
    if ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    else:
        print(
            "no network namespace of our own: other traffic on loopback disturbs, connecting is slow", file=sys.stderr
        )


# What stands for a GPU, for its clock and for the planner


class _Gpu:
    uuid, name, counts_energy = "GPU-0", "a GPU", True

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        return CLOCKS_MHZ

    def sm_clock_mhz(self) -> int:
        return CLOCKS_MHZ[0]

    def total_energy_j(self) -> float:
        return 300 * 0.1 * int(time.monotonic() / 0.1)  # moves every 100 ms

    def throttle_reasons(self) -> ThrottleReason:
        return ThrottleReason.NONE


class _Clock:
    failure, num_lock_calls, times_given_back, is_guarded = None, 0, 0, True

    def __init__(self, *_: Any) -> None:
        pass

    def _nothing(self, *_: Any) -> None:
        pass

    acquire = beat = lock = reset = leave_to_others = release = _nothing

    def sm_clock_mhz(self) -> int:
        return CLOCKS_MHZ[0]


class _Planner:
    """Has one plan at the beginning, and another whenever it is asked for."""

    known_profile = None
    restored = SimpleNamespace(job=SimpleNamespace(baseline=Baseline(MICROBATCHES, 1.0, 100.0)))

    def __init__(self) -> None:
        self.num_plans = 1

    def plan_after(self, number: int) -> PlanMessage | None:
        return _plan(number + 1) if number < self.num_plans else None

    def plan_from(self, *_: Any) -> None:
        pass

    plan_for = change_policy = plan_from


def _plan(number: int) -> PlanMessage:
    summary = PlanSummary(number, MICROBATCHES, 1e9, 1.0, 90.0, 1.0, 100.0, 0.01, 0.1)
    stages = []
    for order in one_f_one_b(STAGES, MICROBATCHES).stages:
        steps = tuple((i.chunk, i.microbatch, i.kind) for i in order)
        clocks = [
            PlannedClock(CLOCKS_MHZ[place // 4 % len(CLOCKS_MHZ)], place * INSTRUCTION_S, INSTRUCTION_S)
            for place in range(len(steps))
        ]
        stages.append(StagePlan(steps, tuple(clocks)))
    return PlanMessage(summary, tuple(stages))


# Counting


class _MeteredThreads(OwnThreads):
    """Counts the CPU time of every step of each side thread."""

    def __init__(self) -> None:
        super().__init__()
        self.steps_s: dict[str, list[float]] = defaultdict(list)
        self.after_step: Callable[[], None] = lambda: None

    def start(self, name: str, step: Step) -> SideThread:
        steps_s = self.steps_s[name]

        def metered() -> Any:
            begin_s = time.thread_time()
            wait = step()
            steps_s.append(time.thread_time() - begin_s)
            self.after_step()
            return wait

        return super().start(name, metered)


def _count_calls(owner: type, name: str) -> list[float]:
    """CPU seconds of each call of a method from now on."""
    method, calls_s = getattr(owner, name), []

    def counted(*arguments: Any) -> Any:
        begin_s = time.thread_time()
        result = method(*arguments)
        calls_s.append(time.thread_time() - begin_s)
        return result

    setattr(owner, name, counted)
    return calls_s


def _store_cpu_s() -> float:
    """Of the thread in this process that serves the store."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().startswith("pt_tcpstore"):
            return int((task / "schedstat").read_text().split()[0]) / 1e9
    return 0.0


def _traffic(port: int) -> np.ndarray:
    """To the store [B], from it [B], and segments both ways, of all connections that this process serves."""
    total = np.zeros(3, np.int64)
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if not str(descriptor.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                if connection.family != socket.AF_INET6 or connection.getsockname()[1] != port:
                    continue
                connection.getpeername()
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        except OSError:
            continue  # closed meanwhile, or the listener
        sent, received, segments_out, segments_in = struct.unpack_from("<QQII", info, 120)
        total += (received, sent, segments_out + segments_in)
    return total


# The three processes of a job


class _Arrivals:
    """When each order came to each of some ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._number = np.zeros(num_ranks, np.int64)
        self._seen: list[tuple[float, int, int]] = []

    def note(self, place: int, order: int) -> None:
        if order != self._number[place]:
            self._number[place] = order
            self._seen.append((time.monotonic(), place, order))

    def everywhere_s(self) -> dict[int, float]:
        """For each order the moment from which all have it or a newer one."""
        number, found, lowest = np.zeros_like(self._number), {}, 0
        for at_s, place, order in self._seen:
            number[place] = order
            for reached in range(lowest + 1, int(number.min()) + 1):
                found[reached] = lowest = reached
                found[reached] = at_s
        return found


def _session(rank: int, num_ranks: int, store: Store, threads: OwnThreads, stretch: float) -> tuple[Session, _Planner]:
    planner = _Planner()
    job = Job(
        rank % STAGES,
        STAGES,
        1,
        rank,
        num_ranks,
        rank // STAGES,
        lambda m: one_f_one_b(STAGES, m),
        ProfileKey("none", "1f1b", STAGES, 1, 1, max(1, num_ranks // STAGES), 1),
    )
    session = Session(
        Settings(enabled=True, profile_cache="off"),
        job,
        HostEvents(),
        store,
        prepare=lambda: Prepared(_Gpu(), CLOCKS_MHZ, planner=planner if rank == 0 else None),
        threads=threads,
        announcer=Announcer(speaks=rank == 0),
        guard=_Clock,
    )
    session._conversation._period_s *= stretch
    rank_zero._OPENING_LIMIT_S *= stretch
    rank_zero._SILENT_S *= stretch
    if session._rank_zero is not None:
        session._rank_zero._period_s *= stretch
    return session, planner


def _iterate(session: Session, rank: int) -> int:
    """One iteration; CPU time of its two boundaries [ns]."""
    steps = one_f_one_b(STAGES, MICROBATCHES).stages[rank % STAGES]
    begin_ns = time.thread_time_ns()
    session.begin_iteration(MICROBATCHES)
    taken_ns = time.thread_time_ns() - begin_ns
    for step in steps:
        session.begin_instruction(step.chunk, step.microbatch, step.kind)
        time.sleep(INSTRUCTION_S)
        session.end_instruction()
    begin_ns = time.thread_time_ns()
    session.end_iteration()
    return taken_ns + time.thread_time_ns() - begin_ns


def _iterate_until(session: Session, rank: int, period_s: float, is_over: Callable[[], bool]) -> None:
    """Iterations at the pace at which all ranks tell of them."""
    for number in itertools.count(1):
        begin_s = time.monotonic()
        _iterate(session, rank)
        if is_over():
            return
        time.sleep(max(0.0, begin_s + period_s - time.monotonic()))
        assert number * period_s < 600, "it never came"


def _connected(port: int) -> TorchStore:
    import torch.distributed as dist

    client = dist.TCPStore("127.0.0.1", port, None, is_master=False, wait_for_workers=False)
    return TorchStore(dist.PrefixStore(GROUP, client), "perseus0")


def _run_rank_one(num_ranks: int, link: Connection) -> None:
    store = _connected(link.recv())
    threads, arrivals = _MeteredThreads(), _Arrivals(1)
    link.send(None)
    stretch = link.recv()
    session, _ = _session(1, num_ranks, store, threads, stretch)
    threads.after_step = lambda: arrivals.note(0, session._conversation.order.number)
    _iterate_until(session, 1, stretch * round_period_s(num_ranks), link.poll)
    link.recv()
    taken_ns = [_iterate(session, 1) for _ in range(FAST_ITERATIONS)]
    link.send(taken_ns)
    link.recv()  # nobody leaves before all have measured
    link.send(arrivals.everywhere_s())
    os._exit(0)


class _SteppedByHand:
    """Side threads that never run by themselves."""

    def __init__(self) -> None:
        self.step: Step = lambda: None

    def now_s(self) -> float:
        return 0.0

    def start(self, name: str, step: Step) -> SideThread:
        self.step = step
        return SimpleNamespace(wake=lambda: None, join=lambda limit_s: True)


def _run_crowd(num_ranks: int, link: Connection) -> None:
    """Ranks 2 and more."""
    port = link.recv()
    conversations, steps = [], []
    for rank in range(2, num_ranks):
        threads = _SteppedByHand()
        conversation = Conversation(
            _connected(port),
            threads,
            rank=rank,
            world_size=num_ranks,
            stage=rank % STAGES,
            data_parallel_rank=rank // STAGES,
            iteration=lambda: 0,
        )
        conversation.start()
        conversation.tell_state(RankState(ready=True, can_lock=True))
        conversations.append(conversation)
        steps.append(threads.step)
    sweeps_s = []
    for _ in range(2):  # the first says hello
        begin_s = time.monotonic()
        for step in steps:
            step()
        sweeps_s.append(time.monotonic() - begin_s)
    link.send(max(sweeps_s))
    stretch, opened_s = link.recv()
    period_s, iteration_s = stretch * talking_period_s(num_ranks), stretch * round_period_s(num_ranks)
    told = [0] * len(steps)
    arrivals = _Arrivals(len(steps))
    due = deque((opened_s + period_s * place / len(steps), place) for place in range(len(steps)))
    while not link.poll():
        due_s, place = due.popleft()
        now_s = time.monotonic()
        if due_s > now_s:
            time.sleep(due_s - now_s)
            now_s = time.monotonic()
        conversation, rank = conversations[place], place + 2
        for iteration in range(told[place], int((now_s - opened_s) / iteration_s)):
            conversation.tell(records.iteration_time(rank, iteration, MICROBATCHES, 1.0, 0.5, 0.5, False))
            conversation.tell(records.iteration_energy(rank, iteration, 12.5))
            told[place] = iteration + 1
        steps[place]()
        assert conversation.failure is None, conversation.failure
        arrivals.note(place, conversation.order.number)
        due.append((now_s + period_s, place))
    link.recv()
    link.send(arrivals.everywhere_s())
    os._exit(0)


def _run_rank_zero(num_ranks: int, rounds: int, link: Connection, others: Sequence[Connection]) -> None:
    import torch.distributed as dist

    port, stretch = 0, 1.0
    store: Store = LocalStore()
    if num_ranks > 1:
        server = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        port = server.port
        store = TorchStore(dist.PrefixStore(GROUP, server), "perseus0")
        for other in others:
            other.send(port)
        sweeps_s = [other.recv() or 0.0 for other in others]
        stretch = max(1.0, 2.2 * max(sweeps_s) / talking_period_s(num_ranks))
    reading_s, deciding_s = _count_calls(RankZero, "_read_round"), _count_calls(RankZero, "_decide")
    published_s: dict[int, float] = {}
    _note_orders(published_s)
    threads, arrivals = _MeteredThreads(), _Arrivals(1)
    opened_s = time.monotonic()
    for place, other in enumerate(others):
        other.send(stretch if place == 0 else (stretch, opened_s))
    session, planner = _session(0, num_ranks, store, threads, stretch)
    threads.after_step = lambda: arrivals.note(0, session._conversation.order.number)
    period_s = stretch * round_period_s(num_ranks)
    counted_s = threads.steps_s["perseus-rank-zero"]

    def is_under_plan() -> bool:
        status = session.status()
        assert status.phase is not Phase.STEPPED_ASIDE, "the session has stepped aside"
        assert time.monotonic() - opened_s < stretch * OPENING_LIMIT_S, f"no plan, but {status}"
        return status.plan > 0

    _iterate_until(session, 0, period_s, is_under_plan)
    settled = len(counted_s) + 4
    _iterate_until(session, 0, period_s, lambda: len(counted_s) >= settled)
    # Rounds in which all ranks tell one iteration
    first_order, rounds_before = session._order.number, len(counted_s)
    calls_before = len(reading_s), len(deciding_s)
    traffic, store_cpu_s = _traffic(port), _store_cpu_s()
    _iterate_until(session, 0, period_s, lambda: len(counted_s) >= rounds_before + rounds)
    store_cpu_s, traffic = _store_cpu_s() - store_cpu_s, _traffic(port) - traffic
    counted = counted_s[rounds_before:]
    read, decided = reading_s[calls_before[0] :], deciding_s[calls_before[1] :]
    # Rounds in which another plan is offered, fetched and applied: two orders
    rounds_before, traffic_of_plan = len(counted_s), _traffic(port)
    planner.num_plans += 1
    _iterate_until(session, 0, period_s, lambda: len(counted_s) >= rounds_before + 8)
    traffic_of_plan = _traffic(port) - traffic_of_plan - (len(counted_s) - rounds_before) * traffic / len(counted)
    # Iterations one after another, for the training thread's cost
    for other in others[:1]:
        other.send(None)
    taken_ns = [_iterate(session, 0) for _ in range(FAST_ITERATIONS)]
    result: dict[str, Any] = {
        "ranks": num_ranks,
        "stretch": stretch,
        "thread_us": [np.array(taken_ns) / 1000],
        "round_ms": 1000 * np.array(counted),
        "reading_ms": 1000 * np.array(read),
        "deciding_ms": 1000 * np.array(decided),
        "conversation_ms": 1000 * np.array(threads.steps_s["perseus-conversation"]),
        "store_ms": 1000 * store_cpu_s / len(counted),
        "traffic": traffic / len(counted),
        "traffic_of_plan": traffic_of_plan,
    }
    if others:
        result["thread_us"].append(np.array(others[0].recv()) / 1000)
        for other in others:
            other.send(None)
    everywhere = [arrivals.everywhere_s(), *(other.recv() for other in others)]
    talk_s = stretch * talking_period_s(num_ranks)
    result["order_periods"] = [
        (max(of_some[order] for of_some in everywhere) - at_s) / talk_s
        for order, at_s in published_s.items()
        if order > first_order and all(order in of_some for of_some in everywhere)
    ]
    link.send(result)
    os._exit(0)


def _note_orders(published_s: dict[int, float]) -> None:
    """When rank 0 has decided on each order."""
    publish = RankZero._publish

    def noted(publisher: RankZero, order: Any) -> None:
        begin_s, before = time.monotonic(), publisher._order.number
        publish(publisher, order)
        if publisher._order.number != before:
            published_s[publisher._order.number] = begin_s

    RankZero._publish = noted


def _measure(num_ranks: int, rounds: int) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    links = [context.Pipe() for _ in range((num_ranks > 1) + (num_ranks > 2))]
    processes = [
        context.Process(target=main, args=(num_ranks, link[1]), daemon=True)
        for main, link in zip((_run_rank_one, _run_crowd), links, strict=False)
    ]
    processes.append(
        context.Process(target=_run_rank_zero, args=(num_ranks, rounds, theirs, [o for o, _ in links]), daemon=True)
    )
    for process in processes:
        process.start()
    theirs.close()
    for _, link in links:
        link.close()
    try:
        while not ours.poll(0.2):
            if any(process.exitcode for process in processes):
                raise SystemExit(f"the job of {num_ranks} ranks has failed")
        return ours.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()


# What is printed


def _print(found: Sequence[dict[str, Any]]) -> None:
    headings = ["ranks", "alone: us, median", "99 %"]
    for rank in (0, 1):
        headings += [f"rank {rank}: median", "99 %", "more, median", "99 %"]
    rows = []
    for one in found:
        cells: list[object] = [f"{one['ranks']:,}", *(f"{us:.0f}" for us in one["alone_us"])]
        for of_rank in one["thread_us"]:
            us = np.percentile(of_rank, [50, 99])
            cells += [*(f"{value:.0f}" for value in us), *(f"{value:+.0f}" for value in us - one["alone_us"])]
        rows.append([*cells, *[""] * (len(headings) - len(cells))])
    print("Training thread, CPU time at an iteration's two boundaries, and more than with one rank\n")
    print_table(headings, rows)
    headings = [
        "ranks",
        "rank 0's side thread, ms a round: all",
        "reading",
        "deciding",
        "most",
        "its conversation",
        "store's thread",
        "stretched",
    ]
    rows = []
    for one in found:
        means = [f"{np.mean(one[name]):.2f}" for name in ("round_ms", "reading_ms", "deciding_ms")]
        most, own = f"{one['round_ms'].max():.2f}", f"{np.mean(one['conversation_ms']):.3f}"
        rows.append([f"{one['ranks']:,}", *means, most, own, f"{one['store_ms']:.1f}", f"{one['stretch']:.1f}"])
    print_table(headings, rows)
    headings = [
        "ranks",
        "kB a round: to the store",
        "from it",
        "both",
        "segments",
        "with headers",
        "kB a new plan",
        "order everywhere, talking periods: median",
        "most",
        "most, s",
    ]
    rows = []
    for one in found:
        up, down, segments = one["traffic"]
        kilobytes = [f"{b / 1000:,.1f}" for b in (up, down, up + down)]
        periods = one["order_periods"]
        latest = [f"{statistics.median(periods):.2f}", f"{max(periods):.2f}"] if periods else ["", ""]
        latest.append(f"{max(periods) * talking_period_s(one['ranks']):.2f}" if periods else "")
        with_headers = f"{(up + down + HEADERS * segments) / 1000:,.1f}"
        of_plan = f"{one['traffic_of_plan'][:2].sum() / 1000:,.1f}"
        rows.append([f"{one['ranks']:,}", *kilobytes, f"{segments:,.0f}", with_headers, of_plan, *latest])
    print_table(headings, rows)


# What a rank opens

if __name__ == "__main__":
    main()
