"""Plans: what they promise, and the file they live in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from perseus_core.errors import InputError
from perseus_core.planning.baselines import all_max
from perseus_core.planning.execution import execute
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.plan import Granularity, Plan, make_plan
from perseus_core.planning.policy import Policy, fastest, max_slowdown, no_slowdown, straggler
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import Placement, interleaved
from perseus_core.planning.solver import solve
from perseus_core.planning.switching import Switching
from tests.planning.fused import fused_with_expert_overlap

AnyFrontier = Frontier[PipelineProblem]


@pytest.mark.parametrize("policy", [no_slowdown, fastest, max_slowdown(0.1), straggler(1.5)])
def test_a_plan_keeps_promise_and_bound(problem: PipelineProblem, frontier: AnyFrontier, policy: Policy) -> None:
    """Time and energy are those of running its clocks, in time, and not below what is proved possible."""
    baseline = all_max(problem)
    plan = make_plan(frontier, policy)
    ran = execute(problem, [clock for order in plan.clocks_mhz for clock in order])
    assert plan.iteration_time_s == pytest.approx(ran.iteration_time_s)
    assert plan.energy_j == pytest.approx(ran.energy_j)
    assert plan.iteration_time_s <= policy(frontier, baseline.iteration_time_s) * (1 + 1e-12)
    assert plan.bound_energy_j <= plan.energy_j < baseline.energy_j
    assert plan.gap < 0.01
    assert plan.saving == pytest.approx(1 - plan.energy_j / baseline.energy_j)


def test_the_default_is_no_slowdown(problem: PipelineProblem, frontier: AnyFrontier) -> None:
    """It saves energy and takes no longer than all clocks at maximum."""
    plan = make_plan(frontier)
    assert plan.slowdown <= 0
    assert plan.saving > 0.05
    assert len(plan.instructions) == problem.dag.num_instructions


@pytest.mark.parametrize("num_microbatches", [4, 8])
def test_fused_instructions_are_planned(own_profile: Profile, num_microbatches: int) -> None:
    """From a profile of what each stage runs to a plan that saves; of four microbatches the first stage fuses none."""
    schedule, passes = fused_with_expert_overlap(interleaved(4, num_microbatches, 2))
    of_chunks = own_profile.divided_into_chunks(2)
    measurements = []
    for instruction in {i.type: i for i in schedule.instructions}.values():
        for at_same_clock in zip(*(of_chunks.of(each.type) for each in passes[instruction]), strict=True):
            time_s, energy_j = sum(m.time_s for m in at_same_clock), sum(m.energy_j for m in at_same_clock)
            measurements.append(replace(at_same_clock[0], type=instruction.type, time_s=time_s, energy_j=energy_j))
    profile = Profile(tuple(measurements))
    plan = make_plan(solve(PipelineProblem.of(profile, schedule, 83.5)))
    assert plan.slowdown <= 0
    assert plan.saving > 0.05
    assert plan.gap < 0.01


def test_more_time_never_costs_more(frontier: AnyFrontier) -> None:
    """Savings grow with the slowdown allowed."""
    savings = [make_plan(frontier, max_slowdown(slowdown)).saving for slowdown in (0.0, 0.02, 0.05, 0.1, 0.2)]
    assert savings == sorted(savings)


def test_a_file_gives_back_the_plan(tmp_path: Path, frontier: AnyFrontier) -> None:
    """Everything survives a round trip."""
    plan = make_plan(frontier, switching=Switching(0.01, 0.02, 0.001, max_changes_per_s=10.0))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("most_per_iteration", "granularity"),
    [(0, Granularity.STAGE), (3, Granularity.PHASE), (None, Granularity.INSTRUCTION)],
)
def test_a_plan_says_how_finely_it_changes_clocks(
    frontier: AnyFrontier, most_per_iteration: int | None, granularity: Granularity
) -> None:
    """And what finer changes would save besides, if clocks changed at once."""
    policy = max_slowdown(0.05)
    limit_s = policy(frontier, all_max(frontier.problem).iteration_time_s)
    rate = None if most_per_iteration is None else most_per_iteration / limit_s
    plan = make_plan(frontier, policy, switching=Switching(0.001, 0.001, max_changes_per_s=rate))
    assert plan.granularity is granularity
    assert plan.saving + plan.lost_to_switching == pytest.approx(make_plan(frontier, policy).saving, abs=2e-3)
    assert (plan.lost_to_switching > 0.002) == (most_per_iteration is not None)


def test_a_file_gives_back_how_the_chunks_lie(tmp_path: Path, frontier: AnyFrontier) -> None:
    """A plan for chunks in a V does not come back as one for a loop."""
    plan = make_plan(frontier)
    in_a_v = replace(plan, schedule=replace(plan.schedule, placement=Placement.V))
    in_a_v.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == in_a_v != plan


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("energy_j", 0, "energy_j 0"),
        ("energy_j", "12", '"energy_j" is "12"'),
        ("version", 99, '"version" is 99'),
        ("columns", [], '"columns"'),
        ("switching", {"up_s": -1, "down_s": 0, "jitter_s": 0, "max_changes_per_s": None}, "up_s -1"),
        ("stages", [[["forward", 0, 0, 1410, 0.0, 0.1, 1.0]] * 2], "twice"),
        ("stages", [[["forward", 0, 0, 1410, 0.0, float("inf"), 1.0]]], "stage 0"),
        ("stages", [[["sideways", 0, 0, 1410, 0.0, 0.1, 1.0]]], '"sideways"'),
        ("stages", [[["forward", 0, 0, -5, 0.0, 0.1, 1.0]]], "negative"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, frontier: AnyFrontier, field: str, value: object, words: str) -> None:
    """In one sentence with the file's name."""
    path = tmp_path / "plan.json"
    make_plan(frontier).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(InputError) as refused:
        Plan.load(path)
    assert "plan.json" in str(refused.value)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_plan_of_another_schedule_is_refused(frontier: AnyFrontier) -> None:
    """Its stages must hold the schedule's instructions in order."""
    plan = make_plan(frontier)
    with pytest.raises(InputError, match="in their order"):
        replace(plan, stages=plan.stages[::-1])
