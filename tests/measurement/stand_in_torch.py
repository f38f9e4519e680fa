"""As much of torch as the load of a real GPU needs, on a GPU that takes real time for what it is given."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

GPU_STARTED_S = 777.0


class StandInTorch(ModuleType):
    """Stands in for torch.

    Attributes:
        product_s, launch_s: what a matrix product and a small kernel take.
        timer_error_ms: what the GPU's timer is wrong by, from one event to another that lie apart.
        captures_fail: every capture becomes invalid.
    """

    bfloat16 = "bfloat16"
    __version__ = "stand-in"

    def __init__(self) -> None:
        super().__init__("torch")
        self.version = SimpleNamespace(cuda="12.8")
        self.product_s, self.launch_s = 0.001, 1e-6
        self.timer_error_ms = 0.0
        self.captures_fail = False
        self.cuda = _Cuda(self)
        self._free_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def give(self, seconds: float) -> float:
        """Puts work on the current stream; returns when it will be done."""
        stream = self.cuda.current_name()
        with self._lock:
            self._free_s[stream] = max(time.monotonic(), self._free_s.get(stream, 0.0)) + seconds
            return self._free_s[stream]

    def device(self, kind: str, index: int = 0) -> str:
        return f"{kind}:{index}"

    def randn(self, *_: Any, **__: Any) -> _Tensor:
        return _Tensor(self)

    zeros = empty_like = randn

    def mm(self, _a: _Tensor, _b: _Tensor, *, out: _Tensor) -> _Tensor:
        self.give(self.product_s)
        return out


class _Tensor:
    def __init__(self, torch: StandInTorch) -> None:
        self._torch = torch

    def __truediv__(self, _by: float) -> _Tensor:
        return self

    def __matmul__(self, other: _Tensor) -> _Tensor:
        return self._torch.mm(self, other, out=_Tensor(self._torch))

    def add_(self, _one: int) -> None:
        self._torch.give(self._torch.launch_s)


class _Cuda(SimpleNamespace):
    def __init__(self, torch: StandInTorch) -> None:
        super().__init__()
        self._torch = torch
        self._local = threading.local()
        self.num_reduced = 0
        self.nccl = SimpleNamespace(all_reduce=self._all_reduce)

    def current_name(self) -> str:
        return getattr(self._local, "stream", "compute")

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def init(self) -> None: ...

    def set_device(self, _device: Any) -> None: ...

    def current_device(self) -> int:
        return 0

    def is_current_stream_capturing(self) -> bool:
        return False

    @contextmanager
    def device(self, _device: Any) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self._local.stream = self.current_name(), stream.name
        try:
            yield
        finally:
            self._local.stream = before

    def Stream(self, *_: Any) -> _Stream:  # noqa: N802
        return _Stream("pooled", self._torch)

    def ExternalStream(self, handle: int, **_: Any) -> _Stream:  # noqa: N802
        return _Stream(f"own {handle}", self._torch)

    def Event(self, **_: Any) -> _Event:  # noqa: N802
        return _Event(self._torch)

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(replay=lambda: None)

    @contextmanager
    def graph(self, _graph: Any) -> Iterator[None]:
        yield
        if self._torch.captures_fail:
            raise RuntimeError("operation failed due to a previous error during capture\nmore words")

    def synchronize(self) -> None:
        time.sleep(max(0.0, self._torch.give(0.0) - time.monotonic()))

    def _sleep(self, cycles: int) -> None:
        self._torch.give(cycles / 2e9)

    def _all_reduce(self, tensors: list[_Tensor]) -> None:
        self.num_reduced += len(tensors)
        self._torch.give(0.002)


class _Stream:
    def __init__(self, name: str, torch: StandInTorch) -> None:
        self.name, self._torch = name, torch

    def synchronize(self) -> None:
        with self._torch.cuda.stream(self):
            self._torch.cuda.synchronize()


class _Event:
    def __init__(self, torch: StandInTorch) -> None:
        self._torch = torch
        self.reached_s = float("inf")

    def record(self, stream: _Stream | None = None) -> None:
        if stream is None:
            self.reached_s = self._torch.give(0.0)
        else:
            with self._torch.cuda.stream(stream):
                self.reached_s = self._torch.give(0.0)

    def query(self) -> bool:
        return self.reached_s <= time.monotonic()

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.reached_s - time.monotonic()))

    def elapsed_time(self, end: _Event) -> float:
        elapsed_ms = 1000 * (end.reached_s - self.reached_s)
        return elapsed_ms + (self._torch.timer_error_ms if abs(elapsed_ms) > 1 else 0.0)
