"""What each iteration of the demonstration took, in which phase: each rank writes a line, `demo/run.py` reads them all."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from perseus_core.gpu.simulated import SimulatedGpu, open_node


class Laps:
    """Time and exact energy from one iteration's end to the next."""
