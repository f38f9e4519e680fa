"""What each iteration of the demonstration took, and in which phase: one file a rank, for `demo/report.py`.

The energy is the simulated GPU's exact one, which no session sees: an independent check of what the session says.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perseus_core.gpu.simulated import open_node


class Laps:
    """Time and energy of this rank's GPU from one iteration's end to the next."""

    def __init__(self, folder: Path, session: Callable[[], Any], *, stage: int, pipeline: int) -> None:
        """Starts now.

        Args:
            folder: for the file.
            session: gives this rank's session, or None where there is none yet.
            stage: of this rank.
            pipeline: of the data-parallel ones.
        """
        self._session = session
        self._place = {"stage": stage, "pipeline": pipeline}
        self._file = folder / f"rank{os.environ['RANK']}.json"
        self._gpu = open_node().gpus[int(os.environ["LOCAL_RANK"])]
        self._laps: list[dict[str, Any]] = []
        self._last_s, self._last_j = time.monotonic(), self._gpu.true_energy_j()

    def add(self, loss: float) -> None:
        """An iteration has ended."""
        now_s, now_j = time.monotonic(), self._gpu.true_energy_j()
        session = self._session()
        status = None if session is None else session.status()
        self._laps.append(
            {
                "time_s": now_s - self._last_s,
                "energy_j": now_j - self._last_j,
                "loss": loss,
                "phase": status.phase.value if status else "not followed",
                "plan": status.plan if status else 0,
                "promised_saving": status.promised_saving if status else 0.0,
            }
        )
        self._last_s, self._last_j = now_s, now_j

    def close(self) -> None:
        """Writes the file."""
        session = self._session()
        status = {} if session is None else dataclasses.asdict(session.status())
        status.pop("phase", None)
        self._file.write_text(json.dumps({**self._place, "laps": self._laps, "status": status}))
