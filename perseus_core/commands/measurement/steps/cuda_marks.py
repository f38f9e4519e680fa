"""What only a real GPU can show: the cost of marks, how sharp anchors are, and graphs captured beside our threads.

Anchors and captures are tried in processes of their own (`cuda_probe`): the number of connections is read when CUDA
begins, and a capture that has become invalid leaves a process of little use. Not confirmed on a GPU yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from perseus_core.commands.measurement.bench import Bench
from perseus_core.commands.measurement.results import NotMeasured, Verdict, ms, standing
from perseus_core.runtime.measure.anchors import SHARP_S

CONNECTIONS = (1, 8, 32)
_NUM_MARKS = 2000
_CHEAP_S = 20e-6
_PROBE_LIMIT_S = 60.0


@dataclass(frozen=True)
class Marks:
    """What a mark costs the training thread.

    Attributes:
        record_s: to record one on the compute stream (mean).
        reached_s: to ask whether it is reached (mean).
    """

    record_s: float
    reached_s: float

    @property
    def verdict(self) -> Verdict:
        """Some microseconds, four times an instruction at most."""
        sentence = (
            f"recording takes {1e6 * self.record_s:.1f} us, asking {1e6 * self.reached_s:.1f} us; assumed: "
            f"{1e6 * _CHEAP_S:.0f} us at most"
        )
        return Verdict(standing(as_assumed=max(self.record_s, self.reached_s) <= _CHEAP_S), sentence)


@dataclass(frozen=True)
class Anchors:
    """Anchors found while the GPU has a long backlog.

    Attributes:
        error_s: by number of connections, the largest error of a sharp anchor.
        refused: by number of connections, the share of anchors that were not sharp.
    """

    error_s: dict[str, float]
    refused: dict[str, float]

    @property
    def verdict(self) -> Verdict:
        """However many connections there are."""
        told = ", ".join(
            f"{ms(error_s)} at {count} ({100 * self.refused[count]:.0f} % refused)"
            for count, error_s in self.error_s.items()
        )
        sentence = (
            f"sharp anchors are wrong by up to {told} connections beside a backlog; assumed: {ms(SHARP_S)} at most"
        )
        return Verdict(standing(as_assumed=max(self.error_s.values()) <= SHARP_S), sentence)


@dataclass(frozen=True)
class Captures:
    """CUDA graphs captured while our threads are at work.

    Attributes:
        num_captured: graphs that were.
        failures: words of those that were not.
    """

    num_captured: int
    failures: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Nothing of ours may break one."""
        sentence = f"{self.num_captured} graphs were captured beside our threads, {len(self.failures)} became invalid"
        if self.failures:
            sentence += f" ({self.failures[0]})"
        return Verdict(standing(as_assumed=not self.failures), f"{sentence}; assumed: none does")


def measure_marks(bench: Bench) -> Marks:
    """Records marks, and asks for them."""
    _require_cuda(bench)
    begin_s = time.perf_counter()
    marks = [bench.events.record() for _ in range(_NUM_MARKS)]
    recorded_s = time.perf_counter()
    for mark in marks:
        mark.reached()
    asked_s = time.perf_counter()
    return Marks((recorded_s - begin_s) / _NUM_MARKS, (asked_s - recorded_s) / _NUM_MARKS)


def measure_anchors(bench: Bench) -> Anchors:
    """A process for each number of connections."""
    _require_cuda(bench)
    error_s, refused = {}, {}
    for count in CONNECTIONS:
        found = _probe("anchors", bench.step_s / len(CONNECTIONS), CUDA_DEVICE_MAX_CONNECTIONS=str(count))
        error_s[str(count)], refused[str(count)] = float(found["error_s"]), float(found["refused"])
    return Anchors(error_s, refused)


def measure_captures(bench: Bench) -> Captures:
    """One process."""
    _require_cuda(bench)
    found = _probe("captures", bench.step_s / 2)
    return Captures(int(found["num_captured"]), tuple(found["failures"]))


def _require_cuda(bench: Bench) -> None:
    if bench.is_simulated:
        raise NotMeasured("a simulated GPU has no CUDA")


def _probe(what: str, duration_s: float, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "perseus_core.commands.measurement.steps.cuda_probe", what, f"{duration_s:g}"]
    try:
        answer = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=_PROBE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotMeasured(f"the process that tries {what} had hung") from None
    if answer.returncode != 0:
        last = answer.stderr.strip().splitlines()[-1:] or ["no word"]
        raise NotMeasured(f"the process that tries {what} has failed ({last[0]})")
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found
