"""Marks on the stream, and their times on the host's clock."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from perseus_core.runtime import cuda_driver
from perseus_core.runtime.cuda_driver import CudaDriver
from perseus_core.runtime.measure.anchors import SHARP_S
from perseus_core.runtime.measure.cuda_events import CudaEvents
from perseus_core.runtime.measure.events import HostEvents, NotRecorded
from tests.runtime.measure.fake_cuda import GLOBAL, RELAXED, FakeCuda, FakeDriver, SteppedThreads

LONG_S = 0.1


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(cuda_driver, "_loaded", CudaDriver(fake))
    return fake


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


@pytest.fixture
def threads(cuda: FakeCuda) -> SteppedThreads:
    return SteppedThreads(cuda)


@pytest.fixture
def events(threads: SteppedThreads) -> CudaEvents:
    made = CudaEvents(threads=threads)
    made.record()
    return made


def adopt(events: CudaEvents) -> None:
    """An iteration ends, and the next one begins."""
    with events.between_iterations():
        pass


def test_host_events_are_reached_at_once() -> None:
    """Their time is that of their making."""
    before_s = time.monotonic()
    event = HostEvents().record()
    assert event.reached()
    event.wait()
    assert before_s <= event.time_s() <= time.monotonic()


def test_training_never_waits_for_the_gpu(cuda: FakeCuda, threads: SteppedThreads, events: CudaEvents) -> None:
    """Neither to record a mark, nor to have the first anchor, nor to have new ones, behind any backlog."""
    cuda.one_queue = True
    cuda.busy_until_s = cuda.now_s + 3600
    before_s = cuda.now_s
    event = events.record()
    adopt(events)
    assert cuda.now_s - before_s < 50e-6
    assert not event.reached()


@pytest.mark.parametrize("backlog_s", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("one_queue", [False, True])
def test_times_are_the_hosts_whatever_the_anchor_waited_for(
    cuda: FakeCuda, threads: SteppedThreads, events: CudaEvents, one_queue: bool, backlog_s: float
) -> None:
    """The anchor's time is that of the end of the wait, and the GPU always has that much to do before it."""
    cuda.one_queue = one_queue
    for _ in range(40):
        cuda.busy_until_s = cuda.now_s + backlog_s
        threads.let_pass(backlog_s + LONG_S)
        adopt(events)
    event = events.record()
    expected_s = cuda.now_s
    threads.let_pass(LONG_S)
    assert events.knows_host_time
    assert 0 <= event.time_s() - expected_s <= SHARP_S


def test_an_anchor_that_had_to_wait_is_not_tried_again(
    cuda: FakeCuda, threads: SteppedThreads, events: CudaEvents
) -> None:
    """Looking is work, and where everything waits the next one is no sharper."""
    cuda.one_queue = True
    cuda.busy_until_s = cuda.now_s + 1.8
    before = cuda.num_events
    threads.let_pass(1.5)
    adopt(events)
    assert cuda.num_events == before + 1
    assert not events.knows_host_time
    threads.let_pass(1.0)
    adopt(events)
    assert cuda.num_events == before + 1
    assert events.knows_host_time


def test_before_an_anchor_is_found_times_count_only_beside_each_other(cuda: FakeCuda, threads: SteppedThreads) -> None:
    """The first one refers to an event that nobody has seen being reached."""
    cuda.one_queue = True
    cuda.busy_until_s = cuda.now_s + 0.02
    events = CudaEvents(threads=threads)
    begin = events.record()
    cuda.busy_until_s += 0.007
    end = events.record()
    cuda.now_s = cuda.busy_until_s
    assert not events.knows_host_time
    assert end.time_s() - begin.time_s() == pytest.approx(0.007)


def test_an_anchor_that_is_not_sharp_is_refused(cuda: FakeCuda, threads: SteppedThreads, events: CudaEvents) -> None:
    """As where the thread that looks does not get the interpreter. The last one stays, until it is too old."""
    threads.let_pass(LONG_S)
    adopt(events)

    def held_up() -> None:
        cuda.now_s += 0.005

    cuda.on_query = held_up
    threads.let_pass(9.0)
    adopt(events)
    event = events.record()
    expected_s = cuda.now_s
    assert events.knows_host_time
    assert event.time_s() - expected_s <= SHARP_S
    threads.let_pass(60.0)
    adopt(events)
    assert not events.knows_host_time
    cuda.on_query = lambda: None
    threads.let_pass(2.0)
    adopt(events)
    assert events.knows_host_time


def test_an_iteration_has_one_anchor(cuda: FakeCuda, threads: SteppedThreads, events: CudaEvents) -> None:
    """A new one, whose error is another one, would change the durations of what runs meanwhile."""

    def held_up() -> None:
        cuda.now_s += 0.0003  # sharp enough, and 0.3 ms late

    cuda.on_query = held_up
    threads.let_pass(LONG_S)
    adopt(events)
    begin = events.record()
    began_s = cuda.now_s
    cuda.on_query = lambda: None
    threads.let_pass(20.0)
    end = events.record()
    assert end.time_s() - begin.time_s() == pytest.approx(cuda.now_s - began_s, abs=1e-9)
    adopt(events)
    exact = events.record()
    assert abs(exact.time_s() - cuda.now_s) < 50e-6 < end.time_s() - cuda.now_s


def test_anchors_stay_young(cuda: FakeCuda, threads: SteppedThreads, events: CudaEvents) -> None:
    """Because the time between two events is exact only when they are near each other; and they are few."""
    for _ in range(20):
        threads.let_pass(10.0)
        adopt(events)
        assert events._anchor.time_s > cuda.now_s - 11.0
    assert cuda.num_events < 60


def test_cuda_events_are_used_again_when_nobody_refers_to_them(cuda: FakeCuda, events: CudaEvents) -> None:
    """And not before."""
    del events._pool[:]
    before = cuda.num_events
    kept = [events.record() for _ in range(3)]
    del kept
    for _ in range(100):
        events.record()
    assert cuda.num_events == before + 3


def test_no_mark_becomes_part_of_a_graph(cuda: FakeCuda, events: CudaEvents) -> None:
    """A captured event would never be reached; the stream is asked before."""
    cuda.captured.add("compute")
    with pytest.raises(NotRecorded, match="captured"):
        events.record()
    cuda.captured.clear()
    assert events.record().reached()


def test_what_cannot_be_told_of_a_stream_is_no_error_of_trainings(
    cuda: FakeCuda, events: CudaEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the legacy stream while another one is captured: cudaErrorStreamCaptureImplicit."""

    def cannot_tell() -> bool:
        raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")

    monkeypatch.setattr(cuda, "is_current_stream_capturing", cannot_tell)
    with pytest.raises(NotRecorded, match="legacy"):
        events.record()


def test_the_training_thread_is_relaxed_only_while_it_asks(driver: FakeDriver, events: CudaEvents) -> None:
    """Whoever captures a graph on it finds the mode that it had."""
    with events.between_iterations():
        assert driver.mode == RELAXED
    assert driver.mode == GLOBAL
    with pytest.raises(ZeroDivisionError), events.between_iterations():
        raise ZeroDivisionError
    assert driver.mode == GLOBAL


def test_our_own_stream_is_nobody_elses_and_is_destroyed(
    cuda: FakeCuda, driver: FakeDriver, threads: SteppedThreads, events: CudaEvents
) -> None:
    """Even while one of our threads would still use it."""
    assert set(cuda.handles) == driver.streams != set()
    slices = events.slices("GPU-0")
    assert slices is not None
    events.close()
    events.close()
    assert not driver.streams
    with pytest.raises(RuntimeError, match="closed"):
        slices.begin()
    assert threads.started[0].step() is None


def _without_symbols(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_loaded", CudaDriver(None))


def _failing(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.fails = True


@pytest.mark.parametrize("break_it", [_without_symbols, _failing])
def test_without_a_stream_of_our_own_one_of_torchs_must_do(
    cuda: FakeCuda,
    driver: FakeDriver,
    threads: SteppedThreads,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[FakeDriver, pytest.MonkeyPatch], None],
) -> None:
    """Others may have it, too: no slices there, and no anchor while somebody captures on it."""
    break_it(driver, monkeypatch)
    events = CudaEvents(threads=threads)
    events.record()
    assert events.slices("GPU-0") is None
    cuda.captured.add("pooled")
    threads.let_pass(LONG_S)
    adopt(events)
    assert not events.knows_host_time
    cuda.captured.clear()
    threads.let_pass(2.0)
    adopt(events)
    assert events.knows_host_time
    events.close()


def test_slices_tell_the_clock(cuda: FakeCuda, threads: SteppedThreads, events: CudaEvents) -> None:
    """In the host's time, once that is known, and only those that are finished."""
    slices = events.slices("GPU-0")
    assert slices is not None
    slices.begin()
    cuda.now_s += 0.001
    assert slices.finished() == []
    threads.let_pass(LONG_S)
    adopt(events)
    slices.forget()
    for clock_hz in (2e9, 1e9):
        cuda.clock_hz = clock_hz
        began_s = cuda.now_s
        slices.begin()
        assert len(slices.finished()) == (clock_hz < 2e9)
        cuda.now_s += 0.001
    fast, slow = slices.finished()
    assert slow.end_s - slow.begin_s == pytest.approx(2 * (fast.end_s - fast.begin_s))
    assert slow.begin_s == pytest.approx(began_s, abs=SHARP_S)


def test_on_a_real_gpu_times_agree_with_the_host() -> None:
    """Skipped where there is none."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    events = CudaEvents()
    events.record()
    deadline_s = time.monotonic() + 30
    while not events.knows_host_time and time.monotonic() < deadline_s:
        with events.between_iterations():
            time.sleep(0.001)
    before_s = time.monotonic()
    event = events.record()
    event.wait()
    assert event.reached()
    assert before_s - 1e-3 <= event.time_s() <= time.monotonic() + 1e-3
    events.close()
