"""The energy counter: how often it moves, how regularly, and what part of its period it measures.

On some GPUs (A100, H100) it is told to measure 25 of every 100 ms and to take that for all of it (Yang et al. 2024,
"Part-time power measurements"). It shows with a load that comes and goes out of step with the counter: each move is
then what the GPU drew in the last so many milliseconds, times the period.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perseus_core.commands.measurement.bench import Bench
from perseus_core.commands.measurement.load import Pulse
from perseus_core.commands.measurement.results import NotMeasured, Spread, Verdict, ms, standing
from perseus_core.gpu.errors import CallFailed

Array = NDArray[np.float64]

_LOOK_EVERY_S = 0.001
# Busy and waiting for so long, evenly in the logarithm: some shorter than the counter's period, some longer.
_SHORTEST_S, _LONGEST_S = 0.005, 0.2
_NUM_WINDOWS, _NUM_DELAYS = 40, 10
# Of the moves, those that a window explains worst are left out.
_COUNTED = 0.9
_NEEDED_MOVES = 25
# Measures all the time: within this of the period.
_WHOLE = 0.85
# A narrower window must explain the moves so much better, in variance, than the whole period does.
_BETTER = 0.5
_LONGEST_PERIOD_S = 0.11


class Window(NamedTuple):
    """What a counter measures of each period.

    Attributes:
        window_s: how much of it.
        delay_s: how long before the counter moves that ends.
        residual: what it leaves unexplained of the moves' variance, as a share.
        powers_w: idle and busy, that explain the moves best.
    """

    window_s: float
    delay_s: float
    residual: float
    powers_w: tuple[float, float]


@dataclass(frozen=True)
class Counter:
    """How the energy counter counts.

    Attributes:
        period: between moves.
        window_s: of each period, in which it measures.
        delay_s: from the window's end until the counter moves.
        residual: what the window does not explain of the moves' variance, as a share.
        idle_w, loaded_w: powers that explain the moves best.
        num_failed: reads that failed, for a reason that passed.
    """

    period: Spread
    window_s: float
    delay_s: float
    residual: float
    idle_w: float
    loaded_w: float
    num_failed: int

    @property
    def verdict(self) -> Verdict:
        """Power is found from moves of the counter, each of which is taken to measure all of its period."""
        period_s = self.period.median_s
        jitter_s = (self.period.p95_s - self.period.p05_s) / 2
        is_whole = self.window_s >= _WHOLE * period_s
        measures = "all the time" if is_whole else f"{ms(self.window_s)} of them only"
        sentence = (
            f"the counter moves every {ms(period_s)} (jitter {ms(jitter_s)}) and measures {measures}; waiting "
            f"{self.idle_w:.0f} W, under load {self.loaded_w:.0f} W; assumed: every {ms(_LONGEST_PERIOD_S)} or more "
            "often, and all the time"
        )
        return Verdict(standing(as_assumed=is_whole and period_s <= _LONGEST_PERIOD_S), sentence)


def measure_counter(bench: Bench) -> Counter:
    """Gives the GPU a load that comes and goes at random, and watches the counter."""
    if not bench.device.counts_energy:
        raise NotMeasured("this GPU has no energy counter; its power is sampled instead, which is less exact")
    moves: list[tuple[float, float]] = []
    num_failed = [0]
    ending = threading.Event()

    def watch() -> None:
        last_j: float | None = None
        looked_s = time.monotonic()
        while not ending.wait(_LOOK_EVERY_S):
            try:
                before_s, energy_j, after_s = looked_s, bench.device.total_energy_j(), time.monotonic()
            except CallFailed:
                num_failed[0] += 1
                continue
            looked_s = after_s
            if last_j is not None and energy_j != last_j:
                moves.append(((before_s + after_s) / 2, energy_j))
            last_j = energy_j

    watching = threading.Thread(target=watch, name="perseus-counter", daemon=True)
    pulses: list[Pulse] = []
    draw = random.Random(1)
    watching.start()
    try:
        begin_s = time.monotonic()
        while len(moves) < _NEEDED_MOVES or time.monotonic() < begin_s + bench.step_s:
            if time.monotonic() > begin_s + 2 * bench.step_s + 5:
                break
            busy_until_s = time.monotonic() + _duration_s(draw)
            while time.monotonic() < busy_until_s:
                pulses.append(bench.load.pulse())
            time.sleep(_duration_s(draw))
    finally:
        ending.set()
        watching.join(2.0)
    if len(moves) < _NEEDED_MOVES:
        raise NotMeasured(f"the counter has moved {len(moves)} times in {time.monotonic() - begin_s:.0f} s")
    times_s = [time_s for time_s, _ in moves]
    period = Spread.of([after - before for before, after in itertools.pairwise(times_s)])
    window_s, delay_s, residual, (idle_w, loaded_w) = fit_window(moves, pulses, period.median_s)
    return Counter(period, window_s, delay_s, residual, idle_w, loaded_w, num_failed[0])


def _duration_s(draw: random.Random) -> float:
    return float(_SHORTEST_S * (_LONGEST_S / _SHORTEST_S) ** draw.random())


def fit_window(moves: Sequence[tuple[float, float]], pulses: Sequence[Pulse], period_s: float) -> Window:
    """The window that explains the moves best: what the GPU drew in it is what the counter takes for all the period.

    Args:
        moves: time [s] and new value [J] of each.
        pulses: when the GPU was busy.
        period_s: between moves.
    """
    pairs = [
        (end_s, end_j - begin_j)
        for (begin_s, begin_j), (end_s, end_j) in itertools.pairwise(moves)
        if abs((end_s - begin_s) / period_s - 1) < 0.2  # a move was missed, or seen late
    ]
    if len(pairs) < _NEEDED_MOVES // 2:
        raise NotMeasured("the counter moves too irregularly to tell what it measures")
    ends_s = np.array([end_s for end_s, _ in pairs])
    powers_w = np.array([energy_j for _, energy_j in pairs]) / period_s
    windows_s = [period_s * n / _NUM_WINDOWS for n in range(1, _NUM_WINDOWS + 1)]
    delays_s = [period_s * n / _NUM_DELAYS for n in range(_NUM_DELAYS)]
    fits = [(*_fit(ends_s - d, powers_w, pulses, w), w, d) for w in windows_s for d in delays_s]
    best, assumed = min(fits), min(fit for fit in fits if fit[2] == windows_s[-1])
    if best[0] > _BETTER * assumed[0]:
        best = assumed
    residual, fitted_w, window_s, delay_s = best
    return Window(window_s, delay_s, residual, fitted_w)


def _fit(ends_s: Array, powers_w: Array, pulses: Sequence[Pulse], window_s: float) -> tuple[float, tuple[float, float]]:
    shares = _busy_share(ends_s - window_s, ends_s, pulses)
    equations = np.column_stack([1 - shares, shares])
    fitted_w, *_ = np.linalg.lstsq(equations, powers_w, rcond=None)
    # Single moves may be seen late.
    unexplained = np.sort((powers_w - equations @ fitted_w) ** 2)[: math.ceil(_COUNTED * len(powers_w))]
    return float(unexplained.mean() / max(powers_w.var(), 1e-9)), (float(fitted_w[0]), float(fitted_w[1]))


def _busy_share(begins_s: Array, ends_s: Array, pulses: Sequence[Pulse]) -> Array:
    """The share of each span in which the GPU was busy."""
    edges_s = np.array([time_s for pulse in pulses for time_s in pulse])
    done_s = np.cumsum([0.0, *(pulse.time_s for pulse in pulses)])
    busy_at = np.repeat(done_s, 2)[1:-1]  # busy seconds before each edge
    busy_s = np.interp(ends_s, edges_s, busy_at) - np.interp(begins_s, edges_s, busy_at)
    return np.asarray(busy_s / (ends_s - begins_s))
