"""The controller on simulated GPUs, behind the real `pynvml`."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from perseus_core.gpu.errors import GpuLost, NoPermission
from perseus_core.gpu.simulated import (
    SimulatedNode,
    WorkEmulator,
    faults,
    read_clock_requests,
    read_executed,
)
from perseus_core.gpu.simulated.slices import SimulatedSlices
from perseus_core.runtime.clock.controller import ClockController
from perseus_core.runtime.clock.give_back import ClockCallHung, GuardedClock
from perseus_core.runtime.clock.override import ClockOverridden
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.measure.events import Event, HostEvents
from perseus_core.runtime.side_threads import OwnThreads
from tests.planned_clocks import without_gaps
from tests.runtime.simulated_machine import device_of, duration_s, locked_range, simulated_machine, wait_until

LOCK = "nvmlDeviceSetGpuLockedClocks"
RESET = "nvmlDeviceResetGpuLockedClocks"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SimulatedNode]:
    with simulated_machine(tmp_path) as machine:
        yield machine


@pytest.fixture
def make_controller(node: SimulatedNode) -> Iterator[Callable[..., ClockController]]:
    """Controllers of GPU 0, started, guarded, and stopped when the test ends."""
    made = []

    def make(**limits: float) -> ClockController:
        controller = ClockController(
            device_of(node), threads=OwnThreads(), guard=functools.partial(GuardedClock, **limits)
        )
        made.append(controller)
        controller.start()
        wait_until(lambda: controller.is_guarded)
        return controller

    yield make
    faults.clear(node.gpus[0])
    for controller in made:
        controller.stop()


class LateEvent:
    """An event that the GPU reaches when the test says so."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._time_s = 0.0

    def reach(self) -> None:
        self._time_s = time.monotonic()
        self._reached.set()

    def reached(self) -> bool:
        return self._reached.is_set()

    def wait(self) -> None:
        self._reached.wait()

    def time_s(self) -> float:
        return self._time_s


def run_iteration(
    controller: ClockController, plan: Sequence[PlannedClock] | None, work: Callable[[int], object], num: int
) -> None:
    events = HostEvents()
    controller.begin_iteration(plan)
    for position in range(num):
        controller.instruction_begins(events.record())
        work(position)
        controller.instruction_ends(events.record())
    controller.end_iteration()


def requested_mhz(node: SimulatedNode) -> list[int | None]:
    return [request.clock_mhz for request in read_clock_requests(node.folder)]


def test_instructions_run_at_their_planned_clocks(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """Nearly all of their time, with 15 ms for a change at nearly every boundary; no clock is asked for twice."""
    controller = make_controller()
    kinds = ["forward", "forward", "backward", "forward", "backward", "backward", "backward"]
    clocks = [1000, 600, 900, 700, 500, 500, 800]
    plan = without_gaps(*((clock, duration_s(kind, clock)) for kind, clock in zip(kinds, clocks, strict=True)))
    emulator = WorkEmulator(node, 0)
    for iteration in range(5):
        run_iteration(
            controller,
            plan,
            lambda position, i=iteration: emulator.work(kinds[position], label={"iteration": i, "position": position}),
            len(plan),
        )
    controller.stop()
    shares = defaultdict(list)
    for executed in read_executed(node.folder):
        if executed.label["iteration"] > 0:  # the first one begins at whatever clock there was
            position = executed.label["position"]
            shares[position].append(executed.share_at(clocks[position]))
    assert len(shares) == len(plan)
    # The best of the iterations, because on a busy machine the controller's thread comes late in some.
    assert min(max(s) for s in shares.values()) > 0.5
    assert max(shares[5]) > 0.95  # between two of which one has the same clock
    requests = requested_mhz(node)
    assert all(before != after for before, after in itertools.pairwise(requests))
    assert 0.014 < min(controller.switching.down_s, controller.switching.up_s) < 0.1
    assert controller.failure is None


def test_one_clock_is_held_until_it_is_given_back(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """As in the profiling sweep; asking again for the same costs no call."""
    controller = make_controller()
    for _ in range(3):
        controller.hold(700)
    wait_until(lambda: controller.clock_in_force_mhz == 700)
    controller.hold(None)
    wait_until(lambda: controller.clock_in_force_mhz is None)
    assert locked_range(node) == []
    assert requested_mhz(node) == [700, None]
    assert controller.num_lock_calls == 1


def test_a_clock_is_held_from_an_event_on(node: SimulatedNode, make_controller: Callable[..., ClockController]) -> None:
    """The host is ahead of the GPU: what the GPU still does runs at the clock that was asked for before."""
    controller = make_controller()
    controller.hold(700)
    begins = LateEvent()
    controller.hold(600, begins)
    wait_until(lambda: controller.clock_in_force_mhz == 700)
    time.sleep(0.1)  # were the event not waited for, it would be asked for long before
    assert controller.clock_in_force_mhz == 700
    begins.reach()
    wait_until(lambda: controller.clock_in_force_mhz == 600)


def test_a_clock_is_held_as_long_as_instructions_are_reported(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """They are the sign of life that the watchdog waits for."""
    controller = make_controller(hang_limit_s=2.0)
    controller.hold(700)
    events = HostEvents()
    for _ in range(260):
        controller.instruction_begins(events.record())
        time.sleep(0.01)
        controller.instruction_ends(events.record())
    assert controller.times_given_back == 0
    assert requested_mhz(node) == [700]
    wait_until(lambda: locked_range(node) == [])


def test_an_iteration_without_a_plan_leaves_the_clock_alone(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """Neither locked nor reset."""
    controller = make_controller()
    controller.hold(800)
    run_iteration(controller, None, lambda _: None, 3)
    run_iteration(controller, without_gaps((600, 0.05)), lambda _: None, 1)
    wait_until(lambda: controller.clock_in_force_mhz == 600)
    assert requested_mhz(node) == [800, 600] or requested_mhz(node) == [600]


def test_it_goes_to_the_newest_instruction_that_the_gpu_has_reached(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """What was recorded far ahead waits for the GPU, and what is over by then is left out."""
    controller = make_controller()
    plan = without_gaps(*((clock, 10.0) for clock in (900, 800, 700, 600)))
    marks = [LateEvent() for _ in plan]
    controller.begin_iteration(plan)
    for mark in marks:
        event: Event = mark
        controller.instruction_begins(event)
    wait_until(lambda: controller.clock_in_force_mhz == 900)
    for mark in (marks[2], marks[1], marks[0]):
        mark.reach()
    wait_until(lambda: controller.clock_in_force_mhz == 700)
    marks[3].reach()
    wait_until(lambda: controller.clock_in_force_mhz == 600)
    assert requested_mhz(node) == [900, 700, 600]


def test_a_missing_permission_is_kept_and_training_goes_on(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """One error with the remedy; after it, nothing is tried any more."""
    faults.deny_permission(node.gpus[0])
    controller = make_controller()
    controller.hold(700)
    failure = wait_until(lambda: controller.failure)
    assert isinstance(failure, NoPermission)
    assert "CAP_SYS_ADMIN" in str(failure)
    faults.clear(node.gpus[0])
    run_iteration(controller, without_gaps((500, 0.05)), lambda _: None, 20)
    controller.stop()
    assert requested_mhz(node) == []


def test_a_lost_gpu_is_kept_as_the_failure(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """In the middle of training."""
    controller = make_controller()
    controller.hold(700)
    wait_until(lambda: controller.clock_in_force_mhz == 700)
    faults.lose(node.gpus[0])
    controller.hold(600)
    assert isinstance(wait_until(lambda: controller.failure), GpuLost)
    run_iteration(controller, without_gaps((500, 0.05)), lambda _: None, 20)
    controller.stop()


def test_a_clock_that_another_program_resets_is_locked_again(
    node: SimulatedNode, make_controller: Callable[..., ClockController], caplog: pytest.LogCaptureFixture
) -> None:
    """And that is said once; a lower clock may be the work of heat and is left alone."""
    controller = make_controller()
    controller.hold(700)
    wait_until(lambda: controller.clock_in_force_mhz == 700)
    for _ in range(2):
        node.gpus[0].reset_clocks()
        wait_until(lambda: locked_range(node) == [700, 700])
    assert controller.failure is None
    assert len([line for line in caplog.messages if "1000 MHz instead of 700 MHz: another program" in line]) == 1
    faults.throttle(node.gpus[0], 500)
    time.sleep(1.5)
    assert controller.num_lock_calls == 3


def test_a_clock_that_another_program_sets_again_and_again_is_given_back(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """One error with the remedy. Who sets it again and again will do so once more; who does not has left it locked."""
    controller = make_controller()
    controller.hold(700)
    wait_until(lambda: controller.clock_in_force_mhz == 700)

    def is_given_up() -> bool:
        if locked_range(node) != [900, 900] and controller.failure is None:
            node.gpus[0].lock_clocks(900, 900)
        return controller.failure is not None

    wait_until(is_given_up)
    assert isinstance(controller.failure, ClockOverridden)
    assert "keep other programs off" in str(controller.failure)
    controller.stop()
    assert locked_range(node) == []


def test_a_call_that_hangs_stops_neither_training_nor_its_end(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """The clock is given back by another thread, and again should the call come back after all."""
    controller = make_controller(call_limit_s=2.0)
    controller.hold(700)
    wait_until(lambda: controller.clock_in_force_mhz == 700)
    faults.hang(node.gpus[0], LOCK, 3600)
    controller.hold(600)
    run_iteration(controller, without_gaps((500, 0.05)), lambda _: None, 100)
    assert isinstance(wait_until(lambda: controller.failure), ClockCallHung)
    wait_until(lambda: locked_range(node) == [])
    controller.stop()
    faults.clear(node.gpus[0])
    wait_until(lambda: {500, 600} & {*requested_mhz(node)})  # 500 if that came before the call
    wait_until(lambda: locked_range(node) == [])


def test_a_driver_that_hangs_altogether_does_not_hold_up_the_end(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """`stop` returns; the rest is for the watchdog."""
    controller = make_controller(call_limit_s=3600)
    controller.hold(700)
    wait_until(lambda: controller.clock_in_force_mhz == 700)
    for function in (LOCK, RESET):
        faults.hang(node.gpus[0], function, 3600)
    controller.hold(600)
    stopping = threading.Thread(target=controller.stop, daemon=True)
    stopping.start()
    stopping.join(60)
    assert not stopping.is_alive()
    assert locked_range(node) == [700, 700]


def test_stopping_while_the_gpu_never_gets_there_gives_the_clock_back(
    node: SimulatedNode, make_controller: Callable[..., ClockController]
) -> None:
    """As when a collective hangs: the thread waits for an event for ever."""
    controller = make_controller()
    controller.hold(700)
    wait_until(lambda: controller.clock_in_force_mhz == 700)
    never = LateEvent()
    controller.instruction_begins(never)
    controller.stop()
    wait_until(lambda: locked_range(node) == [])
    never.reach()


def test_the_gpu_tells_how_long_changes_take_whatever_its_register_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a tenth of a second, up and down, with a register that shows what was asked for at once."""
    with simulated_machine(tmp_path, clock_latency_s=0.15, clock_latency_down_s=0.11) as node:
        device, asked_mhz = device_of(node), [1000]
        lock = device.lock_clock
        monkeypatch.setattr(device, "lock_clock", lambda mhz: (asked_mhz.append(mhz), lock(mhz)))
        monkeypatch.setattr(device, "sm_clock_mhz", lambda: asked_mhz[-1])
        controller = ClockController(device, threads=OwnThreads(), slices=SimulatedSlices(node.gpus[0]))
        try:
            controller.start()
            wait_until(lambda: controller.is_guarded)
            for clock_mhz in (600, 900) * 4:
                controller.hold(clock_mhz)
                wait_until(lambda mhz=clock_mhz: controller.clock_in_force_mhz == mhz)
                wait_until(lambda: not controller._latency.is_watching)
            up_s, down_s = controller.seen_changes.up_s, controller.seen_changes.down_s
            assert (controller.switching.up_s, controller.switching.down_s) == (up_s, down_s)
            assert up_s == pytest.approx(0.15, abs=0.03)
            assert down_s == pytest.approx(0.11, abs=0.02)
        finally:
            controller.stop()
