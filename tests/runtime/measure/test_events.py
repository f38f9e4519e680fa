"""Marks on the stream, and their times on the host's clock."""

from __future__ import annotations

import sys
import time
from types import ModuleType
from typing import Any

import pytest

from perseus_core.runtime.measure.events import CudaEvents, HostEvents


class FakeCuda(ModuleType):
    """As much of torch as events need, on a GPU whose clock starts anywhere and that works when it is told to."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = self
        self.now_s = 1000.0
        self.num_events = 0
        self.compute_stream_is_busy = False

    def current_device(self) -> int:
        return 0

    def device(self, *_: Any) -> Any:
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def Stream(self, _device: Any) -> str:  # noqa: N802
        return "anchor"

    def Event(self, **_options: Any) -> FakeEvent:  # noqa: N802
        self.num_events += 1
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.gpu_s: float | None = None

    def record(self, stream: str = "compute") -> None:
        self.gpu_s = None if stream == "compute" and self._cuda.compute_stream_is_busy else self._cuda.now_s + 777

    def query(self) -> bool:
        return self.gpu_s is not None

    def synchronize(self) -> None:
        assert self.gpu_s is not None, "waits for the compute stream"

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.gpu_s is not None
        assert end.gpu_s is not None
        return (end.gpu_s - self.gpu_s) * 1000


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(time, "monotonic", lambda: fake.now_s)
    return fake


def test_host_events_are_reached_at_once() -> None:
    """Their time is that of their making."""
    before_s = time.monotonic()
    event = HostEvents().record()
    assert event.reached()
    event.wait()
    assert before_s <= event.time_s() <= time.monotonic()


def test_recording_never_waits_for_the_compute_stream(cuda: FakeCuda) -> None:
    """Neither do new anchors."""
    cuda.compute_stream_is_busy = True
    events = CudaEvents()
    event = events.record()
    assert not event.reached()
    cuda.now_s += 100
    events.renew_anchor(cuda.now_s)


def test_cuda_times_are_host_times_however_long_the_job(cuda: FakeCuda) -> None:
    """Also across new anchors, of which each event keeps the one it was recorded with."""
    events = CudaEvents()
    for _ in range(5):
        event = events.record()
        expected_s = cuda.now_s
        cuda.now_s += 7
        events.record().time_s()
        assert event.time_s() == pytest.approx(expected_s, abs=1e-9)


def test_an_old_anchor_is_replaced(cuda: FakeCuda) -> None:
    """Because the time between two events is exact only when they are near each other."""
    events = CudaEvents()
    before = cuda.num_events
    cuda.now_s += 60
    events.record().time_s()
    assert cuda.num_events == before + 2  # the mark and a new anchor
    cuda.now_s += 1
    events.record().time_s()
    assert cuda.num_events == before + 2


def test_cuda_events_are_used_again_when_nobody_refers_to_them(cuda: FakeCuda) -> None:
    """And not before."""
    events = CudaEvents()
    before = cuda.num_events
    kept = [events.record() for _ in range(3)]
    del kept
    for _ in range(100):
        events.record()
    assert cuda.num_events == before + 3


def test_on_a_real_gpu_times_agree_with_the_host() -> None:
    """Skipped where there is none."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    events = CudaEvents()
    before_s = time.monotonic()
    event = events.record()
    event.wait()
    assert event.reached()
    assert before_s - 1e-3 <= event.time_s() <= time.monotonic() + 1e-3
