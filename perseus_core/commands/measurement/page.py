"""What is handed out: a page of text, and the file that a session reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perseus_core.commands.measurement.supervisor import Measured
from perseus_core.runtime.gpu_measurements import GpuMeasurements


@dataclass(frozen=True)
class About:
    """When and on what it was measured.

    Attributes:
        gpu_name: the model of GPU.
        num_gpus: how many were visible.
        driver: its version.
        is_simulated: whether the GPUs are.
        date: local date and time.
        shared_with: processes that computed on them meanwhile.
    """

    gpu_name: str
    num_gpus: int
    driver: str
    is_simulated: bool
    date: str
    shared_with: tuple[int, ...] = ()

    @classmethod
    def now(
        cls, gpu_name: str, num_gpus: int, driver: str, *, is_simulated: bool, shared_with: Sequence[int] = ()
    ) -> About:
        """At this moment."""
        date = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(gpu_name, num_gpus, driver, is_simulated, date, tuple(shared_with))

    def __str__(self) -> str:
        simulated = " (simulated)" if self.is_simulated else ""
        others = ""
        if self.shared_with:
            others = (
                f"; process(es) {', '.join(map(str, self.shared_with))} compute there, too: figures are theirs, too"
            )
        return f"{self.num_gpus} x {self.gpu_name}{simulated}, driver {self.driver}, {self.date}{others}"


def line_of(measured: Measured) -> str:
    """One step on the page."""
    return f"{measured.title}: {measured.sentence}"


def for_session(about: About, steps: Sequence[Measured]) -> GpuMeasurements:
    """What a session uses of it."""
    figures = {step.name: step.figures for step in steps if step.figures}
    latency, calls = figures.get("latency", {}), figures.get("lock_call", {})
    counter, prices = figures.get("counter", {}), figures.get("call_price", {})

    def median_s(spread: Any) -> float:
        return float(spread["median_s"]) if spread else 0.0

    return GpuMeasurements(
        about.gpu_name,
        about.is_simulated,
        up_s=median_s(latency.get("up")),
        down_s=median_s(latency.get("down")),
        jitter_s=float(latency.get("jitter_s", 0.0)),
        call_s=max(median_s(calls.get("idle")), median_s(calls.get("loaded"))),
        harmless_calls_per_s=prices.get("harmless_per_s"),
        counter_period_s=median_s(counter.get("period")),
        counter_window_s=float(counter.get("window_s", 0.0)),
    )


def save(path: str | Path, about: About, steps: Sequence[Measured]) -> GpuMeasurements:
    """Writes the file; returns what a session will read of it.

    Raises:
        InputError: if it cannot be written.
    """
    found = for_session(about, steps)
    found.save(path, about=asdict(about), steps=[document_of(step) for step in steps])
    return found


def document_of(measured: Measured) -> dict[str, Any]:
    """One step, for machines."""
    return {**asdict(measured), "standing": measured.standing.value}
