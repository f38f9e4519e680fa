"""What this package relies on inside Megatron, and whether the Megatron at hand is like that.

Known: 0.12 to 0.16.1, and by its sources 0.17 to 0.19.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, ModuleType
from typing import Any

from perseus_megatron.schedule_hooks import ITERATIONS


def differences(schedules: ModuleType, combined: ModuleType | None) -> list[str]:
    """What is not as expected in Megatron's schedules; empty when all is well.

    Args:
        schedules: `megatron.core.pipeline_parallel.schedules`.
        combined: the module beside it, from 0.14.
    """
    expected = {
        f"schedules.{name}(*, model, num_microbatches, forward_only) calls forward_step and backward_step": (
            {"model", "num_microbatches", "forward_only"} <= set(_keyword_only(getattr(schedules, name, None)))
            and {"forward_step", "backward_step"} <= set(_names(getattr(schedules, name, None)))
        )
        for name in ITERATIONS
    }
    expected["schedules.get_forward_backward_func looks them up by name"] = set(ITERATIONS) <= set(
        _names(getattr(schedules, "get_forward_backward_func", None))
    )
    forward = _positional(getattr(schedules, "forward_step", None))
    expected["schedules.forward_step(_, _, model, ..., current_microbatch)"] = (
        forward[2:3] == ["model"] and "current_microbatch" in forward[3:]
    )
    backward = _positional(getattr(schedules, "backward_step", None))
    expected["schedules.backward_step(_, output_tensor, ...)"] = backward[1:2] == ["output_tensor"]
    expected["schedules.get_schedule_table(num_microbatches, num_model_chunks, group)"] = (
        len(_positional(getattr(schedules, "get_schedule_table", None))) == 3
    )
    if combined is not None:
        step = _positional(getattr(combined, "combined_forward_backward_step", None))
        expected["combined_1f1b.combined_forward_backward_step(..., f_model, ..., b_model, ...)"] = (
            step[2:3] == ["f_model"]
            and step[6:7] == ["b_model"]
            and {"current_microbatch", "pre_backward"} <= set(step)
        )
    return [expectation for expectation, met in expected.items() if not met]


def why_not(config: Any) -> str:
    """Why a job with this configuration cannot be followed; empty if it can."""
    graph_impl = getattr(config, "cuda_graph_impl", "none")
    has_graph = getattr(config, "enable_cuda_graph", False) or graph_impl != "none"
    in_scope = has_graph and "full_iteration" in str(getattr(config, "cuda_graph_scope", None))
    if in_scope or graph_impl == "full_iteration":  # an implementation of its own from 0.18
        option = "--cuda-graph-scope" if in_scope else "--cuda-graph-impl"
        return (
            "full-iteration CUDA graphs replay the whole iteration in one piece, and between its instructions there is "
            f"no place to change the clock; leave full_iteration out of {option}"
        )
    if getattr(config, "hybrid_context_parallel", False):
        return "hybrid context parallelism runs other microbatches in every iteration"
    return ""


def _unwrapped(function: Any) -> Any:
    return inspect.unwrap(function) if callable(function) else None


def _keyword_only(function: Any) -> list[str]:
    code = getattr(_unwrapped(function), "__code__", None)
    return [] if code is None else list(code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount])


def _positional(function: Any) -> list[str]:
    code = getattr(_unwrapped(function), "__code__", None)
    return [] if code is None else list(code.co_varnames[: code.co_argcount])


def _names(function: Any) -> Iterator[str]:
    """All global names and attributes that a function's code, and code inside it, uses."""
    codes = [getattr(_unwrapped(function), "__code__", None)]
    while codes:
        code = codes.pop()
        if code is not None:
            yield from code.co_names
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
