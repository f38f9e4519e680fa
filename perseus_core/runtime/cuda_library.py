"""What is asked of the CUDA runtime library directly, because not every torch offers it: a stream of our own, and the
mode in which a thread behaves towards CUDA graphs that others capture.

While anybody in the process captures a CUDA graph in the mode "global", which is torch's default, a harmless call of
another thread (`cudaEventQuery` is one) is an error for that thread and makes the capture invalid. A thread whose own
mode is "relaxed" is exempt (CUDA runtime API, `cudaThreadExchangeStreamCaptureMode`). So our threads are relaxed from
their beginning, and training's own thread is for as long as it does something of ours.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perseus_core.runtime.log import logger

_RELAXED = 2  # cudaStreamCaptureModeRelaxed
_NON_BLOCKING = 1  # cudaStreamNonBlocking
_MAPS = Path("/proc/self/maps")


class CudaLibrary:
    """The CUDA runtime library that torch has loaded. Whatever it does not offer, does nothing."""

    def __init__(self, library: Any) -> None:
        """Calls nothing yet; `library` is a `ctypes.CDLL`, or what stands in for one."""
        self._exchange = getattr(library, "cudaThreadExchangeStreamCaptureMode", None)
        self._create = getattr(library, "cudaStreamCreateWithFlags", None)
        self._destroy = getattr(library, "cudaStreamDestroy", None)

    def exchange_capture_mode(self, mode: int) -> int | None:
        """Sets how this thread behaves towards captures; returns how it did before, None where that cannot be set."""
        if self._exchange is None:
            return None
        exchanged = ctypes.c_int(mode)
        return None if self._exchange(ctypes.byref(exchanged)) else exchanged.value

    def create_stream(self) -> int | None:
        """A stream on the current device that waits for no other one, nor any for it; None where that cannot be had."""
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
    library = loaded_library()
    if library is not None and library.exchange_capture_mode(_RELAXED) is None:
        logger.debug("the capture mode of a thread cannot be set; CUDA graphs captured beside it may become invalid")


@contextmanager
def relaxed() -> Iterator[None]:
    """Nothing that this thread does inside makes anybody's capture invalid, be it the thread's own."""
    library = loaded_library()
    before = None if library is None else library.exchange_capture_mode(_RELAXED)
    try:
        yield
    finally:
        if library is not None and before is not None:
            library.exchange_capture_mode(before)


_loaded: CudaLibrary | None = None


def loaded_library() -> CudaLibrary | None:
    """The one that torch uses in this process; None while it uses none, as where training runs on the CPU."""
    global _loaded
    if _loaded is None and _uses_cuda():
        _loaded = _find(_MAPS.read_text, ctypes.CDLL)
    return _loaded


def _uses_cuda() -> bool:
    torch: Any = sys.modules.get("torch")
    try:
        return bool(torch.cuda.is_initialized()) and torch.version.cuda is not None
    except AttributeError:
        return False


def _find(read_maps: Callable[[], str], load: Callable[[str | None], Any]) -> CudaLibrary:
    """Looks for it among the libraries of this process, then among all symbols: it may be part of another library.

    Two copies of it would do as well as one: streams and modes are the driver's.
    """
    names: list[str | None] = []
    try:
        paths = (line.split(maxsplit=5)[-1] for line in read_maps().splitlines() if "libcudart" in line)
        names += dict.fromkeys(path for path in paths if path.rpartition("/")[2].startswith("libcudart"))
    except OSError as error:
        logger.debug("the libraries of this process cannot be listed", exc_info=error)
    for name in (*names, None):
        try:
            library = load(name)
            if hasattr(library, "cudaThreadExchangeStreamCaptureMode"):
                return CudaLibrary(library)
        except OSError as error:
            logger.debug("%s cannot be used", name, exc_info=error)
    logger.debug("the CUDA runtime library was not found among the libraries of this process")
    return CudaLibrary(None)
