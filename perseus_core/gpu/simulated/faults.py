"""What can be broken on a simulated GPU while everything runs, by any process that opens the same node.

    node = simulated.open_node()
    faults.throttle(node.gpus[2], 900)   # GPU 2 becomes the straggler
    faults.clear(node.gpus[2])

Faults are those of the driver: work goes on on a GPU that NVML has lost, at the clock it has.
"""

from __future__ import annotations

from typing import Any

from perseus_core.gpu.simulated.node import SimulatedGpu

NO_PERMISSION = "no_permission"
NOT_SUPPORTED = "not_supported"
HANG_S = "hang_s"
LOST = "lost"


def throttle(gpu: SimulatedGpu, limit_mhz: int) -> None:
    """Heat limits the clock, at once, whatever is locked. Throttle reasons tell."""
    with gpu.changing() as state:
        state.thermal_limit_mhz = limit_mhz


def deny_permission(gpu: SimulatedGpu) -> None:
    """Whoever sets anything on this GPU is told that he lacks permission."""
    _set(gpu, NO_PERMISSION, True)


def remove_support(gpu: SimulatedGpu, function: str) -> None:
    """One NVML function, named as in C but without `_v2` and the like, is not supported on this GPU."""
    with gpu.changing() as state:
        state.faults[NOT_SUPPORTED] = sorted({*state.faults.get(NOT_SUPPORTED, []), function})


def hang(gpu: SimulatedGpu, function: str, seconds: float) -> None:
    """Each call of one NVML function, named as in C but without `_v2` and the like, takes that long on this GPU."""
    with gpu.changing() as state:
        state.faults[HANG_S] = {**state.faults.get(HANG_S, {}), function: seconds}


def lose(gpu: SimulatedGpu) -> None:
    """The GPU falls off the bus: every NVML call on it fails."""
    _set(gpu, LOST, True)


def clear(gpu: SimulatedGpu) -> None:
    """Mends everything, heat included."""
    with gpu.changing() as state:
        state.faults = {}
        state.thermal_limit_mhz = 0


def _set(gpu: SimulatedGpu, fault: str, value: Any) -> None:
    with gpu.changing() as state:
        state.faults[fault] = value
