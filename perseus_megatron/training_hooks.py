"""The hooks in `megatron.training`: where training starts and ends, and each of its steps."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from perseus_core.runtime.adapter import Hooks, step_aside
from perseus_core.runtime.log import Metric
from perseus_core.runtime.settings import Settings
from perseus_megatron.flags import with_state_in_checkpoint
from perseus_megatron.following import follow
from perseus_megatron.schedule_hooks import ScheduleHooks


def hook_training(settings: Settings) -> None:
    """Has `megatron.training.training.train` followed: before it, no schedule function has been looked up yet.

    Args:
        settings: what the command line asks for.
    """
    training = importlib.import_module("megatron.training.training")
    # A program may parse its arguments more than once; the last word counts.
    train: Callable[..., Any] = getattr(training.train, "of_perseus", training.train)

    @functools.wraps(train)
    def train_followed(*args: Any, **kwargs: Any) -> Any:
        model = inspect.signature(train).bind(*args, **kwargs).arguments.get("model")
        if model is None:
            step_aside("megatron.training.training.train has no argument model")
            return train(*args, **kwargs)
        where_state_is_kept = with_state_in_checkpoint(settings, training.get_args())
        hook = functools.partial(_hook_steps, training)
        followed = follow(where_state_is_kept, model, metric=_to_writers(training), hook=hook)
        try:
            return train(*args, **kwargs)
        finally:
            followed.close()

    train_followed.of_perseus = train  # type: ignore[attr-defined]
    training.train = train_followed  # type: ignore[attr-defined]


def _to_writers(training: ModuleType) -> Metric:
    """Hands figures to Megatron's TensorBoard and W&B writers, which only the last rank has."""

    def write(name: str, value: float) -> None:
        iteration = training.get_args().curr_iteration
        tensorboard, wandb = training.get_tensorboard_writer(), training.get_wandb_writer()
        if tensorboard:
            tensorboard.add_scalar(f"perseus/{name}", value, iteration)
        if wandb:
            wandb.log({f"perseus/{name}": value}, iteration)

    return write


def _hook_steps(training: ModuleType, hooks: Hooks, schedule_hooks: ScheduleHooks) -> None:
    hooks.put(training, "train_step", _followed_step(training.train_step, schedule_hooks))


def _followed_step(train_step: Callable[..., Any], schedule_hooks: ScheduleHooks) -> Callable[..., Any]:
    """`train_step` with its iteration ending where it ends, the optimizer's part included."""

    @functools.wraps(train_step)
    def execute(*args: Any, **kwargs: Any) -> Any:
        schedule_hooks.begin_step()
        try:
            return train_step(*args, **kwargs)
        finally:
            schedule_hooks.end_step()

    return execute
