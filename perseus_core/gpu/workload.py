"""What the instructions of a transformer ask of one GPU, and the profile that the GPU model makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from perseus_core.errors import InputError
from perseus_core.gpu.model import GpuModel, Work
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind

_BYTES_PER_NUMBER = 2  # bfloat16
# Unfused cross entropy (Megatron's): written in bfloat16, cast to float32, then maximum, difference, exponential, sum
# and quotient, each of which reads and most of which write a float32.
_BYTES_PER_LOGIT = 2 + (2 + 4) + 4 + 8 + 8 + 4 + 8


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
