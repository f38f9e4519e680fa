"""A pipeline of real processes on simulated GPUs that profiles itself: the least that can stand in for a training job.

Each stage is a process that runs 1F1B on the work emulator behind the real `pynvml`; pipes carry the dependencies.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from perseus_core.gpu import simulated
from perseus_core.gpu.discovery import device_by_uuid
from perseus_core.planning.schedule import Instruction, Kind, one_f_one_b
from perseus_core.runtime.measure.energy import ChunkKind, Iteration, Span
from perseus_core.runtime.measure.sampler import EnergySampler
from perseus_core.runtime.measure.stage_measurements import StageMeasurements
from perseus_core.runtime.measure.sweep import Sweep, sweep_clocks
from perseus_core.runtime.side_threads import OwnThreads

_LIMIT_S = 150


@dataclass(frozen=True)
class PipelineRun:
    """What to run.

    Attributes:
        folder: of the simulated GPUs, one for each stage.
        num_stages: processes.
        num_microbatches: of one iteration.
        iterations_of_step: how many iterations each clock is held.
        clocks_mhz: of the sweep; eight by default.
        num_iterations: limits its length.
        outside_s: time from the last instruction of the pipeline to the end of an iteration.
        sampling_period_s: of the energy counter.
        times_of_gpu: spans are what the GPU did, as CUDA events tell; otherwise what the process saw, some time later.
    """

    folder: Path
    num_stages: int
    num_microbatches: int
    iterations_of_step: int = 4
    clocks_mhz: tuple[int, ...] | None = None
    num_iterations: int = 200
    outside_s: float = 0.03
    sampling_period_s: float = 0.005
    times_of_gpu: bool = False


@dataclass(frozen=True)
class StageResult:
    """What a stage has measured, and in how many iterations."""

    measurements: StageMeasurements
    num_iterations: int
    notes: tuple[str, ...]


def profile_pipeline(run: PipelineRun) -> list[StageResult]:
    """Runs the pipeline until every stage's sweep is complete."""
    context = multiprocessing.get_context("spawn")
    links = [context.Pipe() for _ in range(run.num_stages - 1)]
    barrier = context.Barrier(run.num_stages)
    complete = context.Array("b", run.num_stages)
    results = context.SimpleQueue()
    processes = []
    for stage in range(run.num_stages):
        before = links[stage - 1][1] if stage > 0 else None
        after = links[stage][0] if stage < run.num_stages - 1 else None
        arguments = (run, stage, before, after, barrier, complete, results)
        processes.append(context.Process(target=_run_stage, args=arguments, daemon=True))
    for process in processes:
        process.start()
    for process in processes:
        process.join(_LIMIT_S)
        assert process.exitcode == 0, f"a stage ended with {process.exitcode}"
    by_stage = dict(results.get() for _ in processes)
    return [by_stage[stage] for stage in range(run.num_stages)]


def _run_stage(
    run: PipelineRun,
    stage: int,
    before: Connection | None,
    after: Connection | None,
    barrier: Any,
    complete: Any,
    results: Any,
) -> None:
    simulated.install(run.folder)
    node = simulated.open_node(run.folder)
    emulator = simulated.WorkEmulator(node, stage)
    device = device_by_uuid(node.gpus[stage].identity.uuid)
    order = one_f_one_b(run.num_stages, run.num_microbatches).stages[stage]
    supported = device.supported_clocks_mhz()
    sweep = Sweep(stage, supported, run.clocks_mhz or sweep_clocks(supported, 8), run.iterations_of_step)
    held_mhz, num_needed, seen_s = None, 0, time.monotonic()
    with EnergySampler(device, run.sampling_period_s, threads=OwnThreads()) as sampler:
        for number in range(run.num_iterations):
            barrier.wait(_LIMIT_S)
            if all(complete):
                break
            asked_mhz = sweep.clock_at(number)
            if asked_mhz != held_mhz:
                device.lock_clock(asked_mhz)
                held_mhz = asked_mhz
            begin_s = time.monotonic()
            spans = tuple(_execute(run, emulator, i, before, after) for i in order)
            barrier.wait(_LIMIT_S)
            time.sleep(run.outside_s)
            iteration = Iteration(number, begin_s, time.monotonic(), spans)
            now_s = time.monotonic()
            sweep.add_iteration(iteration, held_mhz, sampler.between(seen_s, now_s))
            seen_s = now_s
            num_needed += not complete[stage]
            complete[stage] = sweep.is_complete
    device.reset_clock()
    results.put((stage, StageResult(sweep.measurements(), num_needed, sweep.notes)))


def _execute(
    run: PipelineRun,
    emulator: simulated.WorkEmulator,
    instruction: Instruction,
    before: Connection | None,
    after: Connection | None,
) -> Span:
    is_forward = instruction.kind is Kind.FORWARD
    source, target = (before, after) if is_forward else (after, before)
    if source is not None:
        assert source.poll(_LIMIT_S), "the neighbour has stopped"
        source.recv()
    begin_s = time.monotonic()
    executed = emulator.work(instruction.kind)
    end_s = time.monotonic()
    if run.times_of_gpu:
        begin_s, end_s = executed.start_s, executed.end_s
    if target is not None:
        target.send(None)
    return Span(ChunkKind(instruction.chunk, instruction.kind), begin_s, end_s)
