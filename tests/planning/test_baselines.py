"""Baselines: measured by the same table, and near what was published of them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from perseus_core.planning.baselines import all_max, envpipe, zeus_global, zeus_per_stage
from perseus_core.planning.execution import execute
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import one_f_one_b
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
