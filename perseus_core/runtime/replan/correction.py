"""Corrects a profile by what was seen while a plan ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType
from perseus_core.runtime.measure.stretch import Stretch

Stretches = Mapping[tuple[InstructionType, int], Stretch]
"""By instruction type and planned clock."""


def corrected(profile: Profile, stretches: Stretches) -> Profile:
    """The profile with each type's times stretched, interpolated between the clocks that ran.

    Beyond the highest and lowest clock that ran the factor stays the same. Energies stay as measured: nothing was seen
    of them. A GPU that is held down is another matter: the clocks above the one it is held at take the time and the
    energy of that one, and those below are as they were.

    Args:
        profile: as it was believed.
        stretches: of what ran.
    """
    of_types: dict[InstructionType, dict[int, Stretch]] = {}
    for (instruction_type, clock_mhz), stretch in sorted(stretches.items()):
        of_types.setdefault(instruction_type, {})[clock_mhz] = stretch
    return Profile(tuple(m for t in profile.types for m in _corrected_type(profile.of(t), of_types.get(t, {}))))


def _corrected_type(measurements: tuple[Measurement, ...], stretches: Mapping[int, Stretch]) -> list[Measurement]:
    if not stretches:
        return list(measurements)
    times_s = np.array([m.time_s for m in measurements])
    energies_j = np.array([m.energy_j for m in measurements])
    clocks_mhz = np.array([m.clock_mhz for m in measurements])
    fastest = stretches[max(stretches)]
    if fastest.held_down:
        held_s = fastest.factor * np.interp(fastest.clock_mhz, clocks_mhz[::-1], times_s[::-1])
        new_times_s = np.maximum(times_s, held_s)
        # Times rise from the highest clock down.
        new_energies_j = np.interp(new_times_s, np.maximum.accumulate(times_s), energies_j)
        beyond = new_times_s > times_s.max()
        new_energies_j[beyond] = energies_j[-1] * new_times_s[beyond] / times_s[-1]
    else:
        factor = np.interp(clocks_mhz, list(stretches), [stretch.factor for stretch in stretches.values()])
        new_times_s, new_energies_j = times_s * factor, energies_j
    return [
        replace(m, time_s=float(time_s), energy_j=float(energy_j))
        for m, time_s, energy_j in zip(measurements, new_times_s, new_energies_j, strict=True)
    ]
