"""As much of torch and of the CUDA driver as marks need, on a GPU in virtual time that works as told."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from perseus_core.runtime.side_threads import Step

GPU_STARTED_S = 777.0
"""The GPU's clock is behind the host's by this."""
RELAXED, GLOBAL = 2, 0


class FakeCuda(ModuleType):
    """Stands in for torch. Streams are names; the current one is "compute" outside of `stream(...)`.

    Attributes:
        now_s: the host's time.
        busy_until_s: the compute stream has work until then.
        one_queue: other streams wait behind it (CUDA_DEVICE_MAX_CONNECTIONS=1).
        clock_hz: at which cycles are counted.
        call_s: what a call of the host takes.
        captured: streams on which a CUDA graph is being captured.
        on_query: called before an event is looked at, as what may hold up the thread that looks.
    """

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = self
        self.version = SimpleNamespace(cuda="12.8")
        self.now_s = 1000.0
        self.busy_until_s = 0.0
        self.one_queue = False
        self.clock_hz = 2e9
        self.call_s = 3e-6
        self.captured: set[str] = set()
        self.on_query: Callable[[], None] = lambda: None
        self.num_events = 0
        self.handles: list[int] = []
        self._current = ["compute"]
        self._num_devices = 0
        self._ends_s: dict[str, float] = {}

    def init(self) -> None: ...

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    @contextmanager
    def device(self, *_: Any) -> Iterator[None]:
        self._num_devices += 1
        try:
            yield
        finally:
            self._num_devices -= 1

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        assert self._num_devices, "another GPU is this thread's current one, and would get a context"
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def is_current_stream_capturing(self) -> bool:
        return self._current[-1] in self.captured

    def Stream(self, _device: Any) -> str:  # noqa: N802
        return "pooled"

    def ExternalStream(self, handle: int, **_options: Any) -> str:  # noqa: N802
        self.handles.append(handle)
        return "own"

    def Event(self, **_options: Any) -> FakeEvent:  # noqa: N802
        self.num_events += 1
        return FakeEvent(self)

    def _sleep(self, cycles: int) -> None:
        self.now_s += self.call_s
        self._ends_s[self._current[-1]] = self.free_s(self._current[-1]) + cycles / self.clock_hz

    def current(self) -> str:
        return self._current[-1]

    def free_s(self, stream: str) -> float:
        """When what is put on a stream now has its turn."""
        waits = stream == "compute" or self.one_queue
        return max(self.now_s, self._ends_s.get(stream, 0.0), self.busy_until_s if waits else 0.0)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.reached_s = float("inf")

    def record(self, stream: str | None = None) -> None:
        stream = stream or self._cuda.current()
        assert stream not in self._cuda.captured, "becomes part of somebody's graph"
        self._cuda.now_s += self._cuda.call_s
        self.reached_s = self._cuda.free_s(stream)

    def query(self) -> bool:
        self._cuda.on_query()
        self._cuda.now_s += self._cuda.call_s
        return self.reached_s <= self._cuda.now_s

    def synchronize(self) -> None:
        raise AssertionError("nobody waits here")

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.reached_s <= self._cuda.now_s, "the anchor is not reached"
        assert end.reached_s <= self._cuda.now_s, "the event is not reached"
        return ((end.reached_s - GPU_STARTED_S) - (self.reached_s - GPU_STARTED_S)) * 1000


class FakeDriver:
    """The CUDA driver, with one thread that calls it.

    Attributes:
        mode: of the thread.
        streams: that exist.
        fails: every call returns an error.
    """

    def __init__(self) -> None:
        self.mode = GLOBAL
        self.streams: set[int] = set()
        self.fails = False

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802
        if self.fails:
            return 999
        mode._obj.value, self.mode = self.mode, mode._obj.value
        return 0

    def cuStreamCreate(self, stream: Any, flags: ctypes.c_uint) -> int:  # noqa: N802
        if self.fails:
            return 999
        assert flags.value == 1, "waits for the legacy stream otherwise"
        stream._obj.value = 4096 + len(self.streams)
        self.streams.add(stream._obj.value)
        return 0

    def cuStreamDestroy_v2(self, stream: ctypes.c_void_p) -> int:  # noqa: N802
        assert stream.value is not None
        self.streams.remove(stream.value)
        return 0


class SteppedThread:
    """A side thread that goes on when the test has it go on."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def wake(self) -> None: ...

    def join(self, limit_s: float) -> bool:
        return True


class SteppedThreads:
    """Side threads in the virtual time of a `FakeCuda`."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.started: list[SteppedThread] = []

    def now_s(self) -> float:
        return self._cuda.now_s

    def start(self, name: str, step: Step) -> SteppedThread:
        self.started.append(SteppedThread(step))
        return self.started[-1]

    def run(self, task: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None: ...

    def let_pass(self, seconds: float) -> None:
        """Lets time pass, and the thread that was started do what it does meanwhile."""
        until_s = self._cuda.now_s + seconds
        while self.started and self._cuda.now_s < until_s:
            wait = self.started[0].step()
            assert isinstance(wait, float), "it waits for nothing and nobody"
            self._cuda.now_s += wait
        self._cuda.now_s = max(self._cuda.now_s, until_s)
