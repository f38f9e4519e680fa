"""The one interface through which the rest of this package sees a GPU."""

from __future__ import annotations

from enum import Flag, auto
from typing import Protocol


class ThrottleReason(Flag):
    """Why a GPU runs below the clock it was asked for. No member means that nothing holds it back."""

    NONE = 0
    IDLE = auto()
    APPLICATION_CLOCKS = auto()
    POWER_CAP = auto()
    THERMAL = auto()
    POWER_BRAKE = auto()
    OTHER = auto()

    @property
    def slows_training(self) -> bool:
        """Whether power or heat holds the clock down."""
        return bool(self & ThrottleReason.POWER_CAP) or self.is_trouble

    @property
    def is_trouble(self) -> bool:
        """Whether heat or a power brake does: signs of a straggler, as the power limit at full load is not."""
        return bool(self & (ThrottleReason.THERMAL | ThrottleReason.POWER_BRAKE))


class Device(Protocol):
    """One whole GPU. Every method may raise `perseus_core.gpu.errors.GpuError` or one of its few kinds."""

    @property
    def uuid(self) -> str:
        """The UUID as the driver gives it, `GPU-...`."""

    @property
    def name(self) -> str:
        """The product name, for example `NVIDIA A100-SXM4-80GB`."""

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        """Graphics clocks at the highest memory clock [MHz], highest first."""

    def sm_clock_mhz(self) -> int:
        """The clock it runs at now [MHz]. A lock is only a request: capping or another program may override it."""

    def lock_clock(self, clock_mhz: int) -> None:
        """Asks for one fixed clock [MHz]. Takes some 10-20 ms to come into force."""

    def reset_clock(self) -> None:
        """Gives the clock back to the driver."""

    def power_limit_w(self) -> float:
        """The power limit in force [W]."""

    def set_power_limit(self, limit_w: float) -> None:
        """Sets the power limit [W]. Here for completeness: it is the user's own, nothing in this package sets it."""

    def power_w(self) -> float:
        """The power drawn now [W]."""

    @property
    def counts_energy(self) -> bool:
        """Whether the GPU counts its energy itself; where not, `total_energy_j` integrates power samples."""

    def total_energy_j(self) -> float:
        """Energy [J] since an arbitrary moment; only differences mean something. Moves every 20-100 ms."""

    def throttle_reasons(self) -> ThrottleReason:
        """What holds the clock down now."""
