"""DualPipeV (DeepSpeed 0.19.8 and newer), whose second chunks lead back up the pipeline."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

from deepspeed.runtime.pipe.schedule import DualPipeVSchedule

from perseus_core.planning.baselines import all_max
from perseus_core.planning.execution import execute
from perseus_core.planning.plan import make_plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.solver import solve
from perseus_ds.extraction import schedule_factory
from tests.deepspeed.conftest import MakeNode, executed_iterations, on
from tests.deepspeed.launcher import launch
from tests.deepspeed.scenarios import QUICK, batch_config


def test_plan_knows_what_its_transfers_hold_up(own_profile: Profile) -> None:
    """A plan that knows of the data only would be some percent slower than it says."""
    schedule = schedule_factory(DualPipeVSchedule(8, 4, 0))(8)
    profile = own_profile.divided_into_chunks(2)
    problem = PipelineProblem.of(profile, schedule, 83.5)
    plan = make_plan(solve(problem))
    assert plan.slowdown <= 0
    assert plan.saving > 0.1
    assert plan.gap < 0.01
    ignorant = make_plan(solve(PipelineProblem.of(profile, replace(schedule, waits=()), 83.5)))
    really = execute(problem, [clock for order in ignorant.clocks_mhz for clock in order])
    assert really.iteration_time_s > 1.03 * all_max(problem).iteration_time_s


def test_job_saves_energy(make_node: MakeNode, own_profile: Profile, tmp_path: Path) -> None:
    """Real DeepSpeed on four simulated GPUs: profiled chunk by chunk, planned, and less energy used under the plan.

    Read from the GPUs' own log: on a busy machine processes come late, and their GPUs wait longer.
    """
    own_profile.divided_into_chunks(2).save(tmp_path / "chunks.csv")
    node = make_node(0.15, profile=tmp_path / "chunks.csv", clock_latency_s=0.001, energy_counter_period_s=0.01)
    job = launch(
        "train_under_a_plan",
        4,
        tmp_path / "job",
        environment=on(node),
        config={**batch_config(8), "perseus": {**QUICK, "profile_clocks": 3}},
        stages=4,
        under_plan=8,
        dualpipev=True,
    )
    ranks = job.results_of_all()
    assert all(rank["status"]["plan"] >= 1 for rank in ranks), job.output
    assert ranks[0]["status"]["promised_saving"] > 0.05
    executed = executed_iterations(node, ranks)

    def energy_j(phase: str) -> float:
        wanted = [i for i in range(len(executed[0])) if all(rank["phases"][i] == phase for rank in ranks)]
        return statistics.median(sum(e.energy_j for of_rank in executed for e in of_rank[i]) for i in wanted)

    assert energy_j("run") < 0.95 * energy_j("warm up")
