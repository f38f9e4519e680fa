"""How near in-vivo profiling comes to the truth: a pipeline of processes on simulated GPUs behind the real `pynvml`.

    python -m benchmarks.profiling_accuracy [--description configs/gpus/a100.json] [--time-scale 1] [--noise 0.01]

Takes one to two minutes. The truth is what the simulated GPUs follow.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from perseus_core.gpu import simulated
from perseus_core.gpu.simulated import Description, Noise, SimulatedNode, faults
from perseus_core.runtime.measure.stage_measurements import ClockMeasurements, SweepRows, merge
from perseus_core.runtime.measure.sweep import sweep_clocks
from tests.runtime.emulated_pipeline import PipelineRun, profile_pipeline

TIME_TARGET, ENERGY_TARGET = 0.03, 0.05


def errors_at(node: SimulatedNode, stage: int, c: ClockMeasurements) -> tuple[list[float], list[float], float]:
    """Relative errors of times, energies and of the waiting power."""
    index = node.model.clocks_mhz.index(c.clock_mhz)
    times, energies = [], []
    for i in c.instructions:
        cost = node.model.costs[node.cost_index(stage, i.type.chunk, i.type.kind.value)]
        times.append(i.time_s / cost.time_s[index] - 1)
        energies.append(i.energy_j / cost.energy_j[index] - 1)
    return times, energies, c.waiting.power_w / node.model.blocking_w[index] - 1


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--description", default="configs/gpus/a100.json")
    arguments.add_argument("--microbatches", type=int, default=8)
    arguments.add_argument("--time-scale", type=float, default=1.0)
    arguments.add_argument("--noise", type=float, default=0.01, help="of time and of energy, relative")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--num-clocks", type=int, default=8)
    arguments.add_argument("--iterations", type=int, default=3, help="measured at each clock, after one that is not")
    arguments.add_argument("--without-counter", action="store_true", help="the GPUs do not count their energy")
    options = arguments.parse_args()
    description = dataclasses.replace(
        Description.load(options.description),
        noise=Noise(options.noise, options.noise, 0.02),
        time_scale=options.time_scale,
        seed=options.seed,
    )
    clocks_mhz = sweep_clocks(description.supported_clocks_mhz, options.num_clocks)
    with tempfile.TemporaryDirectory() as folder:
        node = simulated.create_node(description, folder)
        if options.without_counter:
            for gpu in node.gpus:
                faults.remove_support(gpu, "nvmlDeviceGetTotalEnergyConsumption")
        begin_s = time.monotonic()
        run = PipelineRun(
            Path(folder),
            description.num_gpus,
            options.microbatches,
            iterations_of_step=1 + options.iterations,
            clocks_mhz=clocks_mhz,
        )
        results = profile_pipeline(run)
        took_s = time.monotonic() - begin_s

    table = Table(title=f"{description.name}, errors in %: largest over forward and backward of all stages, and rms")
    for column in ("clock MHz", "iterations", "time max", "time rms", "energy max", "energy rms", "waiting max"):
        table.add_column(column, justify="right")
    all_times: list[float] = []
    all_energies: list[float] = []
    by_clock: dict[int, list[tuple[int, ClockMeasurements]]] = {}
    for result in results:
        for c in result.measurements.clocks:
            by_clock.setdefault(c.clock_mhz, []).append((result.measurements.stage, c))
    for clock, found in sorted(by_clock.items(), reverse=True):
        errors = [errors_at(node, stage, c) for stage, c in found]
        times = np.array([e for of_stage in errors for e in of_stage[0]])
        energies = np.array([e for of_stage in errors for e in of_stage[1]])
        waiting = max((of_stage[2] for of_stage in errors), key=abs)
        all_times += times.tolist()
        all_energies += energies.tolist()
        iterations = sorted({c.num_iterations for _, c in found})
        values = (abs(times).max(), rms(times), abs(energies).max(), rms(energies), waiting)
        shown_iterations = f"{iterations[0]}-{iterations[-1]}" if len(iterations) > 1 else f"{iterations[0]}"
        table.add_row(str(clock), shown_iterations, *(f"{100 * value:.2f}" for value in values))
    console = Console()
    console.print(table)
    job = merge(SweepRows.of(result.measurements for result in results))
    for stage, line in enumerate(job.blocking):
        truth_w = float(np.interp(line.clock_mhz, node.model.clocks_mhz[::-1], node.model.blocking_w[::-1]))
        console.print(
            f"stage {stage}: blocking {line.power_w:.1f} W (± {line.standard_error_w:.1f}) at {line.clock_mhz:.0f} MHz,"
            f" truth {truth_w:.1f} W; {results[stage].num_iterations} iterations"
        )
        for note in results[stage].notes:
            console.print(note)
    largest_time, largest_energy = np.abs(all_times).max(), np.abs(all_energies).max()
    console.print(
        f"largest error: time {100 * largest_time:.2f} % (target {100 * TIME_TARGET:g}), "
        f"energy {100 * largest_energy:.2f} % (target {100 * ENERGY_TARGET:g}); {took_s:.0f} s"
    )


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


if __name__ == "__main__":
    main()
