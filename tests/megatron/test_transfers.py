"""Who waits for whom in Megatron: the programs against a simulation of them, and the waits against real jobs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from perseus_core.gpu.simulated.execution_log import read_executed
from perseus_core.planning.dag import ComputationDag
from perseus_core.planning.schedule import Instruction, Schedule, interleaved, one_f_one_b
from perseus_core.planning.transfers import StageProgram, waits
from perseus_megatron.transfers import programs_of
from tests.megatron.gpus import environment, simulated_gpus
from tests.megatron.launcher import launch, skip_unless_megatron_overlaps_experts
from tests.planning.fused import fused_with_expert_overlap

SCHEDULES = [
    *(one_f_one_b(*sizes) for sizes in ((1, 3), (4, 2), (4, 8), (3, 7))),
    *(interleaved(*sizes) for sizes in ((4, 4, 2), (4, 8, 2, 8), (4, 10, 2, 5), (2, 6, 3, 3), (3, 7, 2, 4))),
    *(fused_with_expert_overlap(interleaved(*sizes))[0] for sizes in ((4, 4, 2), (2, 6, 3, 3), (3, 7, 2, 4))),
]


def named(schedule: Schedule) -> str:
    return f"{schedule.name} {schedule.num_stages} {schedule.num_microbatches} {schedule.num_chunks}"


def start_times_s(programs: list[StageProgram], duration_s: dict[Instruction, float]) -> dict[Instruction, float]:
    """Executes the stages side by side: each goes on as far as it can, again and again."""
    now_s = [0.0] * len(programs)
    next_step = [0] * len(programs)
    begun: dict[Instruction, list[float]] = {}
    starts: dict[Instruction, float] = {}
    while any(n < len(p._steps) for n, p in zip(next_step, programs, strict=True)):
        before = list(next_step)
        for stage, program in enumerate(programs):
            while next_step[stage] < len(program._steps):
                does, i = program._steps[next_step[stage]]
                if does.value == "run":
                    starts[i] = now_s[stage]
                    now_s[stage] += duration_s[i]
                elif does.value == "begin":
                    begun.setdefault(i, []).append(now_s[stage])
                elif len(begun[i]) < 2:
                    break
                else:
                    now_s[stage] = max(now_s[stage], *begun[i])
                next_step[stage] += 1
        assert next_step != before, "the stages wait for each other"
    return starts


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_the_dag_starts_instructions_when_the_programs_do(schedule: Schedule, overlaps: bool) -> None:
    """Order within the stages, data and waits together explain every start; and the order is the schedule's."""
    programs = programs_of(schedule, overlaps_steady_state=overlaps)
    orders = tuple(tuple(i for does, i in program._steps if does.value == "run") for program in programs)
    assert orders == schedule.stages
    rng = np.random.default_rng(len(schedule.instructions))
    durations_s = rng.uniform(0.5, 2, len(schedule.instructions))
    simulated_s = start_times_s(programs, dict(zip(schedule.instructions, durations_s, strict=True)))
    dag = ComputationDag.of(dataclasses.replace(schedule, waits=waits(programs)))
    expected_s = [simulated_s[i] for i in schedule.instructions]
    np.testing.assert_allclose(dag.start_times_s(durations_s), expected_s, atol=1e-9)


def test_waiting_lengthens_interleaved_iterations() -> None:
    """Else there would be no need to know of it."""
    schedule = interleaved(4, 8, 2)
    durations_s = np.random.default_rng(1).uniform(0.5, 2, len(schedule.instructions))
    times_s = [
        ComputationDag.of(dataclasses.replace(schedule, waits=w)).iteration_time_s(durations_s)
        for w in (
            (),
            waits(programs_of(schedule, overlaps_steady_state=True)),
            waits(programs_of(schedule, overlaps_steady_state=False)),
        )
    ]
    assert times_s[0] < times_s[1] < times_s[2]


ITERATIONS = 6
REAL_JOBS = {
    "1f1b": ({"stages": 4}, one_f_one_b(4, 8)),
    "interleaved": ({"stages": 4, "chunks": 2}, interleaved(4, 4, 2)),
    "fused": (
        {"stages": 2, "chunks": 2, "expert_parallel": 2},
        fused_with_expert_overlap(interleaved(2, 4, 2))[0],
    ),
}


@pytest.mark.parametrize("job", REAL_JOBS)
def test_real_jobs_wait_so(job: str, tmp_path: Path) -> None:
    """In no iteration of a real job does an instruction begin before what it is said to wait for has ended."""
    if job == "fused":
        skip_unless_megatron_overlaps_experts()
    sizes, schedule = REAL_JOBS[job]
    stages, chunks = schedule.num_stages, schedule.num_chunks
    with simulated_gpus(chunks=chunks, time_scale=0.1) as node:
        launch(
            "train",
            4,
            tmp_path,
            environment=environment(node),
            sizes=sizes,
            microbatches=schedule.num_microbatches,
            iterations=ITERATIONS,
            settings={"enabled": False},
        ).results_of_all()
        executed = read_executed(node.folder)
    found = waits(programs_of(schedule, overlaps_steady_state=True))
    # GPUs that share experts are neighbours; the first of each stage tells.
    by_stage = [[e for e in executed if e.gpu == stage * 4 // stages] for stage in range(stages)]
    for number in range(ITERATIONS):
        ran = {
            i: by_stage[stage][number * len(order) + place]
            for stage, order in enumerate(schedule.stages)
            for place, i in enumerate(order)
        }
        assert all((e.chunk, e.kind, e.label["microbatch"]) == (i.chunk, i.kind, i.microbatch) for i, e in ran.items())
        early = [(before, after) for before, after in found if ran[after].start_s < ran[before].end_s]
        assert not early
