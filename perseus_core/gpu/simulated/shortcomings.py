"""What real GPUs and drivers do that nobody would ask of simulated ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from perseus_core.errors import InputError
from perseus_core.gpu.simulated.fields import read_list, read_object, require_number
from perseus_core.gpu.simulated.nvml_codes import Code

Reports = Literal["clock in force", "clock asked for"]


@dataclass(frozen=True)
class ClockRegister:
    """What NVML tells of the SM clock. How fast the GPU works is another matter.

    Attributes:
        reports: the clock in force, or the one that was asked for last, before it is in force and if it never is.
        lag_s: it tells what was so long ago.
        offset_mhz: it tells so much more.
    """

    reports: Reports = "clock in force"
    lag_s: float = 0.0
    offset_mhz: int = 0

    def __post_init__(self) -> None:
        if self.reports not in get_args(Reports):
            raise InputError(f'"clock_register.reports" is {self.reports!r}; it must be one of {get_args(Reports)}')
        require_number("clock_register.lag_s", self.lag_s, 0, 10)
        require_number("clock_register.offset_mhz", self.offset_mhz, -1000, 1000, integer=True)


@dataclass(frozen=True)
class DriverErrors:
    """An NVML function fails now and then. Each process counts its own calls, for each GPU.

    Attributes:
        function: named as in C but without `_v2` and the like.
        error: as in nvml.h, without `NVML_ERROR_`.
        first: the first call that fails, counted from 1.
        every: and every so manieth from then on.
        times: so many calls fail in all; 0 for any number.
    """

    function: str
    error: str
    first: int = 1
    every: int = 1
    times: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.function, str) or not self.function.startswith("nvmlDevice"):
            raise InputError(f'"driver_errors.function" is {self.function!r}; it must be an NVML function of a device')
        if self.error not in Code.__members__ or self.error == Code.SUCCESS.name:
            known = ", ".join(code.name for code in Code if code)
            raise InputError(f'"driver_errors.error" is {self.error!r}; it must be one of {known}')
        for name, lowest in (("first", 1), ("every", 1), ("times", 0)):
            require_number(f"driver_errors.{name}", getattr(self, name), lowest, 1_000_000_000, integer=True)

    def fails(self, call: int) -> bool:
        """Whether the call with this number, from 1, fails."""
        number, rest = divmod(call - self.first, self.every)
        return call >= self.first and rest == 0 and (not self.times or number < self.times)


@dataclass(frozen=True)
class Shortcomings:
    """None by default. Keys of the same name in a GPU description.

    Attributes:
        clock_register: what NVML tells of the SM clock.
        lock_call_s: so long a call that locks or resets clocks takes, and holds up every other call on the machine.
        disobeyed_clocks_mhz: clocks that are accepted, and not obeyed: the GPU keeps the one it has.
        energy_counter_window_s: the counter measures only the last so long of each of its periods, and takes that for
            all of it; 0 for the whole period.
        power_cap_reported_from_mhz: at this clock and above a GPU that works says that it is at its power limit.
        driver_errors: functions that fail now and then.
        tensor_parallel: so many GPUs, one after the other, are the ranks of one tensor-parallel group: each instruction
            ends on all of them with the slowest.
    """

    clock_register: ClockRegister = field(default_factory=ClockRegister)
    lock_call_s: float = 0.0
    disobeyed_clocks_mhz: tuple[int, ...] = ()
    energy_counter_window_s: float = 0.0
    power_cap_reported_from_mhz: int = 0
    driver_errors: tuple[DriverErrors, ...] = ()
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        require_number("lock_call_s", self.lock_call_s, 0, 10)
        for clock in self.disobeyed_clocks_mhz:
            require_number("disobeyed_clocks_mhz", clock, 1, 10_000, integer=True)
        require_number("energy_counter_window_s", self.energy_counter_window_s, 0, 10)
        require_number("power_cap_reported_from_mhz", self.power_cap_reported_from_mhz, 0, 10_000, integer=True)
        require_number("tensor_parallel", self.tensor_parallel, 1, 1024, integer=True)

    @classmethod
    def from_document(cls, values: Mapping[str, Any]) -> Shortcomings:
        """From the keys of a JSON object that are ours.

        Raises:
            InputError: naming the field, its value and the remedy.
        """
        values = dict(values)
        if "clock_register" in values:
            register = read_object("clock_register", values["clock_register"], {"reports", "lag_s", "offset_mhz"})
            values["clock_register"] = ClockRegister(**register)
        if "disobeyed_clocks_mhz" in values:
            values["disobeyed_clocks_mhz"] = read_list("disobeyed_clocks_mhz", values["disobeyed_clocks_mhz"])
        if "driver_errors" in values:
            values["driver_errors"] = tuple(
                _driver_errors(entry) for entry in read_list("driver_errors", values["driver_errors"])
            )
        return cls(**values)


def _driver_errors(entry: object) -> DriverErrors:
    given = read_object("driver_errors", entry, {"function", "error", "first", "every", "times"})
    if not {"function", "error"} <= set(given):
        raise InputError(f'"driver_errors" holds {dict(given)}; each entry must have "function" and "error"')
    return DriverErrors(**given)
