"""What every framework adapter needs and none should write again: hooks that come off, and a session that never hurts.

An adapter puts hooks into its framework with `Hooks` and has them call a `Follower`. The follower lets the first
training iteration pass, in which frameworks compile, allocate and learn shapes; at the second, where all ranks are sure
to be at the same place, it opens the session, and passes everything on from there. Whatever fails on our side takes the
hooks off, closes the session, and lets the training go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from perseus_core.gpu.device import Device
from perseus_core.gpu.discovery import device_by_uuid
from perseus_core.gpu.simulated.activation import ENVIRONMENT_VARIABLE as SIMULATED_GPUS
from perseus_core.gpu.simulated.activation import open_node
from perseus_core.gpu.simulated.slices import SimulatedSlices
from perseus_core.gpu.slices import Slices
from perseus_core.planning.schedule import Kind
from perseus_core.runtime.inert import InertSession
from perseus_core.runtime.log import logger, show_log
from perseus_core.runtime.measure.cuda_events import CudaEvents
from perseus_core.runtime.measure.events import EventSource, HostEvents
from perseus_core.runtime.opening import tell_failed, visible_device

if TYPE_CHECKING:
    import torch

_ABSENT = object()


class FollowedSession(Protocol):
    """What a follower needs of a `perseus_core.runtime.session.Session`."""

    def begin_iteration(self, num_microbatches: int, *, training: bool = True) -> None:
        """An iteration starts."""

    def begin_instruction(self, chunk: int, microbatch: int, kind: Kind) -> None:
        """An instruction of this stage starts."""

    def end_instruction(self) -> None:
        """The instruction that started last has ended."""

    def end_iteration(self) -> None:
        """The iteration has ended."""

    def fail(self, error: Exception) -> None:
        """Nothing more will be passed on: says so, here and to the other ranks, and gives the clock back."""

    def close(self) -> None:
        """Gives the clock back and leaves."""


class Hooks:
    """Attributes put on objects, classes or modules of a framework, to be taken off again."""

    def __init__(self) -> None:
        """No hooks yet."""
        self._before: list[tuple[Any, str, Any]] = []

    def put(self, target: Any, name: str, value: Any) -> None:
        """Sets `target.name`; what the target itself had there comes back with `take_off`."""
        self._before.append((target, name, vars(target).get(name, _ABSENT)))
        setattr(target, name, value)

    def take_off(self) -> None:
        """Leaves every target as it was found."""
        while self._before:
            target, name, value = self._before.pop()
            if value is _ABSENT:
                delattr(target, name)
            else:
                setattr(target, name, value)


class Follower:
    """Passes what a framework does on to the session. Never raises; does nothing any more once something has failed.

    Attributes:
        session: from the second training iteration on.
    """

    def __init__(self, open_session: Callable[..., FollowedSession], hooks: Hooks) -> None:
        """Opens nothing yet.

        Args:
            open_session: called at the second training iteration, with what the adapter gives `begin_iteration` as
                `opening`. All ranks call it at the same place.
            hooks: taken off when something fails, or at the end.
        """
        self.session: FollowedSession | None = None
        self._open_session = open_session
        self._hooks = hooks
        self._num_trainings = 0
        self._in_iteration = False
        self._finished = False

    @property
    def is_finished(self) -> bool:
        """Whether it does nothing any more."""
        return self._finished

    def begin_iteration(self, num_microbatches: int, *, training: bool, opening: Sequence[Any] = ()) -> None:
        """An iteration starts. Nothing before the second training iteration is followed."""
        if self._finished:
            return
        try:
            if self.session is None:
                if not training or self._is_first_training():
                    return
                self.session = self._open_session(*opening)
                if isinstance(self.session, InertSession):  # it has said why
                    self.finish()
                    return
            self.session.begin_iteration(num_microbatches, training=training)
            self._in_iteration = True
        except Exception as error:
            self.give_up(error)

    def _is_first_training(self) -> bool:
        self._num_trainings += 1
        return self._num_trainings == 1

    def begin_instruction(self, chunk: int, microbatch: int, kind: Kind) -> None:
        """An instruction starts on this rank."""
        if self._in_iteration and self.session is not None:
            try:
                self.session.begin_instruction(chunk, microbatch, kind)
            except Exception as error:
                self.give_up(error)

    def end_instruction(self) -> None:
        """The instruction that started last has been given to the GPU in full."""
        if self._in_iteration and self.session is not None:
            try:
                self.session.end_instruction()
            except Exception as error:
                self.give_up(error)

    def end_iteration(self) -> None:
        """The iteration has been given to the GPU in full, or has been left by an exception of the training's own."""
        if self._in_iteration and self.session is not None:
            self._in_iteration = False
            try:
                self.session.end_iteration()
            except Exception as error:
                self.give_up(error)

    def attempt(self, task: Callable[[FollowedSession], object]) -> None:
        """Does something with the session, if there is one, that may fail; then the follower gives up."""
        if self.session is not None and not self._finished:
            try:
                task(self.session)
            except Exception as error:
                self.give_up(error)

    def finish(self) -> None:
        """The framework is done with what we follow: takes the hooks off and closes the session."""
        self._finished, self._in_iteration = True, False
        try:
            self._hooks.take_off()
            if self.session is not None:
                self.session.close()
        except Exception as error:
            logger.warning("closing failed: %s: %s", type(error).__name__, error)

    def give_up(self, error: Exception) -> None:
        """Says once what went wrong, and lets the training go on without us."""
        if self._finished:
            return
        if self.session is None:
            step_aside(f"{type(error).__name__}: {error}", details=error)
            tell_failed()
        else:
            self.session.fail(error)
        self.finish()


def step_aside(reason: str, *, details: Exception | None = None) -> None:
    """The one line that says that this package does nothing for this job any more, and why.

    Args:
        reason: what is wrong and, if known, what to do.
        details: printed with its traceback where debugging output is on.
    """
    show_log()
    logger.warning("%s; training goes on without perseus", reason)
    if details is not None:
        logger.debug("details", exc_info=details)


def step_aside_unless_expected(framework: str, differences: Sequence[str]) -> bool:
    """Says what differs in a framework from what this package relies on, if anything does.

    Args:
        framework: name and version.
        differences: expectations that are not met.

    Returns:
        whether to step aside.
    """
    if differences and is_first_rank():
        step_aside(f"{framework} differs from what perseus knows ({'; '.join(differences)})")
    return bool(differences)


def is_first_rank() -> bool:
    """Whether this process speaks for what all ranks know. Torch's launchers set RANK."""
    return os.environ.get("RANK", "0") == "0"


def has_gpus_for(torch_device: torch.device) -> bool:
    """Whether training on this device can be on GPUs that we know, real or simulated; says so where it cannot."""
    possible = torch_device.type == "cuda" or SIMULATED_GPUS in os.environ
    if not possible and is_first_rank():
        step_aside(
            f"training runs on {torch_device.type}, not on an NVIDIA GPU (`perseus simulate` gives a job on the CPU "
            "simulated GPUs)"
        )
    return possible


def device_of_rank(torch_device: torch.device, local_rank: int) -> Device:
    """The GPU that a rank computes on. Asks the driver, so it may take a while.

    A rank that computes on the CPU has the simulated GPU with the number of its local rank.

    Raises:
        PerseusError: if it is not to be had.
    """
    if torch_device.type == "cuda":
        import torch

        uuid = getattr(torch.cuda.get_device_properties(torch_device), "uuid", None)  # torch 2.4 and newer
        if uuid is not None:
            return device_by_uuid(str(uuid))
    return visible_device(local_rank)


def events_of(torch_device: torch.device) -> EventSource:
    """The marks on the stream that a rank computes on, on the CPU those of its simulated GPU."""
    return CudaEvents(torch_device) if torch_device.type == "cuda" else _EventsOfSimulatedGpus()


class _EventsOfSimulatedGpus(HostEvents):
    """Marks of a program that computes on the CPU, which simulated GPUs count cycles beside."""

    def slices(self, gpu_uuid: str) -> Slices | None:
        """Of the GPU with this UUID, if there is one."""
        if SIMULATED_GPUS not in os.environ:
            return None
        gpus = (gpu for gpu in open_node().gpus if gpu.identity.uuid == gpu_uuid)
        return next((SimulatedSlices(gpu) for gpu in gpus), None)
