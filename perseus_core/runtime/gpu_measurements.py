"""What `perseus doctor --measure` has found on one model of GPU, as far as a session uses it: a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perseus_core.documents import load_document, save_document
from perseus_core.errors import InputError
from perseus_core.gpu.simulated import ENVIRONMENT_VARIABLE
from perseus_core.planning.switching import MOST_JITTER_S, USUAL_JITTER_S, Switching
from perseus_core.runtime.settings import USUAL_CHANGES_PER_S, Settings

FORMAT, VERSION = "perseus-gpu-measurements", 1
_SECTION = "session"
# A counter measures all the time if its window is nearly its period.
_WHOLE = 0.85
_TIMES = ("up_s", "down_s", "jitter_s", "call_s", "counter_period_s", "counter_window_s")


@dataclass(frozen=True)
class GpuMeasurements:
    """What was measured; 0 (or none) where it was not.

    Attributes:
        gpu_name: the model of GPU, as the driver names it.
        is_simulated: whether it was a simulated one.
        up_s, down_s: from asking for a higher, or a lower, clock until it is in force [s].
        jitter_s: how much sooner or later it may come [s].
        call_s: what a lock call takes [s].
        harmless_calls_per_s: so many lock calls a second and GPU disturb nobody.
        counter_period_s: how often the energy counter moves [s].
        counter_window_s: of each period, how much it measures [s].

    Raises:
        InputError: if a number is negative, or not a number.
    """

    gpu_name: str
    is_simulated: bool = False
    up_s: float = 0.0
    down_s: float = 0.0
    jitter_s: float = 0.0
    call_s: float = 0.0
    harmless_calls_per_s: float | None = None
    counter_period_s: float = 0.0
    counter_window_s: float = 0.0

    def __post_init__(self) -> None:
        for name in _TIMES:
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"GPU measurements hold {name} {getattr(self, name)}; it must be 0 or more")
        if self.harmless_calls_per_s is not None and not 0 <= self.harmless_calls_per_s < math.inf:
            raise InputError(
                f"GPU measurements hold harmless_calls_per_s {self.harmless_calls_per_s}; it must be 0 or more"
            )

    @classmethod
    def load(cls, path: str | Path) -> GpuMeasurements:
        """Reads a file that `perseus doctor --measure` has written.

        Raises:
            InputError: naming the file, the field, the value and the remedy.
        """
        section = load_document(path, FORMAT, VERSION).section(_SECTION)
        simulated, harmless = section.fields.get("is_simulated"), section.fields.get("harmless_calls_per_s")
        if not isinstance(simulated, bool):
            raise section.error("is_simulated", simulated, "must be true or false")
        return cls(
            section.text("gpu_name"),
            simulated,
            harmless_calls_per_s=None if harmless is None else section.number("harmless_calls_per_s", at_least=0),
            **{name: section.number(name, at_least=0) for name in _TIMES},
        )

    def save(self, path: str | Path, *, about: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
        """Writes it, with all that was measured besides.

        Args:
            path: of the file.
            about: when and on what.
            steps: what each step found.

        Raises:
            InputError: if it cannot be written.
        """
        save_document(path, FORMAT, VERSION, {**about, _SECTION: asdict(self), "steps": steps})

    def require(self, gpu_name: str, path: str, environment: Mapping[str, str] = os.environ) -> None:
        """Refuses what was measured on another model of GPU, or on a simulated one.

        Raises:
            InputError: if it was.
        """
        told = f'config "perseus.gpu_measurements": {path} '
        remedy = "run `perseus doctor --measure --lock` on this one"
        if gpu_name != self.gpu_name:
            raise InputError(f"{told}was measured on {self.gpu_name}, and this GPU is {gpu_name}; {remedy}")
        if self.is_simulated and ENVIRONMENT_VARIABLE not in environment:
            raise InputError(f"{told}was measured on a simulated GPU; {remedy}")

    @property
    def partial_window_s(self) -> float:
        """Of its period, what the energy counter measures; 0 for all of it."""
        return 0.0 if self.counter_window_s >= _WHOLE * self.counter_period_s else self.counter_window_s

    @property
    def doubt(self) -> str:
        """Why the figures may be those of a busy machine; empty where nothing says so."""
        if self.jitter_s <= MOST_JITTER_S:
            return ""
        return (
            f"changes of clock were seen to come {1e3 * self.jitter_s:.0f} ms too early or too late, as on a machine "
            f"that is busy; plans reckon with {1e3 * MOST_JITTER_S:.0f} ms; measure again while nothing else runs"
        )

    def switching(self, settings: Settings) -> Switching:
        """What changes of clock take: as the user has set it, else as it was measured, else as it usually is."""
        told = settings.switching
        measured = self if settings.switch_latency_s == "auto" else GpuMeasurements(self.gpu_name)
        most = told.max_changes_per_s
        if settings.max_clock_changes_per_s == "auto" and self.harmless_calls_per_s is not None:
            most = min(USUAL_CHANGES_PER_S, self.harmless_calls_per_s)
        return Switching(
            measured.up_s or measured.down_s or told.up_s,
            measured.down_s or measured.up_s or told.down_s,
            min(MOST_JITTER_S, max(USUAL_JITTER_S, measured.jitter_s)),
            most,
            self.call_s,
        )
