"""An analytical model of a GPU: how long training instructions take at a clock, and what energy they cost.

It stands in for measurements where there is no GPU: for demonstrations, tests and simulated GPUs. It is no substitute
for a profile: shapes are right, figures are within some ten per cent of published ones.

Time. An instruction is compute work [FLOP], memory traffic and traffic to other GPUs [bytes]. At SM clock f

    t_c = FLOP / (peak FLOP/s * efficiency * f / f_max)     falls as 1 / f
    t_m = bytes / memory bandwidth                          does not depend on f
    t_l = link bytes / link bandwidth                       does not depend on f
    t   = t_c + t_m + t_l - overlap * min(t_c, t_m)

the roofline of Williams et al. (CACM 2009), softened: kernels bound by memory run between those bound by compute.

Power. Dynamic power of CMOS is a C V^2 f, as in McPAT (Li et al., MICRO 2009) and AccelWattch (Kandiah et al., MICRO
2021), with activity 1 while computing and `stalled_activity` otherwise:

    P = P_static + P_dynamic * (f / f_max) * (V / V_max)^2 * (u + stalled_activity * (1 - u)) + P_memory * t_m / t

with u = t_c / t. Voltage cannot fall below V_min: it is V_min up to a knee, then rises linearly to V_max at f_max.
Below the knee a lower clock makes no operation cheaper and only lengthens the time during which static power flows, so
energy has its minimum near the knee (about 1050-1100 MHz on an A100).

Power cap. Where P would exceed the power limit, the GPU lowers its clock by itself until P equals the limit. So all
locked clocks above that effective clock look the same: as slow, and as costly.

Waiting. NCCL waits for a neighbour by spinning on the SMs, so a waiting GPU draws P_static and a small share
(`blocking_activity`) of dynamic power.

Sources of the constants: clocks, peak FLOP/s, bandwidths and power limits are of NVIDIA's public data sheets (A100 80GB
SXM, H100 SXM5, A40). Static, dynamic and memory power, efficiencies and voltages were set by hand so that the shape
resembles what the Perseus paper (SOSP 2024) reports for A100 and A40; those of the H100 are extrapolated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perseus_core.errors import InputError


@dataclass(frozen=True)
class Work:
    """What one instruction asks of one GPU.

    Attributes:
        flop: floating-point operations of matrix products.
        memory_bytes: traffic to GPU memory of everything bound by memory bandwidth.
        link_bytes: traffic to other GPUs of the stage that the instruction waits for.
    """

    flop: float
    memory_bytes: float
    link_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both pieces of work, one after the other."""
        return Work(self.flop + other.flop, self.memory_bytes + other.memory_bytes, self.link_bytes + other.link_bytes)

    def __mul__(self, factor: float) -> Work:
        """The same work several times."""
        return Work(self.flop * factor, self.memory_bytes * factor, self.link_bytes * factor)


@dataclass(frozen=True)
class GpuModel:
    """One kind of GPU. The equations are in the module's docstring.

    Attributes:
        name: product name, as NVML reports it.
        min_clock_mhz: lowest supported SM clock.
        max_clock_mhz: highest supported SM clock, f_max.
        clock_step_mhz: distance of supported clocks.
        tensor_flop_per_s: peak of dense bfloat16 matrix products at f_max.
        efficiency: share of the peak that large matrix products reach.
        memory_bytes_per_s: bandwidth of GPU memory.
        link_bytes_per_s: bandwidth to the other GPUs of a stage, one direction.
        overlap: share of the smaller of compute and memory time that hides behind the larger.
        static_w: leakage, fans, idle memory: power that flows at any clock.
        dynamic_w: dynamic power of the SMs at f_max while computing.
        memory_w: power of memory at full bandwidth, beyond idle.
        min_voltage: V_min as a share of V_max.
        voltage_knee_mhz: highest clock at which V_min suffices.
        stalled_activity: dynamic activity while the SMs wait for memory or links.
        blocking_activity: dynamic activity while NCCL waits for a neighbour.
        power_limit_w: power that the GPU never exceeds (TDP unless set lower).

    Raises:
        InputError: for a clock range, share, power or rate that no GPU can have.
    """

    name: str
    min_clock_mhz: int
    max_clock_mhz: int
    clock_step_mhz: int
    tensor_flop_per_s: float
    efficiency: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    overlap: float
    static_w: float
    dynamic_w: float
    memory_w: float
    min_voltage: float
    voltage_knee_mhz: int
    stalled_activity: float
    blocking_activity: float
    power_limit_w: float

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in (
            "min_clock_mhz",
            "clock_step_mhz",
            "tensor_flop_per_s",
            "memory_bytes_per_s",
            "link_bytes_per_s",
            "static_w",
            "dynamic_w",
            "power_limit_w",
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"GPU model {self.name!r}: {name} is {getattr(self, name)}; it must be above 0")
        for name in ("efficiency", "min_voltage"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"GPU model {self.name!r}: {name} is {getattr(self, name)}; it must be in (0, 1]")
        for name in ("overlap", "stalled_activity", "blocking_activity"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"GPU model {self.name!r}: {name} is {getattr(self, name)}; it must be in [0, 1]")
        if not (math.isfinite(self.memory_w) and self.memory_w >= 0):
            raise InputError(f"GPU model {self.name!r}: memory_w is {self.memory_w}; it must be 0 or more")
        if not self.min_clock_mhz <= self.voltage_knee_mhz < self.max_clock_mhz:
            raise InputError(
                f"GPU model {self.name!r}: voltage_knee_mhz is {self.voltage_knee_mhz}; "
                f"it must be in [{self.min_clock_mhz}, {self.max_clock_mhz})"
            )

    @property
    def clocks_mhz(self) -> tuple[int, ...]:
        """Supported SM clocks, highest first."""
        return tuple(range(self.max_clock_mhz, self.min_clock_mhz - 1, -self.clock_step_mhz))

    def voltage(self, clock_mhz: ArrayLike) -> NDArray[np.float64]:
        """Core voltage as a share of V_max."""
        knee, top = self.voltage_knee_mhz, self.max_clock_mhz
        return np.asarray(np.interp(np.asarray(clock_mhz, np.float64), [knee, top], [self.min_voltage, 1.0]))

    def effective_clock_mhz(self, work: Work, clock_mhz: ArrayLike) -> NDArray[np.float64]:
        """The clock at which the GPU really does that work when locked to `clock_mhz`: lower where power is capped."""
        return np.minimum(np.asarray(clock_mhz, np.float64), self._capped_clock_mhz(work))

    def time_s(self, work: Work, clock_mhz: ArrayLike) -> NDArray[np.float64]:
        """Time of the work when locked to these clocks, of their shape."""
        return self._uncapped_time_s(work, self.effective_clock_mhz(work, clock_mhz))

    def power_w(self, work: Work, clock_mhz: ArrayLike) -> NDArray[np.float64]:
        """Mean power during the work when locked to these clocks, of their shape; never above the power limit."""
        return self._wanted_power_w(work, self.effective_clock_mhz(work, clock_mhz))

    def energy_j(self, work: Work, clock_mhz: ArrayLike) -> NDArray[np.float64]:
        """Energy of the work when locked to these clocks, of their shape."""
        return self.power_w(work, clock_mhz) * self.time_s(work, clock_mhz)

    def blocking_power_w(self, clock_mhz: ArrayLike) -> NDArray[np.float64]:
        """Power while waiting for a neighbour, at these clocks."""
        return self.static_w + self._full_dynamic_power_w(clock_mhz) * self.blocking_activity

    def _uncapped_time_s(self, work: Work, clock_mhz: ArrayLike) -> NDArray[np.float64]:
        compute_s, memory_s = self._compute_time_s(work, clock_mhz), work.memory_bytes / self.memory_bytes_per_s
        hidden_s = self.overlap * np.minimum(compute_s, memory_s)
        return compute_s + memory_s + work.link_bytes / self.link_bytes_per_s - hidden_s

    def _compute_time_s(self, work: Work, clock_mhz: ArrayLike) -> NDArray[np.float64]:
        rate = self.tensor_flop_per_s * self.efficiency * np.asarray(clock_mhz, np.float64) / self.max_clock_mhz
        return work.flop / rate

    def _full_dynamic_power_w(self, clock_mhz: ArrayLike) -> NDArray[np.float64]:
        clock_share = np.asarray(clock_mhz, np.float64) / self.max_clock_mhz
        return self.dynamic_w * clock_share * self.voltage(clock_mhz) ** 2

    def _wanted_power_w(self, work: Work, clock_mhz: ArrayLike) -> NDArray[np.float64]:
        time_s = self._uncapped_time_s(work, clock_mhz)
        computing = self._compute_time_s(work, clock_mhz) / time_s
        activity = computing + self.stalled_activity * (1 - computing)
        memory_share = work.memory_bytes / self.memory_bytes_per_s / time_s
        return self.static_w + self._full_dynamic_power_w(clock_mhz) * activity + self.memory_w * memory_share

    def _capped_clock_mhz(self, work: Work) -> float:
        """The highest clock, not only of the supported ones, at which the work stays within the power limit."""
        low, high = float(self.min_clock_mhz), float(self.max_clock_mhz)
        if self._wanted_power_w(work, high) <= self.power_limit_w:
            return high
        for _ in range(60):  # halves the interval down to the precision of a double
            middle = (low + high) / 2
            if self._wanted_power_w(work, middle) <= self.power_limit_w:
                low = middle
            else:
                high = middle
        return low


# Data sheets: NVIDIA A100 Tensor Core GPU (2021), NVIDIA H100 Tensor Core GPU (2023), NVIDIA A40 (2021).
A100 = GpuModel(
    name="NVIDIA A100-SXM4-80GB",
    min_clock_mhz=210,
    max_clock_mhz=1410,
    clock_step_mhz=15,
    tensor_flop_per_s=312e12,
    efficiency=0.75,
    memory_bytes_per_s=2039e9,
    link_bytes_per_s=300e9,
    overlap=0.2,
    static_w=50.0,
    dynamic_w=360.0,
    memory_w=60.0,
    min_voltage=0.80,
    voltage_knee_mhz=1065,
    stalled_activity=0.3,
    blocking_activity=0.093,
    power_limit_w=400.0,
)

H100 = GpuModel(
    name="NVIDIA H100 80GB HBM3",
    min_clock_mhz=210,
    max_clock_mhz=1980,
    clock_step_mhz=15,
    tensor_flop_per_s=989e12,
    efficiency=0.65,
    memory_bytes_per_s=3352e9,
    link_bytes_per_s=450e9,
    overlap=0.2,
    static_w=75.0,
    dynamic_w=730.0,
    memory_w=90.0,
    min_voltage=0.76,
    voltage_knee_mhz=1320,
    stalled_activity=0.3,
    blocking_activity=0.09,
    power_limit_w=700.0,
)

A40 = GpuModel(
    name="NVIDIA A40",
    min_clock_mhz=210,
    max_clock_mhz=1740,
    clock_step_mhz=15,
    tensor_flop_per_s=149.7e12,
    efficiency=0.65,
    memory_bytes_per_s=696e9,
    link_bytes_per_s=56e9,
    overlap=0.2,
    static_w=60.0,
    dynamic_w=420.0,
    memory_w=50.0,
    min_voltage=0.72,
    voltage_knee_mhz=1095,
    stalled_activity=0.3,
    blocking_activity=0.025,
    power_limit_w=300.0,
)

GPUS = {"a100": A100, "h100": H100, "a40": A40}
