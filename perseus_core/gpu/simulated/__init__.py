"""Simulated GPUs, behind the real `pynvml`.

A driver that `pynvml` calls in place of the vendor library, so that product code and other programs cannot tell. Its
state is in a folder shared by all processes (`PERSEUS_SIMULATED_GPUS`), so that ranks, watchdog and command line see
the same GPUs.

    from perseus_core.gpu import simulated

    node = simulated.create_node("configs/gpus/a100.json", folder)   # once
    os.environ[simulated.ENVIRONMENT_VARIABLE] = str(folder)         # for this process and its children
    simulated.install()                                              # pynvml of this process now speaks to it
    simulated.WorkEmulator(node, gpu_index=0).work("forward")        # occupies GPU 0 as a forward pass would

`perseus simulate` does the first three for any command. Only the standard library is needed to live on it.
"""

from perseus_core.gpu.simulated.activation import ENVIRONMENT_VARIABLE, create_node, install, open_node
from perseus_core.gpu.simulated.description import BlockingPower, Description, Noise
from perseus_core.gpu.simulated.emulator import WorkEmulator
from perseus_core.gpu.simulated.execution_log import (
    ClockRequest,
    ExecutedInstruction,
    read_clock_requests,
    read_executed,
)
from perseus_core.gpu.simulated.node import SimulatedGpu, SimulatedNode

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "BlockingPower",
    "ClockRequest",
    "Description",
    "ExecutedInstruction",
    "Noise",
    "SimulatedGpu",
    "SimulatedNode",
    "WorkEmulator",
    "create_node",
    "install",
    "open_node",
    "read_clock_requests",
    "read_executed",
]
