"""What Perseus finds on a machine: what is here, what is missing, what to do. It reads only and changes nothing."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from perseus_core.errors import InputError
from perseus_core.gpu.device import Device, ThrottleReason
from perseus_core.gpu.discovery import device_by_uuid
from perseus_core.gpu.errors import GpuError, NotSupported
from perseus_core.gpu.nvml import GpuIdentity, ask, driver_version, list_gpus
from perseus_core.gpu.visible import visible_gpus
from perseus_core.gpu.zeusd import SOCKET_VARIABLE, ZeusdClient
from perseus_core.runtime.clock.clock_owner import clock_owner

_CAP_SYS_ADMIN = 21  # linux/capability.h
_COUNTER_WATCHED_S = 1.0


class Verdict(Enum):
    """How a finding bears on Perseus."""

    GOOD = "ok"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        verdict: good, limited (Perseus works, but not in full), or missing (it can save nothing).
        subject: what was looked at.
        fact: what was found.
        remedy: what to do; empty where there is nothing to.
    """

    verdict: Verdict
    subject: str
    fact: str
    remedy: str = ""


def examine(environment: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Looks at frameworks, driver, rights and every visible GPU, one finding after the other.

    Args:
        environment: by default this process's environment variables.
    """
    environment = os.environ if environment is None else environment
    yield from _frameworks()
    try:
        gpus = list_gpus()
        driver = driver_version()
    except GpuError as error:
        yield _from_error("driver", error)
        return
    yield Finding(Verdict.GOOD, "driver", f"NVIDIA driver {driver}, {len(gpus)} GPU(s)")
    yield clock_rights(environment)
    try:
        visible = visible_gpus(gpus, environment)
    except InputError as error:
        yield Finding(Verdict.MISSING, "CUDA_VISIBLE_DEVICES", str(error))
        return
    if not visible:
        yield Finding(Verdict.MISSING, "GPUs", "none is visible to this process", "look at CUDA_VISIBLE_DEVICES")
    for gpu in visible:
        try:
            yield from _gpu(gpu, environment)
        except GpuError as error:
            yield _from_error(f"GPU {gpu.index}", error)


def _frameworks() -> Iterator[Finding]:
    installed = {distribution: _version(distribution) for distribution in ("torch", "deepspeed", "megatron-core")}
    for name, version in installed.items():
        if version is not None:
            yield Finding(Verdict.GOOD, name, version)
    if installed["deepspeed"] is None and installed["megatron-core"] is None:
        remedy = "pip install deepspeed, or megatron-core; planning works without"
        yield Finding(Verdict.LIMITED, "frameworks", "neither DeepSpeed nor Megatron is installed", remedy)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def clock_rights(environment: Mapping[str, str]) -> Finding:
    """Whether this process may lock clocks: as root, with CAP_SYS_ADMIN, or through zeusd."""
    socket_path = environment.get(SOCKET_VARIABLE)
    if socket_path:
        try:
            ZeusdClient(socket_path).discover()
        except GpuError as error:
            return _from_error("rights", error)
        return Finding(Verdict.GOOD, "rights", f"clocks are locked through zeusd at {socket_path}")
    if _has_cap_sys_admin():
        return Finding(Verdict.GOOD, "rights", "this process has CAP_SYS_ADMIN and may lock clocks")
    return Finding(
        Verdict.LIMITED,
        "rights",
        "this process may not lock clocks and would only measure",
        f"run as root, give it CAP_SYS_ADMIN, or start zeusd and set {SOCKET_VARIABLE}",
    )


def _has_cap_sys_admin() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return os.geteuid() == 0


def _gpu(gpu: GpuIdentity, environment: Mapping[str, str]) -> Iterator[Finding]:
    device = device_by_uuid(gpu.uuid, environment)
    subject = f"GPU {gpu.index}"
    yield Finding(Verdict.GOOD, subject, f"{gpu.name}, {gpu.uuid}, power limit {device.power_limit_w():.0f} W")
    yield _clocks(subject, device)
    yield _counter(subject, device)
    yield _persistence(subject, gpu)
    reasons = device.throttle_reasons()
    if reasons.slows_training:
        names = ", ".join(r.name.lower() for r in ThrottleReason if r in reasons and r.name)
        yield Finding(Verdict.LIMITED, subject, f"is held down now: {names}", "look at its cooling and power limit")
    owner = clock_owner(gpu.uuid)
    if owner is not None:
        yield Finding(Verdict.LIMITED, subject, f"its clock belongs to {owner}", "end that job, or use other GPUs")


def _clocks(subject: str, device: Device) -> Finding:
    clocks = device.supported_clocks_mhz()
    if len(clocks) < 2:
        return Finding(Verdict.MISSING, subject, f"{len(clocks)} supported clock(s): there is nothing to choose")
    now = device.sm_clock_mhz()
    return Finding(Verdict.GOOD, subject, f"{len(clocks)} clocks, {clocks[-1]} to {clocks[0]} MHz, now {now} MHz")


def _counter(subject: str, device: Device) -> Finding:
    """Watches the energy counter move. A GPU that sleeps may keep it still."""
    if not device.counts_energy:
        return Finding(Verdict.LIMITED, subject, "no energy counter: power is sampled instead, which is less exact")
    begin = time.monotonic()
    last, changes = device.total_energy_j(), [begin]
    while (now := time.monotonic()) < begin + _COUNTER_WATCHED_S:
        energy_j = device.total_energy_j()
        if energy_j != last:
            last = energy_j
            changes.append(now)
        time.sleep(0.001)
    periods = [after - before for before, after in itertools.pairwise(changes[1:])]
    if not periods:
        return Finding(
            Verdict.GOOD, subject, f"energy counter present; it did not move within {_COUNTER_WATCHED_S:g} s"
        )
    return Finding(Verdict.GOOD, subject, f"energy counter moves every {1000 * statistics.median(periods):.0f} ms")


def _persistence(subject: str, gpu: GpuIdentity) -> Finding:
    def read(nvml: Any) -> int:
        return int(nvml.nvmlDeviceGetPersistenceMode(nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)))

    try:
        enabled = ask("reading the persistence mode", gpu.uuid, read)
    except NotSupported:
        return Finding(Verdict.GOOD, subject, "persistence mode cannot be read here")
    if enabled:
        return Finding(Verdict.GOOD, subject, "persistence mode on")
    remedy = "sudo nvidia-smi -pm 1, so that the driver keeps its state between jobs"
    return Finding(Verdict.LIMITED, subject, "persistence mode off", remedy)


def _from_error(subject: str, error: Exception) -> Finding:
    """Our errors are `fact; remedy` already."""
    fact, _, remedy = str(error).partition("; ")
    return Finding(Verdict.MISSING, subject, fact, remedy)
