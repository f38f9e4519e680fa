"""What is asked of the CUDA driver, on one that stands in for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from perseus_core.runtime import cuda_driver
from perseus_core.runtime.cuda_driver import CudaDriver, _load, loaded_driver, relax_this_thread, relaxed
from perseus_core.runtime.side_threads import OwnThreads
from tests.runtime.measure.fake_cuda import RELAXED, FakeDriver


class ThreadLocalDriver(threading.local):
    """A driver whose mode is each thread's own; `seen` is shared."""

    def __init__(self, seen: list[tuple[str, int]]) -> None:
        self._of_thread = FakeDriver()
        self._seen = seen

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802
        failed = self._of_thread.cuThreadExchangeStreamCaptureMode(mode)
        self._seen.append((threading.current_thread().name, self._of_thread.mode))
        return failed


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(cuda_driver, "_loaded", CudaDriver(ThreadLocalDriver(calls)))
    yield calls


def test_every_thread_of_ours_is_relaxed_before_it_does_anything(seen: list[tuple[str, int]]) -> None:
    """Side threads, and the one that does tasks."""
    at_first_step = []

    def step() -> None:
        at_first_step.append(list(seen))

    threads = OwnThreads()
    assert threads.start("perseus-something", step).join(30)
    assert at_first_step == [[("perseus-something", RELAXED)]]
    assert ("perseus-background", RELAXED) in threads.run(lambda: list(seen)).result(30)
    threads.close()


@pytest.mark.parametrize("library", [CudaDriver(None), CudaDriver(SimpleNamespace())])
def test_what_a_library_does_not_offer_does_nothing(library: CudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old one, or none."""
    monkeypatch.setattr(cuda_driver, "_loaded", library)
    relax_this_thread()
    with relaxed():
        pass
    assert library.create_stream() is None
    library.destroy_stream(1)


assert CudaDriver(FakeDriver()).create_stream() is not None


def test_a_machine_without_the_drivers_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose loader does not find it by that name."""
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    assert _load(load).create_stream() is None
    assert asked == ["libcuda.so.1"]
    assert _load(lambda _: FakeDriver()).create_stream() is not None


def test_where_training_runs_on_the_cpu_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if torch could use a GPU: asking would make it start with CUDA."""
    monkeypatch.setattr(cuda_driver, "_loaded", None)
    monkeypatch.setattr(cuda_driver, "_load", lambda *_: pytest.fail("looked for"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert loaded_driver() is None
    idle = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False), version=SimpleNamespace(cuda="12.8"))
    monkeypatch.setitem(sys.modules, "torch", idle)
    assert loaded_driver() is None
