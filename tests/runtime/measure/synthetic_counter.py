"""An energy counter with a truth in closed form: activities one after another, each with a known power."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perseus_core.planning.schedule import Kind
from perseus_core.runtime.measure.energy import ChunkKind, Iteration, Span
from perseus_core.runtime.measure.sampler import CounterReading

FORWARD = ChunkKind(0, Kind.FORWARD)
BACKWARD = ChunkKind(0, Kind.BACKWARD)

# (type or None for waiting or "outside", seconds, watts)
Piece = tuple[ChunkKind | str | None, float, float]


def stage_in_1f1b(
    *,
    forward: tuple[float, float] = (0.06, 300.0),
    backward: tuple[float, float] = (0.12, 340.0),
    waiting_w: float = 80.0,
    outside: tuple[float, float] = (0.05, 150.0),
    waits_s: float = 0.12,
    noise: float = 0.0,
    random: np.random.Generator | None = None,
) -> list[Piece]:
    """An iteration of the stage before the last of four, with 8 microbatches: (seconds, watts) of each activity."""
    random = random or np.random.default_rng(0)

    def execution(instruction_type: ChunkKind, usual: tuple[float, float]) -> Piece:
        seconds = usual[0] * (1 + noise * random.standard_normal())
        joules = usual[0] * usual[1] * (1 + noise * random.standard_normal())
        return instruction_type, seconds, joules / seconds

    pieces: list[Piece] = [(None, waits_s, waiting_w), execution(FORWARD, forward)]
    for _ in range(7):
        pieces += [execution(FORWARD, forward), (None, waits_s / 20, waiting_w), execution(BACKWARD, backward)]
    pieces += [(None, waits_s, waiting_w), execution(BACKWARD, backward), ("outside", *outside)]
    return pieces


def lay_out(iterations: Sequence[Sequence[Piece]], begin_s: float = 100.0) -> list[Iteration]:
    """Iterations one after another in time."""
    laid_out, now_s = [], begin_s
    for number, pieces in enumerate(iterations):
        start_s, spans = now_s, []
        for what, seconds, _ in pieces:
            if isinstance(what, ChunkKind):
                spans.append(Span(what, now_s, now_s + seconds))
            now_s += seconds
        laid_out.append(Iteration(number, start_s, now_s, tuple(spans)))
    return laid_out


def read_counter(
    iterations: Sequence[Sequence[Piece]],
    *,
    begin_s: float = 100.0,
    period_s: float = 0.1,
    window_s: float = 0.0,
    look_every_s: float = 0.005,
    late_share: float = 0.0,
    clock_mhz: int | None = None,
    random: np.random.Generator | None = None,
) -> list[CounterReading]:
    """What a sampler sees of a counter that moves every `period_s`, in whole millijoules.

    Where it has a window, it measures that at the end of each period and takes it for all of it. A look comes up to a
    tenth late, and in `late_share` of the cases some 30 ms.
    """
    random = random or np.random.default_rng(0)
    pieces = [piece for of_iteration in iterations for piece in of_iteration]
    edges = begin_s + np.concatenate([[0.0], np.cumsum([seconds for _, seconds, _ in pieces])])
    energy = np.concatenate([[0.0], np.cumsum([seconds * watts for _, seconds, watts in pieces])])
    moves = np.arange(begin_s + period_s * random.random(), edges[-1], period_s)
    counted = np.interp(moves, edges, energy)
    if window_s:
        counted = np.cumsum((counted - np.interp(moves - window_s, edges, energy)) * period_s / window_s)
    count = int((edges[-1] - begin_s) / look_every_s)
    steps = look_every_s * (1 + 0.1 * random.random(count))
    steps += (random.random(count) < late_share) * random.exponential(0.03, count)
    looks = begin_s + np.cumsum(steps)
    seen = np.searchsorted(moves, looks)
    return [
        CounterReading(
            (looks[i - 1] + looks[i]) / 2,
            looks[i] - looks[i - 1],
            round(float(counted[seen[i] - 1]), 3),
            clock_mhz,
        )
        for i in range(1, count)
        if seen[i] > seen[i - 1] and looks[i] <= edges[-1]
    ]
