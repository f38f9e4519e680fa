"""The load of a real GPU, through torch. Not confirmed on a GPU yet."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from perseus_core.commands.measurement.load import ALL_REDUCE, LAUNCHES, MATRIX_PRODUCTS, Pulse
from perseus_core.errors import PerseusError
from perseus_core.gpu.device import Device
from perseus_core.runtime.measure.cuda_events import CudaEvents

_PULSE_S = 0.02
_SIZE = 4096  # of the matrices: large enough to fill any GPU
_NUM_LAUNCHES = 1000
_REDUCED_NUMBERS = 32 * 2**20
_NUM_SPINS, _SPIN_CYCLES = 42, 100_000_000  # some two seconds
_ANCHOR_LIMIT_S = 5.0


class CudaLoad:
    """See `Load`: on the first GPU, an all-reduce on all."""

    def __init__(self, num_gpus: int) -> None:
        """Sets up matrices and has each kind of work done once, so that libraries are loaded.

        Raises:
            PerseusError: if torch cannot use the GPU.
        """
        torch: Any = importlib.import_module("torch")
        if not torch.cuda.is_available():
            raise PerseusError(f"torch {torch.__version__} finds no GPU; install a build for CUDA, or mend the driver")
        self._torch = torch
        self._device = torch.device("cuda", 0)
        torch.cuda.set_device(self._device)
        self._matrices = [
            torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=self._device) / _SIZE**0.5 for _ in range(2)
        ]
        self._product = torch.empty_like(self._matrices[0])
        self._small = torch.zeros(64, device=self._device)
        self._work: dict[str, Callable[[], None]] = {MATRIX_PRODUCTS: self._multiply, LAUNCHES: self._launch}
        nccl: Any = getattr(torch.cuda, "nccl", None)
        if num_gpus > 1 and hasattr(nccl, "all_reduce"):
            self._reduced = [
                torch.zeros(_REDUCED_NUMBERS, dtype=torch.bfloat16, device=torch.device("cuda", index))
                for index in range(num_gpus)
            ]
            self._work[ALL_REDUCE] = lambda: nccl.all_reduce(self._reduced)
        self._num_products = 8
        for kind in self._work:
            self.pulse(kind)
        self._num_products = max(1, round(8 * _PULSE_S / max(1e-5, self.pulse().time_s)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """See `Load`."""
        return tuple(self._work)

    def pulse(self, kind: str = MATRIX_PRODUCTS) -> Pulse:
        """See `Load`."""
        torch = self._torch
        with torch.cuda.device(self._device):
            begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
            begin.record()
            self._work[kind]()
            end.record()
            end.synchronize()
        end_s = time.monotonic()
        return Pulse(end_s - begin.elapsed_time(end) / 1000, end_s)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """See `Load`: some threads spin, as those of a receive do."""
        torch = self._torch
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                for _ in range(_NUM_SPINS):
                    torch.cuda._sleep(_SPIN_CYCLES)
            yield
            stream.synchronize()

    def _multiply(self) -> None:
        for _ in range(self._num_products):
            self._torch.mm(*self._matrices, out=self._product)

    def _launch(self) -> None:
        for _ in range(_NUM_LAUNCHES):
            self._small.add_(1)


def cuda_load_and_events(devices: Sequence[Device]) -> tuple[CudaLoad, CudaEvents]:
    """Of the visible GPUs; the marks are on the first one's stream.

    Raises:
        PerseusError: if torch cannot use them.
    """
    load = CudaLoad(len(devices))
    events = CudaEvents(0)
    events.record()  # anchors are looked for from the first mark on
    limit_s = time.monotonic() + _ANCHOR_LIMIT_S
    while not events.knows_host_time and time.monotonic() < limit_s:
        time.sleep(0.05)
        with events.between_iterations():
            pass
    return load, events
