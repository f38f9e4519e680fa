"""From settings to hooks in Megatron's schedules, and to a session at the second training iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from perseus_core.planning.schedule import Kind
from perseus_core.runtime.adapter import (
    FollowedSession,
    Follower,
    Hooks,
    has_gpus_for,
    is_first_rank,
    step_aside,
    step_aside_unless_expected,
)
from perseus_core.runtime.log import Metric
from perseus_core.runtime.settings import Settings
from perseus_megatron.layout import Layout
from perseus_megatron.schedule_hooks import ScheduleHooks, combined_1f1b

_current: FollowedTraining | None = None


class FollowedTraining:
    """A training loop that is followed, or one that is left alone: then every method does nothing."""

    def __init__(self, hooks: ScheduleHooks | None, follower: Follower | None) -> None:
        """Made by `follow`."""
        self._hooks = hooks
        self._follower = follower

    @property
    def session(self) -> FollowedSession | None:
        """The session, from the second training iteration on: `set_policy`, `set_straggler`, `status`."""
        return None if self._follower is None else self._follower.session

    @property
    def is_followed(self) -> bool:
        """Whether anything is done."""
        return self._follower is not None and not self._follower.is_finished

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around forward, backward and optimizer: the iteration then ends with the optimizer's step."""
        if self._hooks is None:
            yield
            return
        self._hooks.begin_step()
        try:
            yield
        finally:
            self._hooks.end_step()

    @contextmanager
    def iteration(self, model: Sequence[Any], num_microbatches: int, *, training: bool = True) -> Iterator[None]:
        """Around a schedule of one's own that none of Megatron's three `forward_backward_*` functions runs.

        Args:
            model: this rank's model chunks.
            num_microbatches: of this iteration.
            training: false for an evaluation.
        """
        if self._hooks is None:
            yield
            return
        self._hooks.begin_iteration(num_microbatches, training=training, opening=(list(model), num_microbatches, 0, 0))
        try:
            yield
        finally:
            self._hooks.end_iteration()

    @contextmanager
    def instruction(self, kind: Kind | str, *, microbatch: int, chunk: int = 0) -> Iterator[None]:
        """Around one instruction of a schedule of one's own: a zero-bubble schedule's two parts of a backward, say.

        What Megatron's own `forward_step` and `backward_step` do inside belongs to it and is not announced again.
        """
        if self._hooks is None or self._follower is None:
            yield
            return
        self._hooks.announced = True
        self._follower.begin_instruction(chunk, microbatch, Kind(kind))
        try:
            yield
        finally:
            self._follower.end_instruction()
            self._hooks.announced = False

    def close(self) -> None:
        """Gives the clock back and takes the hooks off."""
        global _current
        if self._follower is not None:
            self._follower.finish()
        if _current is self:
            _current = None


def current_training() -> FollowedTraining | None:
    """The training that is followed in this process."""
    return _current


def follow(
    settings: Settings,
    model: Any | Sequence[Any],
    *,
    layout: Layout | None = None,
    metric: Metric | None = None,
    hook: Callable[[Hooks, ScheduleHooks], None] | None = None,
) -> FollowedTraining:
    """Puts hooks into Megatron's schedules, if the settings ask for it and Megatron is as expected. Never raises.

    Args:
        settings: what the user wants.
        model: this rank's model chunks.
        layout: this rank's place; by default as Megatron says.
        metric: called with the name and value of what is measured.
        hook: puts more hooks.
    """
    if settings.enabled:
        try:
            return _follow(settings, model if isinstance(model, (list, tuple)) else [model], layout, metric, hook)
        except Exception as error:
            step_aside(f"{type(error).__name__}: {error}", details=error)
    return FollowedTraining(None, None)


def _follow(
    settings: Settings,
    model: Sequence[Any],
    layout: Layout | None,
    metric: Metric | None,
    hook: Callable[[Hooks, ScheduleHooks], None] | None,
) -> FollowedTraining:
    global _current
    from megatron.core import __version__
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.utils import get_model_config

    from perseus_megatron.internals import differences, why_not
    from perseus_megatron.session_opening import open_training_session

    left_alone = FollowedTraining(None, None)
    combined = combined_1f1b()
    if step_aside_unless_expected(f"Megatron-core {__version__}", differences(schedules, combined)):
        return left_alone
    if _current is not None and _current.is_followed:
        if is_first_rank():
            step_aside("this process follows another training already, and one at a time; this one is left alone")
        return left_alone
    reason = why_not(get_model_config(model[0]))
    if reason:
        if is_first_rank():
            step_aside(reason)
        return left_alone
    if not has_gpus_for(next(model[0].parameters()).device):
        return left_alone
    place = Layout.of_this_rank() if layout is None else layout
    hooks = Hooks()
    follower = Follower(lambda *sizes: open_training_session(settings, place, *sizes, metric=metric), hooks)
    schedule_hooks = ScheduleHooks(follower)
    schedule_hooks.put(hooks, schedules, combined)
    if hook is not None:
        hook(hooks, schedule_hooks)
    _current = FollowedTraining(schedule_hooks, follower)
    return _current
