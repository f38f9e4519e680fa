"""The hooks on one pipeline engine: where a batch starts and ends, and each forward and backward pass in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from perseus_core.planning.schedule import Kind
from perseus_core.runtime.adapter import Follower, Hooks
from perseus_ds.instructions import KIND_OF

Microbatches = defaultdict[int, int]
"""From a model chunk to how many of its passes have begun in this batch: the number of the next microbatch."""


def hook_engine(engine: Any, follower: Follower, hooks: Hooks) -> None:
    """Has a follower called for every batch and every forward and backward pass of an engine, and for its end.

    DeepSpeed looks a pass up in `engine._INSTRUCTION_MAP`, a dict of the class. A map of the engine's own in front of
    it reaches this engine only, subclasses included. Loading, reductions and the optimizer step are left as they are:
    they belong to the time of an iteration outside the pipeline, which the session knows from the whole.
    """
    begun = {kind: defaultdict[int, int](int) for kind in KIND_OF.values()}
    instructions = {
        command: _followed_pass(function, KIND_OF[command.__name__], begun[KIND_OF[command.__name__]], follower)
        if command.__name__ in KIND_OF
        else function
        for command, function in engine._INSTRUCTION_MAP.items()
    }
    hooks.put(engine, "_INSTRUCTION_MAP", instructions)
    hooks.put(engine, "_exec_schedule", _followed_batch(engine._exec_schedule, list(begun.values()), follower))
    hooks.put(engine, "destroy", _finishing(engine.destroy, follower))


def _followed_pass(
    function: Callable[..., Any], kind: Kind, begun: Microbatches, follower: Follower
) -> Callable[..., Any]:
    """A forward or backward pass of DeepSpeed with the follower told of both ends."""
    begin_instruction, end_instruction = follower.begin_instruction, follower.end_instruction

    def execute(engine: Any, *args: Any, **kwargs: Any) -> Any:
        chunk = kwargs.get("phase", 0)  # DualPipeV holds two model chunks on a rank
        microbatch = begun[chunk]
        begun[chunk] = microbatch + 1
        begin_instruction(chunk, microbatch, kind)
        result = function(engine, *args, **kwargs)
        end_instruction()
        return result

    return execute


def _followed_batch(
    execute_schedule: Callable[[Any], Any], begun: list[Microbatches], follower: Follower
) -> Callable[[Any], Any]:
    """`engine._exec_schedule` with the follower told of both ends."""

    def execute(pipe_schedule: Any) -> Any:
        for microbatches in begun:
            microbatches.clear()
        # DeepSpeed evaluates under `torch.no_grad` and refuses to train under it.
        training = torch.is_grad_enabled()
        num_microbatches = getattr(pipe_schedule, "num_micro_batches", 0)
        follower.begin_iteration(num_microbatches, training=training, opening=(pipe_schedule,))
        try:
            return execute_schedule(pipe_schedule)
        finally:
            follower.end_iteration()

    return execute


def _finishing(destroy: Callable[[], None], follower: Follower) -> Callable[[], None]:
    """`engine.destroy`, after the follower has finished."""

    def finish_and_destroy() -> None:
        follower.finish()
        destroy()

    return finish_and_destroy
