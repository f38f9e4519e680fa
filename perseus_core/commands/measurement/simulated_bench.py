"""The load of a simulated GPU, the forwards of the profile that it follows, and its counting of cycles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from perseus_core.commands.measurement.load import MATRIX_PRODUCTS, Pulse
from perseus_core.gpu.simulated import SimulatedNode, WorkEmulator, open_node
from perseus_core.gpu.simulated.slices import SimulatedSlices


class SimulatedLoad:
    """See `Load`. One forward is a pulse."""

    kinds: tuple[str, ...] = (MATRIX_PRODUCTS,)

    def __init__(self, node: SimulatedNode, gpu_index: int) -> None:
        """On one GPU of a node."""
        self._emulator = WorkEmulator(node, gpu_index)

    def pulse(self, kind: str = MATRIX_PRODUCTS) -> Pulse:
        """See `Load`."""
        executed = self._emulator.work("forward")
        return Pulse(executed.start_s, executed.end_s)

    def waiting(self) -> AbstractContextManager[None]:
        """See `Load`: a simulated GPU that does nothing waits."""
        return nullcontext()


def simulated_load_and_slices(uuid: str) -> tuple[SimulatedLoad, SimulatedSlices]:
    """Of one GPU of this simulation."""
    node = open_node()
    gpu = next(gpu for gpu in node.gpus if gpu.identity.uuid == uuid)
    return SimulatedLoad(node, gpu.identity.index), SimulatedSlices(gpu)
