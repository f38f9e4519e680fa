"""What is asked of the CUDA driver directly, because not every torch offers it: a stream of our own, and the mode in
which a thread behaves towards CUDA graphs that others capture.

While anybody in the process captures a CUDA graph in the mode "global", which is torch's default, a harmless call of
another thread (`cudaEventQuery` is one) is an error for that thread and makes the capture invalid. A thread whose own
mode is "relaxed" is exempt (CUDA driver API, `cuThreadExchangeStreamCaptureMode`). So our threads are relaxed from
their beginning, and training's own thread is for as long as it does something of ours.

The driver and not the runtime library: there is one in a process, whatever torch was built with, and it never makes a
context on the first GPU only because a thread of ours has asked something.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from perseus_core.runtime.log import logger

_LIBRARY = "libcuda.so.1"
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class CudaDriver:
    """The CUDA driver that torch uses. Whatever it does not offer, does nothing."""

    def __init__(self, library: Any) -> None:
        """Calls nothing yet; `library` is a `ctypes.CDLL`, what stands in for one, or None."""
        self._exchange = getattr(library, "cuThreadExchangeStreamCaptureMode", None)
        self._create = getattr(library, "cuStreamCreate", None)
        self._destroy = getattr(library, "cuStreamDestroy_v2", None)

    def exchange_capture_mode(self, mode: int) -> int | None:
        """Sets how this thread behaves towards captures; returns how it did before, None where that cannot be set."""
        if self._exchange is None:
            return None
        exchanged = ctypes.c_int(mode)
        return None if self._exchange(ctypes.byref(exchanged)) else exchanged.value

    def create_stream(self) -> int | None:
        """A stream on this thread's GPU that waits for no other one, nor any for it; None where that cannot be had."""
        if self._create is None or self._destroy is None:
            return None
        stream = ctypes.c_void_p()
        failed = self._create(ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        return None if failed else stream.value

    def destroy_stream(self, stream: int) -> None:
        """Nothing may be put on the stream any more; what is on it is still done."""
        if self._destroy is not None:
            self._destroy(ctypes.c_void_p(stream))


def relax_this_thread() -> None:
    """Nothing that this thread does from now on makes anybody's capture invalid. Never raises."""
    driver = loaded_driver()
    if driver is not None and driver.exchange_capture_mode(_RELAXED) is None:
        logger.debug("the capture mode of a thread cannot be set; CUDA graphs captured beside it may become invalid")


@contextmanager
def relaxed() -> Iterator[None]:
    """Nothing that this thread does inside makes anybody's capture invalid, be it the thread's own."""
    driver = loaded_driver()
    before = None if driver is None else driver.exchange_capture_mode(_RELAXED)
    try:
        yield
    finally:
        if driver is not None and before is not None:
            driver.exchange_capture_mode(before)


_loaded: CudaDriver | None = None


def loaded_driver() -> CudaDriver | None:
    """The one that torch uses in this process; None while it uses none, as where training runs on the CPU."""
    global _loaded
    if _loaded is None and _uses_cuda():
        _loaded = _load(ctypes.CDLL)
    return _loaded


def _uses_cuda() -> bool:
    torch: Any = sys.modules.get("torch")
    try:
        return bool(torch.cuda.is_initialized()) and torch.version.cuda is not None
    except AttributeError:
        return False


def _load(load: Callable[[str], Any]) -> CudaDriver:
    try:
        return CudaDriver(load(_LIBRARY))
    except OSError as error:
        logger.debug("the CUDA driver cannot be asked directly", exc_info=error)
        return CudaDriver(None)
