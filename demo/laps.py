"""What each iteration of the demonstration took, and in which phase: one file a rank, for `demo/report.py`.

The energy is the simulated GPU's exact one, which no session sees: an independent check of what the session says.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from perseus_core.gpu.simulated import open_node
from perseus_ds import session_of


class Laps:
    """Time and energy of this rank's GPU from one iteration's end to the next."""

    def __init__(self, engine: Any, folder: Path) -> None:
        """Starts now."""
        self._engine = engine
        self._file = folder / f"rank{engine.global_rank}.json"
        self._gpu = open_node().gpus[int(os.environ["LOCAL_RANK"])]
        self._laps: list[dict[str, Any]] = []
        self._last_s, self._last_j = time.monotonic(), self._gpu.true_energy_j()

    def add(self, loss: float) -> None:
        """An iteration has ended."""
        now_s, now_j = time.monotonic(), self._gpu.true_energy_j()
        session = session_of(self._engine)
        status = None if session is None else session.status()
        self._laps.append(
            {
                "time_s": now_s - self._last_s,
                "energy_j": now_j - self._last_j,
                "loss": loss,
                "phase": status.phase.value if status else "not followed",
                "plan": status.plan if status else 0,
            }
        )
        self._last_s, self._last_j = now_s, now_j

    def close(self) -> None:
        """Writes the file."""
        session = session_of(self._engine)
        status = {} if session is None else dataclasses.asdict(session.status())
        status.pop("phase", None)
        stage = {"stage": self._engine.stage_id, "pipeline": self._engine.grid.get_data_parallel_id()}
        self._file.write_text(json.dumps({**stage, "laps": self._laps, "status": status}))
