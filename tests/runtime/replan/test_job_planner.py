"""What the planner makes of measurements, of what is seen under a plan, and of a saved state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from perseus_core.errors import InputError
from perseus_core.planning.baselines import all_max
from perseus_core.planning.execution import execute
from perseus_core.planning.frontier_file import load_frontier
from perseus_core.planning.policy import iteration_time, max_slowdown, no_slowdown
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import InstructionType, Kind, Placement, Waits, gpipe, interleaved, one_f_one_b
from perseus_core.planning.switching import Switching
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.measure.stage_gpu import StageGpu, kind_of
from perseus_core.runtime.measure.stretch import Stretch
from perseus_core.runtime.ranks.order import Baseline
from perseus_core.runtime.replan.correction import Stretches
from perseus_core.runtime.replan.job_planner import JobPlanner, MeasuredJob
from perseus_core.runtime.replan.plan_message import PlanMessage
from perseus_core.runtime.replan.state_file import load_state, save_state

LATENCY_S, OUTSIDE_S, BLOCKING_W = 0.004, 0.05, 83.5
MICROBATCHES = 8


A100 = kind_of("A100", 400.0)


def clocks_mhz(profile: Profile) -> tuple[int, ...]:
    return tuple(sorted({m.clock_mhz for m in profile.measurements}, reverse=True))


def truth(profile: Profile, num_microbatches: int = MICROBATCHES) -> PipelineProblem:
    """The job as it really is: time passes between instructions, and outside the pipeline."""
    return PipelineProblem.of(
        profile,
        one_f_one_b(4, num_microbatches),
        BLOCKING_W,
        transfer_latency_s=LATENCY_S,
        gap_s=LATENCY_S,
        outside_time_s=OUTSIDE_S,
    )


def measured(profile: Profile) -> MeasuredJob:
    """What its ranks would measure."""
    unlocked = all_max(truth(profile))
    baseline = Baseline(MICROBATCHES, unlocked.iteration_time_s, unlocked.energy_j)
    gpus = (StageGpu(A100, clocks_mhz(profile)),) * 4
    return MeasuredJob(profile, (BLOCKING_W,) * 4, baseline, unlocked.iteration_time_s - OUTSIDE_S, gpus)


@pytest.fixture
def planner(own_profile: Profile) -> JobPlanner:
    """One that has taken the job's measurements."""
    made = JobPlanner(lambda microbatches: one_f_one_b(4, microbatches), no_slowdown)
    made.take_measurements(measured(own_profile))
    return made


def test_time_between_instructions_is_known(own_profile: Profile, planner: JobPlanner) -> None:
    """It is slack where few instructions follow each other; taken for a constant outside it would not be used."""
    plan = planner.plan()
    assert plan.summary.baseline_time_s == pytest.approx(measured(own_profile).baseline.time_s, rel=1e-6)
    clocks = [planned.clock_mhz for stage in plan.stages for planned in stage.clocks]
    really = execute(truth(own_profile), clocks)
    assert really.iteration_time_s == pytest.approx(plan.summary.promised_time_s, rel=1e-4)
    assert really.energy_j == pytest.approx(plan.summary.promised_energy_j, rel=1e-3)
    ignorant = JobPlanner(planner.schedule, no_slowdown)
    ignorant.take_measurements(dataclasses.replace(measured(own_profile), pipeline_time_s=0.0))
    assert plan.summary.saving > ignorant.plan().summary.saving


@pytest.mark.parametrize("factor", [0.95, 0.98, 1.0, 1.02, 1.05])
def test_the_limit_is_what_was_measured_however_wrong_the_sweep_was(own_profile: Profile, factor: float) -> None:
    """Instructions that were profiled too long or too short move neither the baseline nor the promise."""
    wrong = Profile(
        tuple(
            dataclasses.replace(m, time_s=factor * m.time_s, energy_j=factor * m.energy_j)
            for m in own_profile.measurements
        )
    )
    planner = JobPlanner(lambda microbatches: one_f_one_b(4, microbatches), no_slowdown)
    job = measured(own_profile)
    planner.take_measurements(dataclasses.replace(job, profile=wrong))
    plan = planner.plan()
    assert plan.summary.baseline_time_s == plan.summary.limit_time_s == job.baseline.time_s
    assert plan.summary.promised_time_s <= job.baseline.time_s * (1 + 1e-9)
    really = execute(truth(own_profile), [planned.clock_mhz for stage in plan.stages for planned in stage.clocks])
    assert really.iteration_time_s == pytest.approx(job.baseline.time_s, rel=0.01)
    assert 1 - really.energy_j / job.baseline.energy_j == pytest.approx(plan.summary.saving, abs=0.01)


def test_another_number_of_microbatches_has_the_same_constants(own_profile: Profile, planner: JobPlanner) -> None:
    """Its unlocked time was never measured."""
    unlocked_s = all_max(truth(own_profile, 12)).iteration_time_s
    assert planner.plan(12).summary.baseline_time_s == pytest.approx(unlocked_s, rel=2e-3)


def test_a_slower_instruction_is_planned_for(planner: JobPlanner) -> None:
    """What stage 1 was seen to take becomes its profile."""
    before = planner.plan()
    planner.correct(
        stretched(before, 1.04, stages=(1,)), before.summary.promised_time_s * 1.02, before.summary.baseline_time_s
    )
    after = planner.plan()
    assert after.summary.number == before.summary.number + 1

    def mean_mhz(plan: PlanMessage) -> float:
        return sum(planned.clock_mhz for planned in plan.stages[1].clocks) / len(plan.stages[1].clocks)

    assert mean_mhz(after) > mean_mhz(before)
    planner.forget_corrections()
    assert planner.plan().stages == before.stages


def stretched(plan: PlanMessage, factor: float, *, stages: Sequence[int] = range(4)) -> Stretches:
    """What the ranks see when every instruction takes longer than planned."""
    seen = [
        Stretch(InstructionType(stage, 0, kind), planned.clock_mhz, factor, 8)
        for stage in stages
        for (_, _, kind), planned in zip(plan.stages[stage].steps, plan.stages[stage].clocks, strict=True)
    ]
    return {(stretch.type, stretch.clock_mhz): stretch for stretch in seen}


def test_a_corrected_plan_is_compared_with_the_job_as_it_was(own_profile: Profile, planner: JobPlanner) -> None:
    """Under plans all instructions take 1 % longer for the same energy; the next plan promises what it really keeps."""
    before = planner.plan()
    pipeline_s = before.summary.promised_time_s - OUTSIDE_S
    planner.correct(
        stretched(before, 1.01), before.summary.promised_time_s + 0.01 * pipeline_s, before.summary.baseline_time_s
    )
    after = planner.plan()
    assert (after.summary.baseline_time_s, after.summary.baseline_energy_j) == (
        before.summary.baseline_time_s,
        before.summary.baseline_energy_j,
    )
    assert after.summary.promised_time_s > after.summary.limit_time_s == before.summary.limit_time_s
    slower = Profile(tuple(dataclasses.replace(m, time_s=1.01 * m.time_s) for m in own_profile.measurements))
    really = execute(truth(slower), [planned.clock_mhz for stage in after.stages for planned in stage.clocks])
    assert after.summary.promised_energy_j == pytest.approx(really.energy_j, rel=2e-3)
    assert after.summary.promised_time_s == pytest.approx(really.iteration_time_s, rel=2e-3)
    assert after.summary.saving < before.summary.saving


def test_a_job_that_became_slower_by_itself_is_planned_as_it_is_now(own_profile: Profile, planner: JobPlanner) -> None:
    """Time that was added outside the pipeline costs no saving."""
    job = measured(own_profile)
    allowed_s = 1.05 * job.baseline.time_s
    planner.policy = iteration_time(allowed_s)
    before = planner.plan()
    planner.policy = iteration_time(allowed_s + 0.1)
    slower = dataclasses.replace(job.baseline, time_s=job.baseline.time_s + 0.1)
    planner.take_baseline(slower, job.pipeline_time_s)
    after = planner.plan()
    assert after.stages == before.stages
    assert after.summary.baseline_time_s == pytest.approx(slower.time_s)


def test_time_that_instructions_explain_becomes_no_margin(planner: JobPlanner) -> None:
    """It is in the profile already, and taken off twice it would cost twice."""
    planner.policy = max_slowdown(0.1)
    before = planner.plan()
    pipeline_s = before.summary.promised_time_s - OUTSIDE_S
    planner.correct(
        stretched(before, 1.02), before.summary.promised_time_s + 0.02 * pipeline_s, before.summary.baseline_time_s
    )
    assert planner.plan().summary.promised_time_s == pytest.approx(before.summary.promised_time_s, rel=3e-3)


def test_after_a_late_plan_clocks_rise_sooner_and_fall_later(own_profile: Profile) -> None:
    """Threads that ask for them come late on a busy machine; what is forgotten with the corrections."""
    planner = JobPlanner(
        lambda microbatches: one_f_one_b(4, microbatches),
        no_slowdown,
        switching=Switching(0.015, 0.015, 0.001, 10.0),
    )
    planner.take_measurements(measured(own_profile))
    jitters_s = [planner.plan().summary.jitter_s]
    for _ in range(4):
        late = planner.plan().summary
        planner.correct({}, late.promised_time_s + 0.01, late.baseline_time_s)
        jitters_s.append(planner.plan().summary.jitter_s)
    assert jitters_s == pytest.approx([0.001, 0.003, 0.009, 0.02, 0.02])
    planner.forget_corrections()
    assert planner.plan().summary.switching == Switching(0.015, 0.015, 0.001)


def test_a_late_plan_is_no_reason_to_go_slower_anywhere(planner: JobPlanner) -> None:
    """Instructions that were faster than planned are not given more time."""
    planner.policy = max_slowdown(0.1)
    before = planner.plan()
    planner.correct(stretched(before, 0.9), before.summary.promised_time_s, before.summary.baseline_time_s)
    assert planner.plan().stages == before.stages


def test_time_that_nothing_explains_becomes_a_margin(planner: JobPlanner) -> None:
    """The next plan is faster by as much, where the frontier has such a point."""
    planner.policy = max_slowdown(0.1)
    before = planner.plan()
    planner.correct({}, before.summary.promised_time_s + 0.03, before.summary.baseline_time_s)
    assert planner.plan().summary.promised_time_s == pytest.approx(before.summary.promised_time_s - 0.03, abs=0.002)


def test_what_takes_longer_without_the_plan_too_is_no_lateness(planner: JobPlanner) -> None:
    """Loading data has become slower by 0.1 s: the next plan is the same."""
    planner.policy = max_slowdown(0.1)
    job, before = planner.job, planner.plan()
    assert job is not None
    slower = dataclasses.replace(job.baseline, time_s=job.baseline.time_s + 0.1)
    planner.correct({}, before.summary.promised_time_s + 0.1, slower.time_s)
    planner.take_baseline(slower, job.pipeline_time_s)
    after = planner.plan()
    assert after.summary.limit_time_s == pytest.approx(before.summary.limit_time_s + 1.1 * 0.1)
    assert after.summary.promised_time_s == pytest.approx(before.summary.promised_time_s + 1.1 * 0.1, abs=0.01)


def test_a_traced_order_counts_for_more_than_what_was_said(own_profile: Profile, planner: JobPlanner) -> None:
    """And only for the number of microbatches that was traced."""
    traced = [[(i.chunk, i.microbatch, i.kind) for i in order] for order in gpipe(4, MICROBATCHES).stages]
    planner.take_measurements(measured(own_profile), traced)
    assert list(planner.plan().stages[1].steps) == traced[1]
    with pytest.raises(InputError, match="was not traced"):
        planner.plan(12)


def test_a_traced_order_lies_over_the_stages_as_was_said(own_profile: Profile, tmp_path: Path) -> None:
    """What was traced does not tell which way a chunk leads; a saved state keeps it."""
    in_a_v = dataclasses.replace(interleaved(4, MICROBATCHES, 2), placement=Placement.V)
    traced = [
        [(chunk, microbatch, Kind.FORWARD) for chunk in (0, 1) for microbatch in range(MICROBATCHES)]
        + [(chunk, microbatch, Kind.BACKWARD) for chunk in (1, 0) for microbatch in range(MICROBATCHES)]
        for _ in range(4)
    ]
    profile = own_profile.divided_into_chunks(2)
    planner = JobPlanner(lambda _: in_a_v, no_slowdown)
    planner.take_measurements(dataclasses.replace(measured(own_profile), profile=profile), traced)
    key = ProfileKey("model", in_a_v.name, 4, 2, 1, 1, 1, "GPU", 400.0)
    save_state(tmp_path / "session.json", key, planner.state(planner.plan()))
    state = load_state(tmp_path / "session.json", key)
    assert state is not None
    assert state.traced is not None
    assert state.traced.placement is Placement.V


@pytest.mark.parametrize("waits", [(), "some"])
def test_a_saved_state_goes_on(own_profile: Profile, tmp_path: Path, waits: Waits | str) -> None:
    """With the same plan, and the same plans after it."""
    schedule = interleaved(4, MICROBATCHES, 2)
    if waits:
        schedule = dataclasses.replace(schedule, waits=((schedule.stages[0][3], schedule.stages[1][5]),))
    profile = own_profile.divided_into_chunks(2)
    job = dataclasses.replace(measured(own_profile), profile=profile)
    key = ProfileKey("model", schedule.name, 4, 2, 1, 1, 1, "GPU", 400.0)

    def new_planner() -> JobPlanner:
        return JobPlanner(lambda _: schedule, no_slowdown)

    planner, restored = new_planner(), new_planner()
    planner.take_measurements(job)
    plan = planner.plan()
    save_state(tmp_path / "session.json", key, planner.state(plan))
    state = load_state(tmp_path / "session.json", key)
    assert state is not None
    assert state.plan.stages == plan.stages
    restored.restore(state)
    planner.policy = restored.policy = max_slowdown(0.05)
    again, expected = restored.plan(), planner.plan()
    assert again.stages == expected.stages
    assert again.summary.promised_time_s == pytest.approx(expected.summary.promised_time_s)


def test_a_schedule_with_waits_is_planned_and_kept(own_profile: Profile, tmp_path: Path) -> None:
    """The frontier that is written for other tools holds them."""
    schedule = one_f_one_b(4, MICROBATCHES)
    held_up = dataclasses.replace(schedule, waits=((schedule.stages[1][2], schedule.stages[0][5]),))
    frontier_file = str(tmp_path / "frontier.json")
    planner = JobPlanner(lambda _: held_up, no_slowdown, frontier_file=frontier_file)
    planner.take_measurements(measured(own_profile))
    planner.plan()
    problem = load_frontier(tmp_path / "frontier.json").problem
    assert problem.schedule == held_up
    assert problem.gap_s == problem.transfer_latency_s > 0
