"""What each iteration of the demonstration took, and what ran it: one file a rank, for `demo/report.py`.

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

import torch

from perseus_core.gpu.simulated import open_node

# Iterations under the newest plan that are worth a comparison: with interludes without it before, between and after.
# Where a busy machine leaves it uncertain what the plan costs, by more than this share of the time, more are worth it.
_ENOUGH, _MOST = 40, 120
_CERTAIN = 0.01


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
                "follows_plan": bool(status and status.follows_plan),
                "promised_saving": status.promised_saving if status else 0.0,
            }
        )
        self._last_s, self._last_j = now_s, now_j

    def are_enough(self, most: int) -> bool:
        """Whether there is something to show, on all ranks alike: rank 0 says so.

        A plan has run until it is certain what it costs, or was given up.

        Args:
            most: laps after which it is enough in any case.
        """
        laps = self._laps
        newest = laps[-1]["plan"] if laps else 0
        under_it = sum(lap["follows_plan"] and lap["plan"] == newest for lap in laps)
        given_up = any(lap["plan"] for lap in laps) and laps[-1]["phase"] in ("measure only", "stepped aside")
        has_shown = under_it >= (_ENOUGH if self._is_certain() else _MOST)
        enough = torch.tensor([int(len(laps) >= most or has_shown or given_up)])
        torch.distributed.broadcast(enough, 0)
        return bool(enough.item())

    def _is_certain(self) -> bool:
        """Whether it is known how much longer an iteration takes under the plan."""
        session = self._session()
        low, high = (0.0, 0.0) if session is None else session.status().slowdown_between
        return 0 < high - low <= 2 * _CERTAIN

    def close(self) -> None:
        """Writes the file."""
        session = self._session()
        status = {} if session is None else dataclasses.asdict(session.status())
        status.pop("phase", None)
        self._file.write_text(json.dumps({**self._place, "laps": self._laps, "status": status}))
