"""What lock calls cost the GPU's work: so many a second, on one GPU and on all (NVIDIA/nccl#1551 tells of delays)."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from perseus_core.commands.measurement.bench import Bench, hold, own_clocks
from perseus_core.commands.measurement.results import Verdict, standing
from perseus_core.gpu.errors import CallFailed, GpuError
from perseus_core.planning.switching import MOST_CALLING
from perseus_core.runtime.clock.settable_clock import SettableClock
from perseus_core.runtime.settings import USUAL_CHANGES_PER_S

RATES_PER_S = (1, 5, 10, 20, 50)
# All of it takes so many times as long as a step is said to; each rate so long at least.
_TIMES, _SHORTEST_S = 2.5, 0.3
# Work may become so much slower, what it scatters by included; so much of what was asked for must be called.
_HARMLESS, _CALLED = 0.01, 0.9


@dataclass(frozen=True)
class Price:
    """So many calls a second, beside one kind of work.

    Attributes:
        beside: the kind of work.
        num_gpus: whose clocks are locked.
        asked_per_s: calls a second and GPU.
        called_per_s: how many there were.
        calling_share: of a GPU's time, what its calls took.
        slower: how much longer the work took than without calls, as a share.
        standard_error: of that.
    """

    beside: str
    num_gpus: int
    asked_per_s: int
    called_per_s: float
    calling_share: float
    slower: float
    standard_error: float

    @property
    def is_kept_up(self) -> bool:
        """Whether the driver makes as many calls as were asked for, and has time for others."""
        return self.called_per_s >= _CALLED * self.asked_per_s and self.calling_share <= MOST_CALLING

    def slower_at_most(self, per_s: float) -> float:
        """How much longer work would take at another rate, with one standard error: a call costs what it costs."""
        return max(0.0, self.slower + self.standard_error) * per_s / self.asked_per_s


@dataclass(frozen=True)
class Prices:
    """Of all rates.

    Attributes:
        prices: each of them.
        harmless_per_s: the highest rate that is harmless, as all lower ones are, on one GPU and on all; 0 for none.
    """

    prices: tuple[Price, ...]
    harmless_per_s: int

    @property
    def verdict(self) -> Verdict:
        """Plans have ten changes a second as a rule."""
        words = "none that was tried did harm"
        too_many = [price for price in self.prices if price.asked_per_s > self.harmless_per_s]
        if too_many:
            worst = min(too_many, key=lambda price: (price.asked_per_s, price.is_kept_up, -price.slower_at_most(1)))
            words = (
                f"{worst.asked_per_s} on {worst.num_gpus} GPU(s) are not shown to be: {worst.called_per_s:.1f} came "
                f"about, took {100 * worst.calling_share:.0f} % of the time, and {worst.beside} "
                f"{100 * worst.slower:+.1f} % (+-{100 * worst.standard_error:.1f})"
            )
        sentence = (
            f"{self.harmless_per_s} lock calls a second and GPU are harmless; {words}; assumed: "
            f"{USUAL_CHANGES_PER_S:g} are"
        )
        return Verdict(standing(as_assumed=self.harmless_per_s >= USUAL_CHANGES_PER_S), sentence)


def measure_prices(bench: Bench) -> Prices:
    """Times the work with and without calls between two of the highest clocks, in turns."""
    groups = sorted({1, len(bench.devices)})
    num_slots = len(groups) * len(bench.load.kinds) * (1 + 1.5 * len(RATES_PER_S))
    each_s = max(_SHORTEST_S, _TIMES * bench.step_s / num_slots)
    prices: list[Price] = []
    with own_clocks(bench.devices) as clocks:
        for num_gpus in groups:
            for kind in bench.load.kinds:
                before = _without_calls(bench, clocks, kind, each_s)
                for rate_per_s in RATES_PER_S:
                    with _calling(bench, clocks[:num_gpus], rate_per_s) as calls_s:
                        times_s, took_s = _work(bench, kind, each_s)
                        called_s = list(calls_s)
                    after = _without_calls(bench, clocks, kind, each_s / 2)
                    slower, error = _compare(times_s, before + after)
                    called_per_s = len(called_s) / num_gpus / took_s
                    share = sum(called_s) / num_gpus / took_s
                    prices.append(Price(kind, num_gpus, rate_per_s, called_per_s, share, slower, error))
                    before = after
    return Prices(tuple(prices), harmless_rate(prices))


def harmless_rate(prices: Sequence[Price]) -> int:
    """The highest rate that is shown to be harmless, as all lower ones are; 0 for none.

    What calls cost is known best from the highest rates: there it stands out of what work scatters by.
    """
    rates = sorted({price.asked_per_s for price in prices})
    return max(
        (rate for rate in rates if all(_is_harmless(lower, prices) for lower in rates if lower <= rate)), default=0
    )


def _is_harmless(per_s: int, prices: Sequence[Price]) -> bool:
    for price in prices:
        if price.asked_per_s == per_s:
            alike = [p for p in prices if (p.beside, p.num_gpus) == (price.beside, price.num_gpus)]
            at_most = min(p.slower_at_most(per_s) for p in alike if p.asked_per_s >= per_s)
            if at_most > _HARMLESS or not price.is_kept_up:
                return False
    return True


def _without_calls(bench: Bench, clocks: Sequence[SettableClock], kind: str, duration_s: float) -> list[float]:
    """At the lower of the two clocks, so that calls cannot look like a slower clock.

    That hides half of what a step of the clock makes the work faster: 0.5 % on an A100, less above.
    """
    hold(clocks[0], bench.device.supported_clocks_mhz()[1])
    time.sleep(bench.settle_s)
    return _work(bench, kind, duration_s)[0]


def _work(bench: Bench, kind: str, duration_s: float) -> tuple[list[float], float]:
    """What pulses took [s], and all of them together."""
    times_s: list[float] = []
    begin_s = now_s = time.monotonic()
    while now_s < begin_s + duration_s or len(times_s) < 4:
        times_s.append(bench.load.pulse(kind).time_s)
        now_s = time.monotonic()
    return times_s, now_s - begin_s


def _compare(with_s: Sequence[float], without_s: Sequence[float]) -> tuple[float, float]:
    """How much longer, as a share, and the standard error of that."""
    mean_s = statistics.mean(without_s)
    error_s = sum(statistics.variance(times_s) / len(times_s) for times_s in (with_s, without_s)) ** 0.5
    return statistics.mean(with_s) / mean_s - 1, error_s / mean_s


@contextmanager
def _calling(bench: Bench, clocks: Sequence[SettableClock], rate_per_s: float) -> Iterator[list[float]]:
    """Inside, the clock of each GPU is locked so often; gives what the calls take [s].

    Raises:
        GpuError: at the end, if calls have failed for good.
    """
    highest = bench.device.supported_clocks_mhz()[:2]
    calls_s: list[float] = []
    failures: list[GpuError] = []
    ending = threading.Event()

    def call(clock: SettableClock) -> None:
        due_s, number = time.monotonic(), 0
        while not ending.wait(max(0.0, due_s - time.monotonic())):
            begin_s = time.monotonic()
            try:
                clock.lock(highest[number % 2])
                calls_s.append(time.monotonic() - begin_s)
            except CallFailed:
                pass
            except GpuError as error:
                failures.append(error)
                return
            number += 1
            due_s = max(due_s + 1 / rate_per_s, begin_s)

    threads = [threading.Thread(target=call, args=(clock,), name="perseus-calls", daemon=True) for clock in clocks]
    for thread in threads:
        thread.start()
    try:
        yield calls_s
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
