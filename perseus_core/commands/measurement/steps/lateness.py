"""How late a side thread of ours comes, alone and beside a thread that trains: it has to get the interpreter first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from perseus_core.commands.measurement.bench import Bench
from perseus_core.commands.measurement.results import Spread, Verdict, ms, standing
from perseus_core.planning.switching import USUAL_JITTER_S
from perseus_core.runtime.side_threads import SideThreads

_EVERY_S = 0.005
# On a busy machine few steps come in the time there is; so many are waited for.
_LEAST_SEEN, _WAITING_LIMIT_S = 10, 10.0
# Twice as long as the interpreter lets a thread run on (`sys.getswitchinterval`): later only beside a thread that stays
# in one call that keeps the interpreter.
_MOST_S = 0.01


@dataclass(frozen=True)
class Lateness:
    """How much later than asked for a step of a side thread began.

    Attributes:
        alone: while nothing else runs.
        beside_python: beside a thread that computes in Python all the time.
        beside_training: beside a thread that gives the GPU its work, as training does.
    """

    alone: Spread
    beside_python: Spread
    beside_training: Spread

    @property
    def verdict(self) -> Verdict:
        """Plans take changes to come a millisecond too early or too late."""
        sentence = (
            f"a side thread comes {ms(self.alone.median_s)} late alone (19 of 20 within {ms(self.alone.p95_s)}), "
            f"{ms(self.beside_training.median_s)} beside a training thread (within {ms(self.beside_training.p95_s)}), "
            f"{ms(self.beside_python.median_s)} beside one that computes in Python (within "
            f"{ms(self.beside_python.p95_s)}); assumed: {ms(USUAL_JITTER_S)} as a rule beside training, "
            f"{ms(_MOST_S)} beside Python"
        )
        as_assumed = self.beside_training.p95_s <= USUAL_JITTER_S and self.beside_python.p95_s <= _MOST_S
        return Verdict(standing(as_assumed=as_assumed), sentence)


def measure_lateness(bench: Bench, compute: Callable[[], object] = lambda: sum(range(1000))) -> Lateness:
    """Has a side thread called every 5 ms.

    Args:
        bench: where.
        compute: what the thread that computes in Python does again and again.
    """
    each_s = bench.step_s / 3
    alone = _late_s(bench.threads, each_s)
    with _again_and_again(compute):
        beside_python = _late_s(bench.threads, each_s)
    with _again_and_again(bench.load.pulse):
        beside_training = _late_s(bench.threads, each_s)
    return Lateness(Spread.of(alone), Spread.of(beside_python), Spread.of(beside_training))


def _late_s(threads: SideThreads, duration_s: float) -> list[float]:
    late_s: list[float] = []
    until_s = threads.now_s() + duration_s
    expected_s = threads.now_s()

    def step() -> float | None:
        nonlocal expected_s
        now_s = threads.now_s()
        late_s.append(now_s - expected_s)
        if now_s > until_s and len(late_s) > _LEAST_SEEN:
            return None
        expected_s = threads.now_s() + _EVERY_S
        return _EVERY_S

    threads.start("perseus-lateness", step).join(duration_s + _WAITING_LIMIT_S)
    return late_s[1:]


class _again_and_again:  # noqa: N801 (a context manager, as it is used)
    """Inside, another thread does something without a pause."""

    def __init__(self, what: Callable[[], object]) -> None:
        self._what, self._ending = what, threading.Event()
        self._thread = threading.Thread(target=self._run, name="perseus-beside", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.is_set():
            self._what()
