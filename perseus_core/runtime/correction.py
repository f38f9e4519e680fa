"""Corrects a profile by what was seen while a plan ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType

# An instruction that ran so rarely says nothing.
_MIN_EXECUTIONS = 4


@dataclass(frozen=True)
class SeenDuration:
    """How long one instruction type really took at one planned clock.

    Attributes:
        type: stage, chunk and kind.
        clock_mhz: the clock that was planned.
        time_s: median duration.
        executions: how many.
        held_down: whether power or heat held the GPU's clock down meanwhile.
    """

    type: InstructionType
    clock_mhz: int
    time_s: float
    executions: int
    held_down: bool = False


def corrected(profile: Profile, seen: Sequence[SeenDuration]) -> Profile:
    """The profile with each type's times multiplied by seen over promised, interpolated between the clocks that ran.

    Beyond the highest and lowest clock that ran the factor stays the same. A GPU that is held down is another matter:
    no clock is faster than the one it is held at, and those below are as they were. Energies follow their times along
    the old curve: a GPU that is held at a lower clock takes the time and the energy of that clock.

    Args:
        profile: as it was believed.
        seen: of any ranks; of several ranks of a stage the slowest counts.
    """
    slowest: dict[InstructionType, dict[int, SeenDuration]] = {}
    for s in seen:
        if s.executions >= _MIN_EXECUTIONS:
            of_type = slowest.setdefault(s.type, {})
            if s.clock_mhz not in of_type or s.time_s > of_type[s.clock_mhz].time_s:
                of_type[s.clock_mhz] = s
    return Profile(tuple(m for t in profile.types for m in _corrected_type(profile.of(t), slowest.get(t, {}))))


def _corrected_type(measurements: tuple[Measurement, ...], seen: Mapping[int, SeenDuration]) -> list[Measurement]:
    promised_s = {m.clock_mhz: m.time_s for m in measurements}
    factors = {clock: s.time_s / promised_s[clock] for clock, s in sorted(seen.items()) if clock in promised_s}
    if not factors:
        return list(measurements)
    clocks = np.array([m.clock_mhz for m in measurements])
    factor = np.interp(clocks, list(factors), list(factors.values()))
    times_s = np.array([m.time_s for m in measurements])
    energies_j = np.array([m.energy_j for m in measurements])
    new_times_s = times_s * factor
    fastest = seen[max(factors)]
    if fastest.held_down:
        new_times_s = np.maximum(times_s, fastest.time_s)
    # Times rise from the highest clock down.
    new_energies_j = np.interp(new_times_s, np.maximum.accumulate(times_s), energies_j)
    beyond = new_times_s > times_s.max()
    new_energies_j[beyond] = energies_j[-1] * new_times_s[beyond] / times_s[-1]
    return [
        replace(m, time_s=float(time_s), energy_j=float(energy_j))
        for m, time_s, energy_j in zip(measurements, new_times_s, new_energies_j, strict=True)
    ]
