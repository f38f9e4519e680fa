"""The description of simulated GPUs: a JSON file that says what they are, and names the profile they follow."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from perseus_core.errors import InputError
from perseus_core.gpu.simulated.fields import read_list, read_object, require_number
from perseus_core.gpu.simulated.shortcomings import Shortcomings


@dataclass(frozen=True)
class Noise:
    """Relative standard deviations of what a simulated GPU does and reports.

    Attributes:
        time: of one execution's time.
        energy: of one execution's energy.
        power: of one reading of instant power.
    """

    time: float = 0.0
    energy: float = 0.0
    power: float = 0.0

    def __post_init__(self) -> None:
        for name in ("time", "energy", "power"):
            require_number(f"noise.{name}", getattr(self, name), 0, 0.5)


@dataclass(frozen=True)
class BlockingPower:
    """Power [W] of a GPU that waits, linear in its clock between the lowest and the highest supported one."""

    at_lowest_clock: float
    at_highest_clock: float

    def __post_init__(self) -> None:
        for name in ("at_lowest_clock", "at_highest_clock"):
            require_number(f"blocking_power_w.{name}", getattr(self, name), 0, 10_000)


@dataclass(frozen=True)
class Description:
    """What the simulated GPUs of one machine are.

    Attributes:
        name: product name that NVML reports.
        num_gpus: how many there are, all alike.
        supported_clocks_mhz: SM clocks, highest first.
        profile: path of the profile CSV (`perseus_core.planning.profile`) they follow. A `forward_backward` that is not
            in it takes what its two passes take.
        blocking_power_w: power while waiting.
        power_limit_w: power limit at the start; a clock whose power is above the limit in force is not held.
        min_power_limit_w: lowest limit that can be set.
        max_power_limit_w: highest limit that can be set.
        clock_latency_s: from a lock call until the clock changes.
        clock_latency_down_s: the same for a lower clock; 0 for as long as up.
        clock_latency_jitter_s: it takes longer by as much as this, evenly.
        energy_counter_period_s: how often the energy counter moves.
        noise: measurement noise.
        shortcomings: what else real ones do that nobody would ask for; in the file, its fields stand beside these.
        stages: for each GPU the stage it follows by default; where empty, all stages in turn, a tensor-parallel group
            each.
        time_scale: multiplies the profile's times and energies, so powers stay; 0.1 makes a demonstration quicker.
        memory_clock_mhz: the one memory clock.
        memory_gib: memory of one GPU.
        compute_capability: CUDA compute capability, major and minor.
        seed: of the noise. The same seed gives the same noise to the n-th instruction of a GPU.

    Raises:
        InputError: naming the field, its value and the remedy.
    """

    name: str
    num_gpus: int
    supported_clocks_mhz: tuple[int, ...]
    profile: Path
    blocking_power_w: BlockingPower
    power_limit_w: float
    min_power_limit_w: float = 50.0
    max_power_limit_w: float = 0.0
    clock_latency_s: float = 0.015
    clock_latency_down_s: float = 0.0
    clock_latency_jitter_s: float = 0.0
    energy_counter_period_s: float = 0.1
    noise: Noise = field(default_factory=Noise)
    shortcomings: Shortcomings = field(default_factory=Shortcomings)
    stages: tuple[int, ...] = ()
    time_scale: float = 1.0
    memory_clock_mhz: int = 1593
    memory_gib: float = 80.0
    compute_capability: tuple[int, int] = (8, 0)
    seed: int = 0

    @property
    def clock_latencies_s(self) -> tuple[float, float, float]:
        """Up, down, and by how much they may be longer."""
        down_s = self.clock_latency_down_s or self.clock_latency_s
        return self.clock_latency_s, down_s, self.clock_latency_jitter_s

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name.encode()) < 96:
            raise InputError(f'"name" is {self.name!r}; it must be a text of 1 to 95 bytes')
        require_number("num_gpus", self.num_gpus, 1, 1024, integer=True)
        clocks = self.supported_clocks_mhz
        if not clocks:
            raise InputError('"supported_clocks_mhz" is empty; give at least one clock')
        for clock in clocks:
            require_number("supported_clocks_mhz", clock, 1, 10_000, integer=True)
        if list(clocks) != sorted(set(clocks), reverse=True):
            raise InputError(
                '"supported_clocks_mhz" is not in falling order without repetition; sort it, highest first'
            )
        require_number("min_power_limit_w", self.min_power_limit_w, 1, 10_000)
        require_number("power_limit_w", self.power_limit_w, self.min_power_limit_w, 10_000)
        if self.max_power_limit_w == 0:
            object.__setattr__(self, "max_power_limit_w", self.power_limit_w)
        require_number("max_power_limit_w", self.max_power_limit_w, self.power_limit_w, 10_000)
        for latency in ("clock_latency_s", "clock_latency_down_s", "clock_latency_jitter_s"):
            require_number(latency, getattr(self, latency), 0, 10)
        require_number("energy_counter_period_s", self.energy_counter_period_s, 0.001, 10)
        window_s = self.shortcomings.energy_counter_window_s
        if window_s > self.energy_counter_period_s:
            raise InputError(
                f'"energy_counter_window_s" is {window_s}; it must be at most "energy_counter_period_s", '
                f"{self.energy_counter_period_s}"
            )
        require_number("time_scale", self.time_scale, 0.001, 1000)
        require_number("memory_clock_mhz", self.memory_clock_mhz, 1, 100_000, integer=True)
        require_number("memory_gib", self.memory_gib, 1, 10_000)
        require_number("seed", self.seed, 0, 2**63, integer=True)
        if self.stages and len(self.stages) != self.num_gpus:
            raise InputError(
                f'"stages" has {len(self.stages)} entries for {self.num_gpus} GPUs; give one per GPU, or none'
            )
        for stage in self.stages:
            require_number("stages", stage, 0, 10_000, integer=True)
        if len(self.compute_capability) != 2:
            raise InputError(f'"compute_capability" is {self.compute_capability}; it must be [major, minor]')
        for part in self.compute_capability:
            require_number("compute_capability", part, 0, 99, integer=True)

    def blocking_power_at(self, clock_mhz: int) -> float:
        """Power [W] of a GPU that waits at a clock."""
        lowest, highest = self.supported_clocks_mhz[-1], self.supported_clocks_mhz[0]
        low_w, high_w = self.blocking_power_w.at_lowest_clock, self.blocking_power_w.at_highest_clock
        if highest == lowest:
            return high_w
        return low_w + (high_w - low_w) * (clock_mhz - lowest) / (highest - lowest)

    @classmethod
    def load(cls, path: str | Path) -> Description:
        """Reads a description; a relative `profile` is looked for beside the file.

        `supported_clocks_mhz` is a list, or `{"highest": 1410, "lowest": 210, "step": 15}`; `blocking_power_w` is a
        number, or `{"at_lowest_clock": 60, "at_highest_clock": 84}`. Keys that start with an underscore are comments.

        Raises:
            InputError: naming the file, the field, its value and the remedy.
        """
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a GPU description") from None
        except ValueError as error:
            raise InputError(f"{path}: is not JSON ({error})") from None
        try:
            return cls._from_document(document, folder=path.parent)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def _from_document(cls, document: object, *, folder: Path) -> Description:
        if not isinstance(document, dict):
            raise InputError("is not a JSON object; see configs/gpus for examples")
        values = {key: value for key, value in document.items() if not key.startswith("_")}
        of_shortcomings = {f.name for f in fields(Shortcomings)}
        known = {f.name for f in fields(cls)} - {"shortcomings"} | of_shortcomings
        for key in values:
            if key not in known:
                raise InputError(
                    f'"{key}" is not a field of a GPU description; the fields are {", ".join(sorted(known))}'
                )
        for key in ("name", "num_gpus", "supported_clocks_mhz", "profile", "blocking_power_w", "power_limit_w"):
            if key not in values:
                raise InputError(f'"{key}" is missing')
        if not isinstance(values["profile"], str):
            raise InputError(f'"profile" is {values["profile"]!r}; it must be the path of a profile CSV')
        values["profile"] = folder / values["profile"]
        values["supported_clocks_mhz"] = _clocks(values["supported_clocks_mhz"])
        values["blocking_power_w"] = _blocking_power(values["blocking_power_w"])
        if "noise" in values:
            values["noise"] = Noise(**read_object("noise", values["noise"], {"time", "energy", "power"}))
        for key in ("stages", "compute_capability"):
            if key in values:
                values[key] = read_list(key, values[key])
        shortcomings = Shortcomings.from_document({key: values.pop(key) for key in of_shortcomings & set(values)})
        return cls(**values, shortcomings=shortcomings)


def _clocks(value: object) -> tuple[int, ...]:
    if not isinstance(value, dict):
        return read_list("supported_clocks_mhz", value)
    span = read_object("supported_clocks_mhz", value, {"highest", "lowest", "step"})
    for key in ("highest", "lowest", "step"):
        require_number(f"supported_clocks_mhz.{key}", span.get(key), 1, 10_000, integer=True)
    return tuple(range(span["highest"], span["lowest"] - 1, -span["step"]))


def _blocking_power(value: object) -> BlockingPower:
    if isinstance(value, dict):
        ends = {"at_lowest_clock", "at_highest_clock"}
        given = read_object("blocking_power_w", value, ends)
        if set(given) != ends:
            raise InputError('"blocking_power_w" must be a number, or hold "at_lowest_clock" and "at_highest_clock"')
        return BlockingPower(**given)
    require_number("blocking_power_w", value, 0, 10_000)
    assert isinstance(value, (int, float))
    return BlockingPower(value, value)
