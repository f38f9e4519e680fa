"""Makes a DeepSpeed pipeline on the CPU occupy simulated GPUs, for demonstrations, first tries and tests.

Under `perseus simulate` one line in the training script, before `deepspeed.initialize`:

    perseus_ds.simulated_work.occupy_simulated_gpus()

Every forward and backward pass then lasts as long as the simulated GPU needs for it at the clock of the moment, while
the CPU computes the real numbers in the same time. The CPU must be quicker than the simulated GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine

from perseus_core.gpu.simulated import WorkEmulator, open_node
from perseus_core.planning.schedule import Kind
from perseus_ds.extraction import KIND_OF


def occupy_simulated_gpus() -> None:
    """Makes all pipeline engines that are created from now on occupy the GPU with the number of their local rank.

    Raises:
        InputError: if there are no simulated GPUs.
    """
    gpu = _SimulatedGpu(WorkEmulator(open_node(), int(os.environ.get("LOCAL_RANK", "0"))))
    for engine_class in (PipelineEngine, *PipelineEngine.__subclasses__()):
        instructions = vars(engine_class).get("_INSTRUCTION_MAP", {})
        for command, function in instructions.items():
            if command.__name__ in KIND_OF:
                instructions[command] = gpu.occupied_by(function, KIND_OF[command.__name__])


class _SimulatedGpu:
    def __init__(self, emulator: WorkEmulator) -> None:
        self._emulator = emulator
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="simulated-gpu")

    def occupied_by(self, function: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
        """The pass, ending when both the CPU and the simulated GPU have done it."""
        passes = 0

        def execute(engine: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal passes
            label = {"pass": passes}
            passes += 1
            chunk = kwargs.get("phase", 0)
            work = self._thread.submit(self._emulator.work, kind, stage=engine.stage_id, chunk=chunk, label=label)
            result = function(engine, *args, **kwargs)
            work.result()
            return result

        return execute
