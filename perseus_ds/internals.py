"""What this package relies on inside DeepSpeed, and whether the DeepSpeed at hand is like that.

Tried: 0.14.5, 0.16.9, 0.18.9 and 0.19.8. The parts named here have not changed from 0.9.0 to 0.19.8.
"""

from __future__ import annotations

import sys
from typing import Any

from perseus_ds.instructions import KIND_OF


def differences(engine: Any) -> list[str]:
    """What is not as expected in the DeepSpeed of this engine; empty when all is well."""
    instructions = getattr(engine, "_INSTRUCTION_MAP", None)
    names = {getattr(c, "__name__", "") for c in instructions} if isinstance(instructions, dict) else set()
    execute = getattr(type(engine), "_exec_schedule", None)
    expected = {
        "PipelineEngine._INSTRUCTION_MAP has ForwardPass and BackwardPass": set(KIND_OF) <= names,
        # What is put on an engine counts only if the engine looks there.
        "PipelineEngine._exec_schedule(pipe_schedule) reads self._INSTRUCTION_MAP": _reads(execute, "_INSTRUCTION_MAP"),
        "PipelineEngine.train_batch calls self._exec_schedule": _reads(
            getattr(type(engine), "train_batch", None), "_exec_schedule"
        ),
        "deepspeed.runtime.pipe.schedule.PipeSchedule has num_stages, num_micro_batches and steps": all(
            hasattr(_pipe_schedule_class(engine), name) for name in ("num_stages", "num_micro_batches", "steps")
        ),
        "engine has num_stages, stage_id, micro_batches, device": all(
            hasattr(engine, name) for name in ("num_stages", "stage_id", "micro_batches", "device")
        ),
        "engine.grid tells the data-parallel rank": hasattr(getattr(engine, "grid", None), "get_data_parallel_id"),
    }
    return [expectation for expectation, met in expected.items() if not met]


def _reads(method: Any, attribute: str) -> bool:
    """Whether a method's code names an attribute. Decorators that keep `__wrapped__` are looked through."""
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return attribute in getattr(getattr(method, "__code__", None), "co_names", ())


def _pipe_schedule_class(engine: Any) -> Any:
    for base in type(engine).__mro__:
        if base.__name__ == "PipelineEngine":
            return getattr(getattr(sys.modules[base.__module__], "schedule", None), "PipeSchedule", None)
    return None
