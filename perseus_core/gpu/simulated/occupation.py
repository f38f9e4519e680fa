"""Lets a training process on the CPU occupy its simulated GPU while it computes, as a real GPU would be occupied."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

from perseus_core.gpu.simulated.emulator import WorkEmulator
from perseus_core.gpu.simulated.execution_log import ExecutedInstruction
from perseus_core.gpu.simulated.node import SimulatedNode


class Occupation:
    """One process's simulated GPU: an instruction lasts until both the CPU and the GPU have done it.

    The CPU must be quicker than the simulated GPU, or the GPU's clock no longer decides how long things take.
    """

    def __init__(self, node: SimulatedNode, stage: int) -> None:
        """Takes the GPU with the number of the process's LOCAL_RANK, 0 where that is not set.

        Args:
            node: the simulated GPUs.
            stage: whose instructions run on it.
        """
        self._emulator = WorkEmulator(node, int(os.environ.get("LOCAL_RANK", "0")))
        self._stage = stage
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="simulated-gpu")
        self._work: Future[ExecutedInstruction] | None = None

    def begin(self, kind: str, *, chunk: int = 0, microbatch: int | None = None) -> None:
        """The GPU starts on an instruction, in a thread of its own, while the caller computes."""
        label = None if microbatch is None else {"microbatch": microbatch}
        self._work = self._thread.submit(self._emulator.work, kind, stage=self._stage, chunk=chunk, label=label)

    def end(self) -> None:
        """Waits until the GPU has finished it.

        Raises:
            InputError: if the profile has no such instruction.
        """
        work, self._work = self._work, None
        if work is not None:
            work.result()
