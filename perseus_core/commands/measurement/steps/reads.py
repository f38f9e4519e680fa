"""What it costs to read from the driver: while the GPU waits, while it works, and while other processes read, too."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from perseus_core.commands.measurement.bench import Bench
from perseus_core.commands.measurement.load import busy
from perseus_core.commands.measurement.results import NotMeasured, Spread, Verdict, ms, standing
from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import CallFailed, GpuError

_NUM_PROCESSES = 8
# The sampler looks every millisecond about when the counter moves.
_MOST_S = 0.001
# As often as a rank reads, not as often as one can: nothing else is of interest.
_BETWEEN_S = 0.001

_READER = """
import sys, time
from perseus_core.gpu.nvml import NvmlDevice
from perseus_core.gpu.errors import GpuError
device = NvmlDevice(sys.argv[1])
print("reads", flush=True)
while True:
    try:
        device.total_energy_j()
        device.sm_clock_mhz()
    except GpuError:
        pass
    time.sleep(0.005)
"""


@dataclass(frozen=True)
class Read:
    """One kind of read.

    Attributes:
        idle, loaded: what it takes while the GPU waits, and while it works.
        beside_others: what it takes while it works, and seven other processes read.
        num_failed: reads that failed for a reason that passed, and how many reads there were.
        failure: the last one's words.
    """

    idle: Spread
    loaded: Spread
    beside_others: Spread
    num_failed: int
    num_reads: int
    failure: str


@dataclass(frozen=True)
class Reads:
    """All kinds of reads that the runtime makes.

    Attributes:
        kinds: by what is read.
        not_supported: what the GPU or the driver does not tell, with the error.
        num_processes: how many processes read in the third part.
    """

    kinds: Mapping[str, Read]
    not_supported: Mapping[str, str]
    num_processes: int

    @property
    def verdict(self) -> Verdict:
        """They are cheap beside how often they are made, and do not fail."""
        parts, good = [], not self.not_supported
        for name, read in self.kinds.items():
            typical_s = [one.median_s for one in (read.idle, read.loaded, read.beside_others)]
            parts.append(f"{name} {', '.join(ms(one) for one in typical_s)}")
            good &= max(typical_s) <= _MOST_S
            if read.num_failed:
                parts[-1] += f", {read.num_failed} of {read.num_reads} failed ({read.failure})"
                good = False
        parts += [f"{name} cannot be read ({why})" for name, why in self.not_supported.items()]
        sentence = (
            f"idle, loaded, loaded and read by {self.num_processes} processes: {'; '.join(parts)}; assumed: "
            f"{ms(_MOST_S)} at most, and no failures"
        )
        return Verdict(standing(as_assumed=good), sentence)


def measure_reads(bench: Bench) -> Reads:
    """Reads each kind in turn, as often as a rank does."""
    device = bench.device
    kinds: dict[str, Callable[[], object]] = {
        "energy counter": device.total_energy_j,
        "power": device.power_w,
        "clock": device.sm_clock_mhz,
        "throttle reasons": device.throttle_reasons,
    }
    not_supported = {}
    for name, call in list(kinds.items()):
        try:
            call()
        except CallFailed:
            pass
        except GpuError as error:
            not_supported[name] = str(error)
            del kinds[name]
    if not kinds:
        raise NotMeasured(f"nothing can be read ({next(iter(not_supported.values()))})")
    timed = {name: _Timed(call) for name, call in kinds.items()}
    each_s = bench.step_s / 3
    idle = _read_for(each_s, timed)
    with busy(bench.load):
        loaded = _read_for(each_s, timed)
        with _other_readers(device, _NUM_PROCESSES - 1) as num_others:
            beside = _read_for(each_s, timed)
    return Reads(
        {
            name: Read(idle[name], loaded[name], beside[name], one.num_failed, one.num_reads, one.failure)
            for name, one in timed.items()
        },
        not_supported,
        num_others + 1,
    )


class _Timed:
    """One kind of read, and what became of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.num_failed = self.num_reads = 0
        self.failure = ""

    def time_s(self) -> float | None:
        """How long one took; None if it failed."""
        self.num_reads += 1
        begin_s = time.perf_counter()
        try:
            self._call()
        except CallFailed as error:
            self.num_failed += 1
            self.failure = str(error)
            return None
        return time.perf_counter() - begin_s


def _read_for(duration_s: float, kinds: Mapping[str, _Timed]) -> dict[str, Spread]:
    times_s: dict[str, list[float]] = {name: [] for name in kinds}
    until_s = time.monotonic() + duration_s
    rounds = 0
    while time.monotonic() < until_s or rounds < 3:
        rounds += 1
        for name, one in kinds.items():
            took_s = one.time_s()
            if took_s is not None:
                times_s[name].append(took_s)
            time.sleep(_BETWEEN_S)
    return {name: Spread.of(of_kind) for name, of_kind in times_s.items()}


@contextmanager
def _other_readers(device: Device, count: int) -> Iterator[int]:
    """Inside, so many other processes read from the same GPU; gives how many do."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _READER, device.uuid], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(count)
    ]
    try:
        # A reader that cannot begin closes its output, so this never waits for one that is not there.
        began = [process.stdout is not None and process.stdout.readline() != "" for process in processes]
        yield sum(began)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
