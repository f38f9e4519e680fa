"""Makes a Megatron job on the CPU occupy simulated GPUs, for demonstrations, first tries and tests.

Under `perseus simulate` one line in the training script, once `megatron.core.parallel_state` is initialised:

    perseus_megatron.simulated_work.occupy_simulated_gpus()

Every forward and backward pass then lasts as long as the simulated GPU needs for it at the clock of the moment, while
the CPU computes the real numbers in the same time. The CPU must be quicker than the simulated GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from perseus_core.gpu.simulated import open_node
from perseus_core.gpu.simulated.occupation import Occupation
from perseus_core.planning.schedule import Kind
from perseus_core.runtime.adapter import Hooks
from perseus_megatron.schedule_hooks import ScheduleHooks, combined_1f1b


def occupy_simulated_gpus() -> Hooks:
    """Makes Megatron's passes occupy the GPU with the number of the local rank, until the hooks returned are taken off.

    To be called before training is followed: a pass then holds the GPU's work, and is measured with it.

    Raises:
        InputError: if there are no simulated GPUs.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    hooks = Hooks()
    ScheduleHooks(_Work(Occupation(open_node(), stage))).put(hooks, schedules, combined_1f1b())
    return hooks


class _Work:
    """Is told of passes as a session is, and has the GPU do them."""

    def __init__(self, occupation: Occupation) -> None:
        self._occupation = occupation

    def begin_iteration(self, num_microbatches: int, *, training: bool, opening: Sequence[Any] = ()) -> None:
        """Nothing happens between passes."""

    def begin_instruction(self, chunk: int, microbatch: int, kind: Kind) -> None:
        """The GPU starts on it."""
        self._occupation.begin(kind, chunk=chunk, microbatch=microbatch)

    def end_instruction(self) -> None:
        """Returns when the GPU has finished it."""
        self._occupation.end()

    def end_iteration(self) -> None:
        """Nothing happens between passes."""
