"""Whether clocks may be locked here at all, for a measurement: with the right to, and on GPUs that are free."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence

from perseus_core.commands.examination import Verdict, clock_rights
from perseus_core.commands.measurement.bench import own_clocks
from perseus_core.errors import InputError
from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import GpuError
from perseus_core.gpu.nvml import computing_processes
from perseus_core.gpu.simulated import ENVIRONMENT_VARIABLE

_LIMIT_S = 20.0


def busy_gpus(devices: Sequence[Device]) -> dict[str, list[int]]:
    """Of GPUs that processes compute on: those processes.

    Raises:
        GpuError: if one cannot be asked.
    """
    processes = {device.uuid: computing_processes(device.uuid) for device in devices}
    return {uuid: pids for uuid, pids in processes.items() if pids}


def refuse_to_lock(devices: Sequence[Device], environment: Mapping[str, str] | None = None) -> None:
    """Returns if the clocks of these GPUs may be locked: nobody computes on them, and this process has the right.

    Raises:
        InputError: if not, with what to do.
        GpuError: if that cannot be found out.
    """
    environment = os.environ if environment is None else environment
    for uuid, pids in busy_gpus(devices).items():
        told = ", ".join(map(str, pids))
        raise InputError(
            f"--lock: process(es) {told} compute on {uuid}, and its clock is not touched; measure on free GPUs "
            "(CUDA_VISIBLE_DEVICES), or without --lock"
        )
    if ENVIRONMENT_VARIABLE not in environment:
        rights = clock_rights(environment)
        if rights.verdict is not Verdict.GOOD:
            raise InputError(f"--lock: {rights.fact}; {rights.remedy}")
    _try_to_lock(devices)


def _try_to_lock(devices: Sequence[Device]) -> None:
    """Locks each GPU's highest clock for a moment: what else may be missing, the driver knows."""
    failures: list[Exception] = []

    def lock_all() -> None:
        try:
            with own_clocks(devices) as clocks:
                for device, clock in zip(devices, clocks, strict=True):
                    clock.lock(device.supported_clocks_mhz()[0])
        except Exception as error:  # told below
            failures.append(error)

    thread = threading.Thread(target=lock_all, daemon=True)
    thread.start()
    thread.join(_LIMIT_S)
    if thread.is_alive():
        raise GpuError(f"--lock: the driver has not answered for {_LIMIT_S:g} s; see `dmesg` for Xid errors")
    if failures:
        raise InputError(f"--lock: {failures[0]}")
