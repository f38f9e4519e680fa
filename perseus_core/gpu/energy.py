"""Energy of a GPU that does not count it: power samples, integrated in a side thread."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

from perseus_core.gpu.errors import GpuError

_PERIOD_S = 0.05


class PowerIntegrator:
    """Samples a power and integrates it by the trapezoidal rule, from now on until it is no longer used."""

    def __init__(self, read_power_w: Callable[[], float], period_s: float = _PERIOD_S) -> None:
        """Takes the first sample at once, in the calling thread.

        Raises:
            GpuError: if the power cannot be read.
        """
        self._read_power_w = read_power_w
        self._lock = threading.Lock()
        self._energy_j = 0.0
        self._time_s = time.monotonic()
        self._power_w = read_power_w()
        self._error: GpuError | None = None
        # The thread knows its owner only weakly, so that it ends with it.
        threading.Thread(
            target=_sample_while_alive, args=(weakref.ref(self), period_s), name="perseus-energy", daemon=True
        ).start()

    def energy_j(self) -> float:
        """Energy since the start, up to this moment.

        Raises:
            GpuError: if the power cannot be read any more.
        """
        if self._error is not None:
            raise self._error
        self.sample()
        return self._energy_j

    def sample(self) -> None:
        """Adds the energy since the last sample."""
        with self._lock:
            power_w = self._read_power_w()
            now_s = time.monotonic()
            self._energy_j += (power_w + self._power_w) / 2 * (now_s - self._time_s)
            self._time_s, self._power_w = now_s, power_w

    def stop_with(self, error: GpuError) -> None:
        """Remembers why sampling stopped, for whoever asks next."""
        self._error = error


def _sample_while_alive(owner: weakref.ref[PowerIntegrator], period_s: float) -> None:
    while True:
        time.sleep(period_s)
        integrator = owner()
        if integrator is None:
            return
        try:
            integrator.sample()
        except GpuError as error:
            integrator.stop_with(error)
            return
        del integrator
