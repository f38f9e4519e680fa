"""Simulated GPUs and real training processes for the tests of the clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from perseus_core.gpu import simulated
from perseus_core.gpu.nvml import NvmlDevice
from perseus_core.gpu.simulated.activation import uninstall

CLOCKS_MHZ = (1000, 900, 800, 700, 600, 500)
BASE_S = {"forward": 0.040, "backward": 0.065}
_REPOSITORY = Path(__file__).resolve().parents[2]


def duration_s(kind: str, clock_mhz: int) -> float:
    """What the simulated GPUs take: 40 to 106 ms."""
    return float(BASE_S[kind] * (1000 / clock_mhz) ** 0.7)


@contextmanager
def simulated_machine(folder: Path, **changes: Any) -> Iterator[simulated.SimulatedNode]:
    """GPUs that `pynvml` of this process and its children sees; keyword arguments replace fields of the description."""
    lines = ["stage,instruction,frequency,time,energy"]
    for kind in BASE_S:
        for clock in CLOCKS_MHZ:
            time_s = duration_s(kind, clock)
            lines.append(f"0,{kind},{clock},{time_s!r},{time_s * (100 + clock / 5)!r}")
    (folder / "profile.csv").write_text("\n".join(lines) + "\n")
    description = {
        "name": "Test GPU",
        "num_gpus": 2,
        "supported_clocks_mhz": list(CLOCKS_MHZ),
        "profile": "profile.csv",
        "blocking_power_w": 50,
        "power_limit_w": 400,
        **changes,
    }
    (folder / "gpus.json").write_text(json.dumps(description))
    (folder / "node").mkdir()
    node = simulated.create_node(folder / "gpus.json", folder / "node", log=True)
    simulated.install(node.folder)
    try:
        with mock.patch.dict(os.environ, {simulated.ENVIRONMENT_VARIABLE: str(node.folder)}):
            yield node
    finally:
        uninstall()


def device_of(node: simulated.SimulatedNode, index: int = 0) -> NvmlDevice:
    """One of the GPUs, as product code sees it."""
    return NvmlDevice(node.gpus[index].identity.uuid)


def locked_range(node: simulated.SimulatedNode, index: int = 0) -> list[int]:
    """[lowest, highest] of the lock on a GPU, empty when its clock is the driver's own."""
    return node.gpus[index].state().locked_mhz


def wait_until(condition: Callable[[], Any], *, limit_s: float = 60.0) -> Any:
    """Waits for something that other threads or processes do, and returns what it gave."""
    deadline_s = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)
    return result


def watchdogs_of(pid: int) -> list[int]:
    """The process numbers of the watchdogs that watch a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"perseus_core.runtime.clock.watchdog" in arguments and str(pid).encode() in arguments:
            found.append(int(path.parent.name))
    return found


_TRAINING = """
import functools, os, signal, sys, time
from perseus_core.gpu.discovery import visible_devices
from perseus_core.runtime.clock.controller import ClockController
from perseus_core.runtime.clock.give_back import GuardedClock
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.measure.events import HostEvents
from perseus_core.runtime.side_threads import OwnThreads

events = HostEvents()

def train_one_iteration(controller, clock_mhz=500):
    controller.begin_iteration([PlannedClock(clock_mhz, 0.0, 0.001)])
    controller.instruction_begins(events.record())
    controller.instruction_ends(events.record())
    controller.end_iteration()

def train_until(controller, condition):
    while not condition():
        train_one_iteration(controller)
        time.sleep(0.01)

{before}
controller = ClockController(
    visible_devices()[0], threads=OwnThreads(), guard=functools.partial(GuardedClock, hang_limit_s={hang_limit_s})
)
controller.start()
train_until(controller, lambda: controller.clock_in_force_mhz == 500 or controller.failure)
time.sleep(0.2)  # the change is watched: a process stopped just then would hold the simulated driver's lock for ever
print(controller.failure or "locked", flush=True)
{after}
"""


@contextmanager
def training(after: str, *, before: str = "", hang_limit_s: float = 30.0) -> Iterator[subprocess.Popen[str]]:
    """A process that locks its first GPU at 500 MHz, says so, and runs the code of `after`."""
    code = _TRAINING.format(before=before, after=after, hang_limit_s=hang_limit_s)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(_REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str], *, limit_s: float = 60.0) -> str:
    """What a training process says next; empty when it says nothing for so long."""
    assert process.stdout is not None
    patience = threading.Timer(limit_s, process.kill)
    patience.start()
    try:
        return process.stdout.readline().strip()
    finally:
        patience.cancel()
