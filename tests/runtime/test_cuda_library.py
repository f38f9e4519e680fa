"""What is asked of the CUDA runtime library, on one that stands in for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from perseus_core.runtime import cuda_library
from perseus_core.runtime.cuda_library import CudaLibrary, _find, loaded_library, relax_this_thread, relaxed
from perseus_core.runtime.side_threads import OwnThreads
from tests.runtime.measure.fake_cuda import RELAXED, FakeLibrary

MAPS = """\
7f00-7f01 r--p 00000000 08:01 1 /opt/other/libcudart_static_helper.txt.d/libc.so.6
7f02-7f03 r-xp 00000000 08:01 2 /site packages/nvidia/cuda_runtime/lib/libcudart.so.12
7f03-7f04 r--p 00001000 08:01 2 /site packages/nvidia/cuda_runtime/lib/libcudart.so.12
7f05-7f06 rw-p 00000000 00:00 0
"""


class ThreadLocalLibrary(threading.local):
    """A library whose mode is each thread's own; `seen` is shared."""

    def __init__(self, seen: list[tuple[str, int]]) -> None:
        self._of_thread = FakeLibrary()
        self._seen = seen

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802
        failed = self._of_thread.cudaThreadExchangeStreamCaptureMode(mode)
        self._seen.append((threading.current_thread().name, self._of_thread.mode))
        return failed


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(cuda_library, "_loaded", CudaLibrary(ThreadLocalLibrary(calls)))
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


def test_it_is_the_one_that_the_process_has_loaded() -> None:
    """Found among its mappings, once, by its file's name."""
    asked = []

    def load(name: str | None) -> Any:
        asked.append(name)
        return FakeLibrary()

    assert _find(lambda: MAPS, load).create_stream() is not None
    assert asked == ["/site packages/nvidia/cuda_runtime/lib/libcudart.so.12"]


def test_a_library_within_another_is_found_by_its_symbols() -> None:
    """As where torch was built with a static one, or the file is gone, or nobody may list what is loaded."""

    def load(name: str | None) -> Any:
        if name is not None:
            raise OSError(f"{name}: no such file")
        return FakeLibrary()

    def may_not() -> str:
        raise PermissionError("/proc")

    assert _find(lambda: MAPS, load).create_stream() is not None
    assert _find(may_not, load).create_stream() is not None


@pytest.mark.parametrize("library", [CudaLibrary(None), CudaLibrary(SimpleNamespace())])
def test_what_a_library_does_not_offer_does_nothing(library: CudaLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old one, or none."""
    monkeypatch.setattr(cuda_library, "_loaded", library)
    relax_this_thread()
    with relaxed():
        pass
    assert library.create_stream() is None
    library.destroy_stream(1)
    assert _find(lambda: "", lambda _: SimpleNamespace()).exchange_capture_mode(RELAXED) is None


def test_where_training_runs_on_the_cpu_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if torch could use a GPU: asking would make it start with CUDA."""
    monkeypatch.setattr(cuda_library, "_loaded", None)
    monkeypatch.setattr(cuda_library, "_find", lambda *_: pytest.fail("looked for"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert loaded_library() is None
    idle = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False), version=SimpleNamespace(cuda="12.8"))
    monkeypatch.setitem(sys.modules, "torch", idle)
    assert loaded_library() is None
