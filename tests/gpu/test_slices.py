"""Cycles that a simulated GPU counts: they tell the clock that it really runs at, and when it changed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from perseus_core.gpu.simulated import SimulatedNode, faults
from perseus_core.gpu.simulated.activation import ENVIRONMENT_VARIABLE
from perseus_core.gpu.simulated.model import GpuModel, GpuState, advance, request_clock
from perseus_core.gpu.simulated.slices import SimulatedSlices, counted_at_s
from perseus_core.gpu.slices import Slice
from perseus_core.runtime.adapter import events_of
from tests.runtime.simulated_machine import simulated_machine

MODEL = GpuModel((1000, 500), (50.0, 40.0), (), (0.030, 0.020, 0.0), 0.1)
CYCLES = 100_000


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SimulatedNode]:
    with simulated_machine(tmp_path) as machine:
        yield machine


def counted(slices: SimulatedSlices) -> Slice:
    """One slice, when it is finished."""
    slices.begin()
    while not (finished := slices.finished()):
        time.sleep(0.0001)
    return finished[-1]


def test_cycles_are_counted_at_the_clocks_in_force() -> None:
    """Exactly, across a change as well."""
    state = GpuState(100.0, 1000, 400.0)
    request_clock(MODEL, state, 500)
    assert counted_at_s(MODEL, state, CYCLES) == pytest.approx(100.0001, abs=1e-9)
    state = GpuState(100.0, 1000, 400.0)
    request_clock(MODEL, state, 500)
    advance(MODEL, state, 100.01996)
    assert counted_at_s(MODEL, state, CYCLES) == pytest.approx(100.02 + 60_000 / 500e6, abs=1e-9)
    assert counted_at_s(MODEL, state, CYCLES) == pytest.approx(100.02 + 100_000 / 500e6, abs=1e-9)


def test_a_slice_tells_the_clock_that_is_really_in_force(node: SimulatedNode) -> None:
    """Where heat holds it down, too; and slices follow each other as on one stream."""
    gpu = node.gpus[0]
    slices = SimulatedSlices(gpu)
    one = counted(slices)
    assert one.end_s - one.begin_s == pytest.approx(CYCLES / 1000e6)
    faults.throttle(gpu, 500)
    slices.forget()
    assert slices.finished() == []
    begun_s = time.monotonic()
    slices.begin()
    slices.begin()
    while len(both := slices.finished()) < 2:
        time.sleep(0.0001)
    assert all(one.end_s - one.begin_s == pytest.approx(CYCLES / 500e6) for one in both)
    assert begun_s <= both[0].begin_s < both[0].end_s <= both[1].begin_s


def test_a_rank_on_the_cpu_has_the_slices_of_its_simulated_gpu(node: SimulatedNode) -> None:
    """And none of a GPU that is not there, or where there are no simulated ones."""
    torch = pytest.importorskip("torch")
    events = events_of(torch.device("cpu"))
    assert events.slices(node.gpus[1].identity.uuid) is not None
    assert events.slices("GPU-of-another-machine") is None
    with mock.patch.dict(os.environ):
        del os.environ[ENVIRONMENT_VARIABLE]
        assert events.slices(node.gpus[1].identity.uuid) is None
