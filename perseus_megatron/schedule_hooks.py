"""The hooks in Megatron's pipeline schedules: where an iteration starts and ends, and each forward and backward in it.

`megatron.core.pipeline_parallel.schedules` looks its functions up by name whenever it calls them, so replacing the
names reaches every schedule, and nothing else has to be touched. Communication and waiting lie between the windows.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

from perseus_core.planning.schedule import Kind
from perseus_core.runtime.adapter import Hooks

ITERATIONS = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)


class Listener(Protocol):
    """What hears of iterations and instructions: a `perseus_core.runtime.adapter.Follower`."""

    def begin_iteration(self, num_microbatches: int, *, training: bool, opening: Sequence[Any] = ()) -> None:
        """An iteration starts."""

    def begin_instruction(self, chunk: int, microbatch: int, kind: Kind) -> None:
        """An instruction starts on this rank."""

    def end_instruction(self) -> None:
        """The instruction that started last has been given to the GPU in full."""

    def end_iteration(self) -> None:
        """The iteration has ended, if one was going on."""


def combined_1f1b() -> ModuleType | None:
    """Where Megatron overlaps expert-parallel communication; 0.12 and 0.13 do not."""
    try:
        return importlib.import_module("megatron.core.pipeline_parallel.combined_1f1b")
    except ImportError:
        return None


class ScheduleHooks:
    """Tells a listener what Megatron's schedules do.

    Attributes:
        announced: an instruction is running that a schedule of the user's own has announced; what Megatron runs inside
            it belongs to it.
    """

    def __init__(self, listener: Listener) -> None:
        """Nothing is hooked yet."""
        self.announced = False
        self._listener = listener
        self._in_step = False
        self._chunk_of: dict[int, int] = {}  # by identity of the model chunk
        self._instruction_of: dict[int, tuple[int, int]] = {}  # chunk and microbatch, by identity of a forward's output
        self._backwards_begun: dict[int, int] = {}  # by chunk

    def put(self, hooks: Hooks, schedules: ModuleType, combined: ModuleType | None) -> None:
        """Puts hooks into Megatron's modules."""
        for name in ITERATIONS:
            hooks.put(schedules, name, self._followed_iteration(getattr(schedules, name)))
        hooks.put(schedules, "forward_step", self._followed_forward(schedules.forward_step))
        hooks.put(schedules, "backward_step", self._followed_backward(schedules.backward_step))
        multimodule = getattr(schedules, "backward_step_multimodule", None)  # from 0.17
        if multimodule is not None:
            hooks.put(schedules, "backward_step_multimodule", self._followed_backward(multimodule))
        if combined is not None:
            step = self._followed_combined(combined.combined_forward_backward_step)
            hooks.put(combined, "combined_forward_backward_step", step)

    # Iterations

    def begin_step(self) -> None:
        """A step of training begins; its iteration ends with it and not with the last backward."""
        self._in_step = True

    def end_step(self) -> None:
        """The step has ended, the optimizer's part included."""
        self._in_step = False
        self._listener.end_iteration()

    def begin_iteration(self, num_microbatches: int, *, training: bool, opening: tuple[Any, ...]) -> None:
        """A schedule begins."""
        # Megatron's rerun machine may run a schedule more than once in a step.
        self._listener.end_iteration()
        self._instruction_of.clear()
        self._backwards_begun.clear()
        self._listener.begin_iteration(num_microbatches, training=training, opening=opening)

    def end_iteration(self) -> None:
        """A schedule has ended, or has been left by an exception."""
        if not self._in_step:
            self._listener.end_iteration()

    def _followed_iteration(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def execute(*args: Any, **kwargs: Any) -> Any:
            # All arguments are keyword-only.
            model = kwargs["model"]
            chunks = model if isinstance(model, list) else [model]
            self._chunk_of = {id(chunk): place for place, chunk in enumerate(chunks)}
            num_microbatches = kwargs["num_microbatches"]
            sizes = num_microbatches, kwargs.get("seq_length", 0), kwargs.get("micro_batch_size", 0)
            training = not kwargs.get("forward_only", False)
            self.begin_iteration(num_microbatches, training=training, opening=(chunks, *sizes))
            try:
                return run(*args, **kwargs)
            finally:
                self.end_iteration()

        return execute

    # Instructions

    def _followed_forward(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        begin_instruction, end_instruction = self._listener.begin_instruction, self._listener.end_instruction

        @functools.wraps(forward_step)
        def execute(*args: Any, **kwargs: Any) -> Any:
            chunk = self._chunk_of.get(id(args[2])) if len(args) > 2 else None
            microbatch = kwargs.get("current_microbatch")
            if chunk is None or microbatch is None or self.announced:
                return forward_step(*args, **kwargs)
            begin_instruction(chunk, microbatch, Kind.FORWARD)
            result = forward_step(*args, **kwargs)
            end_instruction()
            self._instruction_of[id(result[0])] = chunk, microbatch
            return result

        return execute

    def _followed_backward(self, backward_step: Callable[..., Any]) -> Callable[..., Any]:
        begin_instruction, end_instruction = self._listener.begin_instruction, self._listener.end_instruction

        @functools.wraps(backward_step)
        def execute(*args: Any, **kwargs: Any) -> Any:
            # The schedules hand on the very object that the forward returned, and keep it until now.
            instruction = self._instruction_of.pop(id(args[1]), None) if len(args) > 1 else None
            if instruction is None or self.announced:
                return backward_step(*args, **kwargs)
            begin_instruction(*instruction, Kind.BACKWARD)
            result = backward_step(*args, **kwargs)
            end_instruction()
            return result

        return execute

    def _followed_combined(self, combined_step: Callable[..., Any]) -> Callable[..., Any]:
        begin_instruction, end_instruction = self._listener.begin_instruction, self._listener.end_instruction

        @functools.wraps(combined_step)
        def execute(*args: Any, **kwargs: Any) -> Any:
            forward_chunk, backward_chunk = self._chunk_of.get(id(args[2])), self._chunk_of.get(id(args[6]))
            if self.announced:
                return combined_step(*args, **kwargs)
            if backward_chunk is not None:
                # A chunk's backwards come in the order of the microbatches.
                microbatch = self._backwards_begun.get(backward_chunk, 0)
                self._backwards_begun[backward_chunk] = microbatch + 1
                kind = Kind.BACKWARD if forward_chunk is None else Kind.FORWARD_BACKWARD
                begin = functools.partial(begin_instruction, backward_chunk, microbatch, kind)
            elif forward_chunk is not None:
                begin = functools.partial(begin_instruction, forward_chunk, kwargs["current_microbatch"], Kind.FORWARD)
            else:
                return combined_step(*args, **kwargs)
            wait = kwargs.get("pre_backward")
            if wait is None:
                begin()
            else:
                # Between warm-up and cool-down Megatron waits for its neighbours inside, last of all here.
                kwargs["pre_backward"] = _both(wait, begin)
            result = combined_step(*args, **kwargs)
            end_instruction()
            return result

        return execute


def _both(first: Callable[..., Any], second: Callable[[], None]) -> Callable[..., None]:
    def execute(*args: Any, **kwargs: Any) -> None:
        first(*args, **kwargs)
        second()

    return execute
