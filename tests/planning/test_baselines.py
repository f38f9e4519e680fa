"""Baselines: measured by the same table, and near what was published of them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.planning.baselines import all_max, envpipe, zeus_global, zeus_per_stage
from perseus_core.planning.execution import execute
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.plan import make_plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind, one_f_one_b
from perseus_core.planning.solver import solve
from tests.conftest import BLOCKING_POWER_W


def published_problem(folder: Path, name: str, num_microbatches: int) -> PipelineProblem:
    profile = Profile.load(folder / "stage_profile" / f"{name}_bf16.csv")
    return PipelineProblem.of(profile, one_f_one_b(8, num_microbatches), BLOCKING_POWER_W[name])


@pytest.mark.parametrize(
    ("name", "model", "device"), [("gpt3-175b+a100_sxm", "gpt3-175b", "a100_sxm"), ("bloom+a40", "bloom", "a40")]
)
@pytest.mark.parametrize("num_microbatches", [12, 24, 48, 96])
def test_envpipe_is_as_published(published: Path, name: str, model: str, device: str, num_microbatches: int) -> None:
    """Iteration time equals the paper's EnvPipe result, energy is within 1.5 % of it."""
    with (published / "envpipe_result.csv").open() as file:
        row = next(
            r
            for r in csv.DictReader(file)
            if (r["model"], r["device"], r["num_microbatches"]) == (model, device, str(num_microbatches))
        )
    problem = published_problem(published, name, num_microbatches)
    (point,) = envpipe(problem).points
    assert point.iteration_time_s * 10 == pytest.approx(float(row["iteration_time"]), abs=1e-3)
    assert point.energy_j * 80 == pytest.approx(float(row["energy"]), rel=0.015)


def test_no_baseline_beats_the_frontier(problem: PipelineProblem, frontier: Frontier[PipelineProblem]) -> None:
    """Whatever the others find up to T*, the frontier needs no more energy in that time."""
    for baseline in (zeus_global(problem), zeus_per_stage(problem), envpipe(problem)):
        within = [p for p in baseline.points if p.iteration_time_s <= frontier.min_energy_time_s]
        assert within
        for point in within:
            assert point.energy_j >= frontier.energy_j(point.iteration_time_s) * (1 - 1e-9)


def test_all_max_is_the_fastest_of_the_global_clocks(problem: PipelineProblem) -> None:
    """On a GPU that is not power-capped the highest clock is the fastest."""
    assert all_max(problem).iteration_time_s == zeus_global(problem).points[0].iteration_time_s


def test_energy_is_busy_energy_and_waiting(problem: PipelineProblem) -> None:
    """An execution's energy is the sum of its instructions and blocking power for the rest of every stage's time."""
    execution = execute(problem, np.full(problem.dag.num_instructions, 1200))
    busy_s = execution.durations_s.sum()
    waiting_s = 4 * execution.iteration_time_s - busy_s
    assert execution.energy_j == pytest.approx(execution.energies_j.sum() + 83.5 * waiting_s)


def two_gpu_types(clocks_mhz: tuple[tuple[int, ...], ...] = ((1400, 1200, 1000), (1900, 1400, 1200))) -> Profile:
    """Time as 1 / clock, power as clock^2. The second stage has a newer GPU, more work, and no time to lose."""
    return Profile(
        tuple(
            Measurement(InstructionType(stage, 0, kind), clock, seconds, seconds * clock**2 / 6000)
            for stage, (clocks, work) in enumerate(zip(clocks_mhz, (140.0, 380.0), strict=True))
            for kind, share in ((Kind.FORWARD, 1), (Kind.BACKWARD, 2))
            for clock in clocks
            for seconds in (share * work / clock,)
        )
    )


def test_stages_of_different_gpus_have_each_their_own_highest_clock() -> None:
    """The highest common clock is nobody's baseline: 0 % slower than it would be 30 % slower than the job."""
    problem = PipelineProblem.of(two_gpu_types(), one_f_one_b(2, 8), 50.0)
    baseline = all_max(problem)
    assert [set(baseline.clocks_mhz[problem.stage_of == stage].tolist()) for stage in (0, 1)] == [{1400}, {1900}]
    plan = make_plan(solve(problem))
    assert plan.iteration_time_s <= baseline.iteration_time_s * (1 + 1e-9)
    assert plan.saving > 0.05
    assert set(plan.clocks_mhz[1]) == {1900}
    assert zeus_global(problem).within(baseline.iteration_time_s) is None


def test_stages_without_a_common_clock_are_planned_for() -> None:
    """Only one clock for all is not to be had."""
    problem = PipelineProblem.of(two_gpu_types(((1400, 1000), (1900, 1300))), one_f_one_b(2, 8), 50.0)
    assert zeus_global(problem).points == ()
    assert zeus_per_stage(problem).points
    assert make_plan(solve(problem)).saving > 0.05


def test_a_hole_at_the_top_is_named_or_filled() -> None:
    """What an instruction was not measured at is what it runs at without a plan."""
    whole = two_gpu_types()
    missing = InstructionType(1, 0, Kind.BACKWARD)
    profile = Profile(tuple(m for m in whole.measurements if (m.type, m.clock_mhz) != (missing, 1900)))
    assert profile.missing_at_top() == ((missing, 1900),)
    with pytest.raises(InputError, match=r"backward of stage 1 was not measured at 1900 MHz.*--fill-top"):
        all_max(PipelineProblem.of(profile, one_f_one_b(2, 8), 50.0))
    filled = profile.with_filled_top()
    assert filled.missing_at_top() == ()
    assert filled.of(missing)[0].time_s == pytest.approx(whole.of(missing)[0].time_s)
    assert filled.of(missing)[0].energy_j == pytest.approx(whole.of(missing)[0].energy_j)
    alone = Profile(tuple(m for m in profile.measurements if (m.type.kind, m.clock_mhz) != (Kind.FORWARD, 1400)))
    with pytest.raises(InputError, match="cannot be estimated"):
        alone.with_filled_top()
