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
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind

_BYTES_PER_NUMBER = 2  # bfloat16
# Unfused cross entropy (Megatron's): written in bfloat16, cast to float32, then maximum, difference, exponential, sum
# and quotient, each of which reads and most of which write a float32.
_BYTES_PER_LOGIT = 2 + (2 + 4) + 4 + 8 + 8 + 4 + 8


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


@dataclass(frozen=True)
class Transformer:
    """The shape of a decoder-only transformer.

    Attributes:
        name: for example `gpt3-6.7b`.
        num_layers: transformer layers.
        hidden_size: h.
        vocabulary_size: V, size of the language-model head.
        sequence_length: s, tokens of one sample.
    """

    name: str
    num_layers: int
    hidden_size: int
    vocabulary_size: int
    sequence_length: int = 2048


@dataclass(frozen=True)
class Workload:
    """A transformer cut into pipeline stages, and what each instruction of it asks of one GPU.

    FLOP of a layer as in Narayanan et al. (SC 2021): 24 b s h^2 + 4 b s^2 h forward, twice that backward; of the head
    2 b s h V. Memory traffic of a layer: its weights once, and each of the s b h (10 + 24 / t) bytes of activations
    that Korthikanti et al. (MLSys 2023, equation 2) count without the attention matrix, written and read once. Tensor
    parallelism: two ring all-reduces of s b h numbers per layer and direction (Megatron-LM, Shoeybi et al. 2019).

    Attributes:
        transformer: its shape.
        num_stages: pipeline stages; layers are divided as evenly as possible, what is left goes to the first stages.
        microbatch_size: b, samples of one microbatch.
        tensor_parallel: t, GPUs that share each layer.

    Raises:
        InputError: if a number is below 1, or there are more stages than layers.
    """

    transformer: Transformer
    num_stages: int
    microbatch_size: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        """Refuses what cannot be cut."""
        for name in ("num_stages", "microbatch_size", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.num_stages > self.transformer.num_layers:
            raise InputError(
                f"num_stages is {self.num_stages}, but {self.transformer.name} has {self.transformer.num_layers} "
                "layers; use one layer per stage at least"
            )

    def num_layers(self, stage: int) -> int:
        """Transformer layers on a stage."""
        each, left = divmod(self.transformer.num_layers, self.num_stages)
        return each + (stage < left)

    def forward(self, stage: int) -> Work:
        """Work of one forward on one GPU of a stage."""
        work = self._layer_forward() * self.num_layers(stage)
        return work + self._head_forward() if stage == self.num_stages - 1 else work

    def backward(self, stage: int) -> Work:
        """Work of one backward on one GPU of a stage: twice the forward, but as many all-reduces."""
        forward = self.forward(stage)
        return Work(2 * forward.flop, 2 * forward.memory_bytes, forward.link_bytes)

    def profile(self, gpu: GpuModel, clocks_mhz: tuple[int, ...] | None = None) -> Profile:
        """Time and energy of every instruction on such a GPU, without noise, rounded to six digits.

        Args:
            gpu: one GPU of each stage.
            clocks_mhz: the clocks to list, all supported ones by default.

        Raises:
            InputError: if the GPU does not support one of the clocks.
        """
        clocks = gpu.clocks_mhz if clocks_mhz is None else clocks_mhz
        for clock in clocks:
            if clock not in gpu.clocks_mhz:
                raise InputError(
                    f"clock {clock} MHz is not supported by {gpu.name}; it has {gpu.min_clock_mhz} to "
                    f"{gpu.max_clock_mhz} MHz in steps of {gpu.clock_step_mhz}"
                )
        measurements = []
        for stage in range(self.num_stages):
            for kind, work in ((Kind.FORWARD, self.forward(stage)), (Kind.BACKWARD, self.backward(stage))):
                times_s, powers_w = gpu.time_s(work, clocks), gpu.power_w(work, clocks)
                for clock, time, power_w in zip(clocks, times_s, powers_w, strict=True):
                    time_s = float(f"{time:.6g}")
                    # Rounded down, so that energy / time never exceeds the power limit.
                    energy_j = _six_digits_down(power_w * time_s)
                    measurements.append(Measurement(InstructionType(stage, 0, kind), clock, time_s, energy_j))
        return Profile(tuple(measurements))

    @property
    def _num_tokens(self) -> int:
        return self.microbatch_size * self.transformer.sequence_length

    def _layer_forward(self) -> Work:
        h, s, t = self.transformer.hidden_size, self.transformer.sequence_length, self.tensor_parallel
        activations = self._num_tokens * h
        all_reduced_bytes = 2 * activations * _BYTES_PER_NUMBER
        return Work(
            flop=self._num_tokens * (24 * h * h + 4 * s * h) / t,
            memory_bytes=12 * h * h * _BYTES_PER_NUMBER / t + 2 * activations * (10 + 24 / t),
            link_bytes=all_reduced_bytes * 2 * (t - 1) / t,
        )

    def _head_forward(self) -> Work:
        h, v, t = self.transformer.hidden_size, self.transformer.vocabulary_size, self.tensor_parallel
        return Work(
            flop=2 * self._num_tokens * h * v / t,
            memory_bytes=(h * v * _BYTES_PER_NUMBER + self._num_tokens * v * _BYTES_PER_LOGIT) / t,
        )


def _six_digits_down(value: float) -> float:
    scale = 10.0 ** (5 - math.floor(math.log10(value)))
    return float(f"{math.floor(value * scale) / scale:.6g}")


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

# Layers and hidden sizes: Brown et al. (2020), table 2.1, and the BLOOM paper (Le Scao et al. 2022), table 3.
TRANSFORMERS = {
    transformer.name: transformer
    for transformer in (
        Transformer("gpt3-1.3b", 24, 2048, 51200),
        Transformer("gpt3-2.7b", 32, 2560, 51200),
        Transformer("gpt3-6.7b", 32, 4096, 51200),
        Transformer("gpt3-175b", 96, 12288, 51200),
        Transformer("bloom-176b", 70, 14336, 250880),
    )
}
