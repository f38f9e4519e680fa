"""Makes a DeepSpeed pipeline on the CPU occupy simulated GPUs, for demonstrations, first tries and tests.

Under `perseus simulate` one line in the training script, before `deepspeed.initialize`:

    perseus_ds.simulated_work.occupy_simulated_gpus()

Every forward and backward pass then lasts as long as the simulated GPU needs for it at the clock of the moment, while
the CPU computes the real numbers in the same time. The CPU must be quicker than the simulated GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine

from perseus_core.gpu.simulated import open_node
from perseus_core.gpu.simulated.occupation import Occupation
from perseus_core.planning.schedule import Kind
from perseus_ds.instructions import KIND_OF


def occupy_simulated_gpus() -> None:
    """Makes all pipeline engines that are created from now on occupy the GPU with the number of their local rank.

    Raises:
        InputError: if there are no simulated GPUs.
    """
    occupation_of_stage = functools.cache(functools.partial(Occupation, open_node()))
    for engine_class in (PipelineEngine, *PipelineEngine.__subclasses__()):
        instructions = vars(engine_class).get("_INSTRUCTION_MAP", {})
        for command, function in instructions.items():
            if command.__name__ in KIND_OF:
                instructions[command] = _occupying(function, KIND_OF[command.__name__], occupation_of_stage)


def _occupying(
    function: Callable[..., Any], kind: Kind, occupation_of_stage: Callable[[int], Occupation]
) -> Callable[..., Any]:
    """The pass, ending when both the CPU and the simulated GPU have done it."""

    def execute(engine: Any, *args: Any, **kwargs: Any) -> Any:
        occupation = occupation_of_stage(engine.stage_id)
        occupation.begin(kind, chunk=kwargs.get("phase", 0))
        result = function(engine, *args, **kwargs)
        occupation.end()
        return result

    return execute
