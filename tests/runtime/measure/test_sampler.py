"""The sampler behind the real `pynvml`, and on devices that misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perseus_core.gpu import simulated
from perseus_core.gpu.device import ThrottleReason
from perseus_core.gpu.errors import GpuLost
from perseus_core.gpu.simulated import faults
from perseus_core.runtime.measure.sampler import EnergySampler
from perseus_core.runtime.side_threads import OwnThreads
from tests.cluster.virtual_threads import EventQueue, VirtualThreads

from ..simulated_machine import device_of, simulated_machine

PERIOD_S = 0.04


class _CounterInVirtualTime:
    """A GPU's counter that moves by a joule at each whole multiple of its period, and by nothing else."""

    counts_energy = True

    def __init__(self, queue: EventQueue) -> None:
        self.num_looks = 0
        self._queue = queue

    def total_energy_j(self) -> float:
        self.num_looks += 1
        return float(int(self._queue.now_s / PERIOD_S + 1e-9))

    def sm_clock_mhz(self) -> int:
        return 1000

    def throttle_reasons(self) -> ThrottleReason:
        return ThrottleReason.NONE


@pytest.fixture
def node(tmp_path: Path) -> Iterator[simulated.SimulatedNode]:
    with simulated_machine(tmp_path, energy_counter_period_s=0.04) as node:
        yield node


def wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def all_of(sampler: EnergySampler) -> int:
    return len(sampler.between(0, time.monotonic()))


def test_readings_bracket_the_moments_at_which_the_counter_moved() -> None:
    """At whole multiples of its period; to a millisecond once it is known when to look, and that with few looks."""
    queue = EventQueue()
    device = _CounterInVirtualTime(queue)
    sampler = EnergySampler(device, threads=VirtualThreads(queue, 0))
    sampler.start()
    queue.call_at(100.02 * PERIOD_S, queue.stop)
    queue.run_until_stopped()
    readings = sampler.between(0, queue.now_s)
    assert len(readings) == 100
    for number, reading in enumerate(readings, start=1):
        assert abs(reading.time_s - number * PERIOD_S) <= reading.uncertainty_s / 2 + 1e-9
        assert reading.energy_j == number
        assert reading.clock_mhz == 1000
    assert max(reading.uncertainty_s for reading in readings[10:]) <= 0.001 + 1e-9
    assert device.num_looks < 6 * len(readings)
    assert sampler.counter_period_s() == pytest.approx(PERIOD_S, rel=0.01)


def test_energy_between_readings_is_that_of_the_gpu(node: simulated.SimulatedNode) -> None:
    """An idle GPU draws its blocking power of 50 W."""
    with EnergySampler(device_of(node), threads=OwnThreads()) as sampler:
        wait_until(lambda: all_of(sampler) >= 12)
    first, *_, last = sampler.between(0, time.monotonic())
    margin_j = 50 * (first.uncertainty_s + last.uncertainty_s) / 2 + 0.1
    assert last.energy_j - first.energy_j == pytest.approx(50 * (last.time_s - first.time_s), abs=margin_j)


def test_a_gpu_without_counter_has_its_power_integrated(node: simulated.SimulatedNode) -> None:
    """Every look is a reading, with a time known to the length of the call."""
    faults.remove_support(node.gpus[0], "nvmlDeviceGetTotalEnergyConsumption")
    with EnergySampler(device_of(node), threads=OwnThreads()) as sampler:
        wait_until(lambda: all_of(sampler) >= 40)
    first, *_, last = sampler.between(0, time.monotonic())
    power_w = (last.energy_j - first.energy_j) / (last.time_s - first.time_s)
    assert power_w == pytest.approx(50, rel=0.1)


def test_a_heat_limit_is_seen_in_the_readings(node: simulated.SimulatedNode) -> None:
    """Clock and reason are those of the moment."""
    faults.throttle(node.gpus[0], 700)
    with EnergySampler(device_of(node), threads=OwnThreads()) as sampler:
        wait_until(lambda: all_of(sampler) >= 1)
    reading = sampler.between(0, time.monotonic())[0]
    assert reading.clock_mhz == 700
    assert reading.throttle.slows_training


def test_a_gpu_that_does_not_tell_its_clock_is_sampled_all_the_same(node: simulated.SimulatedNode) -> None:
    """The clock is unknown then."""
    faults.remove_support(node.gpus[0], "nvmlDeviceGetClockInfo")
    with EnergySampler(device_of(node), threads=OwnThreads()) as sampler:
        wait_until(lambda: all_of(sampler) >= 1)
    assert sampler.between(0, time.monotonic())[0].clock_mhz is None


def test_a_lost_gpu_ends_sampling_and_keeps_what_was_read(node: simulated.SimulatedNode) -> None:
    """The error is there to be read, and nothing is raised."""
    sampler = EnergySampler(device_of(node), threads=OwnThreads())
    sampler.start()
    wait_until(lambda: all_of(sampler) >= 2)
    faults.lose(node.gpus[0])
    wait_until(lambda: sampler.failure is not None)
    sampler.stop()
    assert isinstance(sampler.failure, GpuLost)
    assert all_of(sampler) >= 2


def test_stop_ends_the_thread_and_start_goes_on(node: simulated.SimulatedNode) -> None:
    """Readings of both times are kept."""
    sampler = EnergySampler(device_of(node), threads=OwnThreads())
    for _ in range(2):
        before = all_of(sampler)
        sampler.start()
        wait_until(lambda before=before: all_of(sampler) > before)
        sampler.stop()
        assert "perseus-sampler" not in {thread.name for thread in threading.enumerate()}


def test_forgetting_drops_only_what_is_older(node: simulated.SimulatedNode) -> None:
    """Readings from the given time on stay."""
    with EnergySampler(device_of(node), threads=OwnThreads()) as sampler:
        wait_until(lambda: all_of(sampler) >= 4)
    readings = sampler.between(0, time.monotonic())
    sampler.forget_before(readings[2].time_s)
    assert sampler.between(0, time.monotonic()) == readings[2:]
