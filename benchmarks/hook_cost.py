"""What one instruction costs the training thread: `python -m benchmarks.hook_cost`.

Times `instruction_begins` and `instruction_ends`, recording the events included, in a loop that computes a little for
each instruction, with a controller that follows a plan on a simulated GPU and with none. Also whether the controller's
thread slows the Python code between the hooks, by competing for the interpreter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.common import print_table
from perseus_core.gpu import simulated
from perseus_core.runtime.clock.controller import ClockController
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.measure.events import HostEvents
from perseus_core.runtime.side_threads import OwnThreads

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_INSTRUCTIONS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--instruction-ms", type=float, default=5.0, help="Python computing for each instruction")
    arguments = parser.parse_args()
    work = _work_of(arguments.instruction_ms / 1000)
    with tempfile.TemporaryDirectory() as folder:
        node = simulated.create_node(REPOSITORY / "configs/gpus/a100.json", folder)
        os.environ[simulated.ENVIRONMENT_VARIABLE] = folder
        simulated.install()
        from perseus_core.gpu.discovery import visible_devices

        device = visible_devices()[0]
        controller = ClockController(device, threads=OwnThreads())
        controller.start()
        while not controller.is_guarded:
            time.sleep(0.01)
        low, high = node.model.clocks_mhz[20], node.model.clocks_mhz[0]
        duration_s = arguments.instruction_ms / 1000
        plan = [PlannedClock((low, high)[i // 2 % 2], i * duration_s, duration_s) for i in range(NUM_INSTRUCTIONS)]
        results = {}
        # Turn by turn, because the machine may be busier now than later.
        for _ in range(arguments.iterations):
            for name, follower in (("without controller", None), ("with controller", controller)):
                results.setdefault(name, []).append(_iteration(follower, plan, work))
        print(f"{controller.num_lock_calls} clock changes meanwhile; failure: {controller.failure}\n")
        controller.stop()
    rows = []
    for name, iterations in results.items():
        boundaries_us = sorted(1e6 * seconds for hooks, _ in iterations for seconds in hooks)
        between_ms = statistics.median(1e3 * seconds for _, seconds in iterations)
        high = [boundaries_us[len(boundaries_us) * percent // 100] for percent in (50, 90, 99)]
        rows.append([name, *(f"{us:.2f}" for us in high), f"{between_ms:.1f}"])
    print_table(["", "median us a boundary", "90 %", "99 %", "ms of computing between"], rows)


def _iteration(controller: ClockController | None, plan, work) -> tuple[list[float], float]:
    """Seconds of each boundary, and of all the work between them."""
    events = HostEvents()
    boundaries_s, work_s = [], 0.0
    if controller is not None:
        controller.begin_iteration(plan)
    for _ in plan:
        start_s = time.perf_counter()
        if controller is not None:
            controller.instruction_begins(events.record())
        begun_s = time.perf_counter()
        work()
        done_s = time.perf_counter()
        if controller is not None:
            controller.instruction_ends(events.record())
        end_s = time.perf_counter()
        boundaries_s += [begun_s - start_s, end_s - done_s]
        work_s += done_s - begun_s
    if controller is not None:
        controller.end_iteration()
    return boundaries_s, work_s


def _work_of(seconds: float):
    """Pure Python, which never gives up the interpreter of its own accord: the worst case for a side thread."""

    def count(steps: int) -> None:
        total = 0
        for step in range(steps):
            total += step

    start_s = time.perf_counter()
    count(1_000_000)
    steps = round(1_000_000 * seconds / (time.perf_counter() - start_s))
    return lambda: count(steps)


if __name__ == "__main__":
    main()
