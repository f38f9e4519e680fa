"""From an engine whose config has a `perseus` block to hooks on it, and to a session at its first training batch."""

from __future__ import annotations

import weakref
from typing import Any

import deepspeed

from perseus_core.runtime.adapter import (
    Follower,
    Hooks,
    has_gpus_for,
    is_first_rank,
    step_aside,
    step_aside_unless_expected,
)
from perseus_core.runtime.settings import Settings
from perseus_ds.checkpoint import CheckpointedState
from perseus_ds.engine_hooks import hook_engine
from perseus_ds.internals import differences
from perseus_ds.session_opening import open_engine_session

# The follower of this process, if there is one; the engine's hooks keep it alive.
_current: weakref.ref[Follower] | None = None


def follow(engine: Any, settings: Settings) -> None:
    """Puts hooks on an engine, if the settings ask for it and its DeepSpeed is as expected. Never raises."""
    if not settings.enabled:
        return
    try:
        _follow(engine, settings)
    except Exception as error:
        step_aside(f"{type(error).__name__}: {error}", details=error)


def _follow(engine: Any, settings: Settings) -> None:
    global _current
    if step_aside_unless_expected(f"DeepSpeed {deepspeed.__version__}", differences(engine)):
        return
    if is_one_followed():
        if is_first_rank():
            step_aside(
                "this process has another pipeline engine with a perseus block; one engine at a time is followed, and "
                "the first stays it; this one is left alone"
            )
        return
    if not has_gpus_for(engine.device):
        return
    hooks = Hooks()
    state = CheckpointedState(settings)
    follower = Follower(lambda pipe_schedule: open_engine_session(engine, state.settings, pipe_schedule), hooks)
    hook_engine(engine, follower, hooks)
    state.hook_engine(engine, hooks)
    hooks.put(engine, "perseus", follower)
    _current = weakref.ref(follower)


def is_one_followed() -> bool:
    """Whether an engine of this process is followed already."""
    follower = None if _current is None else _current()
    return follower is not None and not follower.is_finished


def leave_alone(settings: Settings) -> None:
    """Says of an engine without a pipeline that nothing is done for it, if the settings ask for something."""
    if settings.enabled and is_first_rank():
        step_aside(
            'the config has a "perseus" block, but this engine has no pipeline (its model is not a PipelineModule), '
            "and without one there is nothing to slow down for free"
        )
