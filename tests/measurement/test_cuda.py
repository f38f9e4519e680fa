"""What needs CUDA, on a stand-in for torch: that it runs, and finds what was put in. No GPU has confirmed it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from perseus_core.commands.measurement.bench import Bench
from perseus_core.commands.measurement.cuda_load import CudaLoad, cuda_load_and_events
from perseus_core.commands.measurement.load import ALL_REDUCE, LAUNCHES, MATRIX_PRODUCTS, busy
from perseus_core.commands.measurement.results import Standing
from perseus_core.commands.measurement.steps import cuda_probe
from perseus_core.commands.measurement.steps.cuda_marks import Anchors, Captures, measure_marks
from perseus_core.errors import PerseusError
from perseus_core.runtime import cuda_driver
from perseus_core.runtime.cuda_driver import CudaDriver
from tests.measurement.stand_in_torch import StandInTorch
from tests.runtime.measure.fake_cuda import FakeDriver


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> StandInTorch:
    torch = StandInTorch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(cuda_driver, "_loaded", CudaDriver(FakeDriver()))
    return torch


def test_pulses_are_as_long_as_they_should_be(torch: StandInTorch) -> None:
    """Some 20 ms of matrix products, however fast the GPU is; each kind is told from begin to end."""
    torch.product_s = 0.0005
    load = CudaLoad(num_gpus=2)
    assert load.kinds == (MATRIX_PRODUCTS, LAUNCHES, ALL_REDUCE)
    assert load.pulse().time_s == pytest.approx(0.02, rel=0.3)
    assert load.pulse(ALL_REDUCE).time_s == pytest.approx(0.002, rel=0.5)
    assert torch.cuda.num_reduced == 4
    with busy(load) as pulses, load.waiting():
        while len(pulses) < 3:
            pass
    assert CudaLoad(num_gpus=1).kinds == (MATRIX_PRODUCTS, LAUNCHES)


def test_a_torch_without_a_gpu_says_so(torch: StandInTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PerseusError, match="finds no GPU; install a build for CUDA"):
        CudaLoad(1)


def test_marks_know_the_hosts_time_and_cost_little(torch: StandInTorch) -> None:
    """And the GPU can be had to count."""
    devices: Any = (None,)
    load, events = cuda_load_and_events(devices)
    assert events.knows_host_time
    bench = Bench(devices, load, events, events.slices(""), 0.3)
    found = measure_marks(bench)
    assert 0 < found.record_s < 0.001
    slices = bench.counting()
    slices.begin()
    while not slices.finished():
        pass
    (one,) = slices.finished()
    assert one.end_s - one.begin_s == pytest.approx(50e-6, rel=0.2)
    events.close()


def test_anchors_that_are_wrong(torch: StandInTorch) -> None:
    """Against one that was found on an idle GPU."""
    torch.product_s = 0.0001
    right = cuda_probe._anchors(torch, 0.1)
    assert right["error_s"] < 0.002
    torch.timer_error_ms = 8.0
    wrong = cuda_probe._anchors(torch, 0.1)
    assert wrong["error_s"] == pytest.approx(0.008, abs=0.002)
    verdict = Anchors({"1": wrong["error_s"], "8": 0.0001}, {"1": 0.0, "8": 0.5}).verdict
    assert verdict.standing is Standing.DIFFERS
    assert "at 1 (0 % refused), 0.1 ms at 8 (50 % refused) connections" in verdict.sentence


def test_captures_that_become_invalid(torch: StandInTorch) -> None:
    """With the driver's words."""
    found = cuda_probe._captures(torch, 0.05)
    assert found["num_captured"] > 0
    assert found["failures"] == []
    torch.captures_fail = True
    found = cuda_probe._captures(torch, 0.05)
    verdict = Captures(found["num_captured"], tuple(found["failures"])).verdict
    assert verdict.standing is Standing.DIFFERS
    assert "(operation failed due to a previous error during capture)" in verdict.sentence
