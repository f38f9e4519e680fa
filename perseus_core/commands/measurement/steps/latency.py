"""How long a change of clock takes, told by the GPU itself: it counts cycles meanwhile."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from perseus_core.commands.measurement.bench import Bench, hold, own_clocks
from perseus_core.commands.measurement.results import NotMeasured, Spread, Verdict, ms, standing
from perseus_core.gpu.errors import CallFailed
from perseus_core.runtime.clock.cycle_counting import CycleCounting
from perseus_core.runtime.clock.settable_clock import SettableClock
from perseus_core.runtime.settings import USUAL_LATENCY_S

_NUM_PAIRS, _NUM_CLOCKS = 12, 6
# Counting does not tell nearer clocks apart for certain.
_SMALLEST_RATIO = 1.06
_LOOK_EVERY_S = 0.001
# No change is waited for longer, and the register no longer than so after it.
_LIMIT_S, _REGISTER_LIMIT_S = 1.0, 0.3
_SETTLE_S = 0.02
# So many changes without one that shows, and none will.
_MOST_UNSEEN = 4
# The register may be so much later than the GPU, and the latency so many times what is assumed, either way.
_LAG_S, _TIMES = 0.005, 2.0


@dataclass(frozen=True)
class Latency:
    """Changes of clock, from the call until the GPU counts at the new one.

    Attributes:
        up, down: of all pairs.
        jitter_s: how much sooner or later than its median a change may come, nine times in ten.
        register_lag_s: how much later the driver's register shows it (median); less than 0 where it shows it sooner.
        pairs: for each the lower and the higher clock [MHz], and the median up and down [s] (0: never seen).
        num_unseen: changes that did not show within a second.
        num_failed: calls that failed, for a reason that passed.
    """

    up: Spread
    down: Spread
    jitter_s: float
    register_lag_s: float
    pairs: tuple[tuple[int, int, float, float], ...]
    num_unseen: int
    num_failed: int

    @property
    def verdict(self) -> Verdict:
        """15 ms are assumed until more is known; the register is taken for prompt where the GPU cannot count."""
        as_assumed = (
            all(USUAL_LATENCY_S / _TIMES <= one.median_s <= _TIMES * USUAL_LATENCY_S for one in (self.up, self.down))
            and abs(self.register_lag_s) <= _LAG_S
            and not self.num_unseen
        )
        unseen = f"; {self.num_unseen} change(s) did not show within {_LIMIT_S:g} s" if self.num_unseen else ""
        sentence = (
            f"a rise takes {ms(self.up.median_s)} ({ms(self.up.p05_s)} to {ms(self.up.p95_s)}), a fall "
            f"{ms(self.down.median_s)} ({ms(self.down.p05_s)} to {ms(self.down.p95_s)}), over {len(self.pairs)} pairs "
            f"of clocks; the driver's register shows it {ms(self.register_lag_s)} later{unseen}; assumed: "
            f"{ms(USUAL_LATENCY_S)} until measured, and a prompt register where the GPU cannot count"
        )
        return Verdict(standing(as_assumed=as_assumed), sentence)


@dataclass
class _Seen:
    """What has been seen so far."""

    times_s: dict[tuple[int, int], list[float]]
    lags_s: list[float]
    num_unseen: int = 0
    num_failed: int = 0


def jitter_s(times_s: Sequence[float]) -> float:
    """How much sooner or later than their median some times come, nine in ten of them [s].

    By the middle half, as if all were evenly spread: on a busy machine some are seen much too late.
    """
    lower_s, upper_s = np.quantile(times_s, (0.25, 0.75))
    return float(0.9 * (upper_s - lower_s))


def measure_latency(bench: Bench) -> Latency:
    """Goes up and down between twelve pairs of clocks, again and again."""
    counting = CycleCounting(bench.counting(), bench.threads, _LIMIT_S)
    pairs = _pairs(bench.spread_clocks_mhz(_NUM_CLOCKS))
    seen = _Seen({}, [])
    until_s = time.monotonic() + bench.step_s
    with own_clocks([bench.device]) as (clock,):
        for number, (low, high) in enumerate(itertools.cycle(pairs)):
            if number >= len(pairs) and time.monotonic() > until_s:
                break
            if not seen.times_s and seen.num_unseen >= _MOST_UNSEEN:
                break
            _hold(clock, low, seen)
            if _change(bench, clock, counting, (low, high), seen):
                _change(bench, clock, counting, (high, low), seen)
    ups = [time_s for (before, after), of_pair in seen.times_s.items() if after > before for time_s in of_pair]
    downs = [time_s for (before, after), of_pair in seen.times_s.items() if after < before for time_s in of_pair]
    if counting.failure is not None:
        raise NotMeasured(f"counting cycles failed ({counting.failure!r})")
    if not ups or not downs:
        raise NotMeasured(f"no change of clock showed within {_LIMIT_S:g} s: clocks are not obeyed, or held elsewhere")
    up, down = Spread.of(ups), Spread.of(downs)
    return Latency(
        up,
        down,
        max(map(jitter_s, (ups, downs))),
        statistics.median(seen.lags_s) if seen.lags_s else 0.0,
        tuple((low, high, _median(seen, low, high), _median(seen, high, low)) for low, high in pairs),
        seen.num_unseen,
        seen.num_failed,
    )


def _pairs(clocks_mhz: list[int]) -> list[tuple[int, int]]:
    pairs = [pair for pair in itertools.combinations(clocks_mhz, 2) if pair[1] / pair[0] >= _SMALLEST_RATIO]
    if not pairs:
        raise NotMeasured("the GPU's clocks lie too near to each other to be told apart")
    # Near ones and far ones, low ones and high ones.
    return pairs[:: max(1, len(pairs) // _NUM_PAIRS)][:_NUM_PAIRS]


def _median(seen: _Seen, before: int, after: int) -> float:
    times_s = seen.times_s.get((before, after))
    return statistics.median(times_s) if times_s else 0.0


def _hold(clock: SettableClock, clock_mhz: int, seen: _Seen) -> None:
    """Locks a clock and waits until it is in force, as far as was seen until now."""
    hold(clock, clock_mhz)
    known_s = [time_s for of_pair in seen.times_s.values() for time_s in of_pair]
    time.sleep(_SETTLE_S + (max(known_s) if known_s else 0.5))


def _change(bench: Bench, clock: SettableClock, counting: CycleCounting, pair: tuple[int, int], seen: _Seen) -> bool:
    """Asks for the second clock of a pair, the first being in force; returns whether that one is in force now."""
    _, after = pair
    with bench.events.between_iterations():
        counting.begin()
    asked_s = time.monotonic()
    try:
        clock.lock(after)
        change, registered_s = _watch(clock, counting, pair, asked_s)
    except CallFailed:
        seen.num_failed += 1
        return False
    finally:
        counting.end()
    if change is None:
        seen.num_unseen += 1
        return False
    seen.times_s.setdefault(pair, []).append(change)
    if registered_s is not None:
        seen.lags_s.append(registered_s - change)
    time.sleep(_SETTLE_S)
    return True


def _watch(
    clock: SettableClock, counting: CycleCounting, pair: tuple[int, int], asked_s: float
) -> tuple[float | None, float | None]:
    """Seconds from asking until the GPU, and until its register, showed the change."""
    before, after = pair
    change: float | None = None
    registered_s: float | None = None
    until_s = asked_s + _LIMIT_S
    while time.monotonic() < until_s and (change is None or registered_s is None):
        if registered_s is None:
            with suppress(CallFailed):
                told_mhz = clock.sm_clock_mhz()
                if abs(told_mhz - after) < abs(told_mhz - before):
                    registered_s = time.monotonic() - asked_s
        if change is None:
            seen = counting.seen(asked_s, after / before)
            if seen is not None and seen.is_up == (after > before):
                change = seen.after_s
                until_s = min(until_s, asked_s + change + _REGISTER_LIMIT_S)
        time.sleep(_LOOK_EVERY_S)
    return change, registered_s
