"""Rank 0's planner beside training: tasks from several threads, plans in the order of their numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest

from perseus_core.errors import InputError
from perseus_core.planning.policy import max_slowdown, no_slowdown
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import InstructionType, Kind, Schedule, one_f_one_b
from perseus_core.runtime.job import Job
from perseus_core.runtime.measure.energy import ChunkKind, PowerEstimate
from perseus_core.runtime.measure.profile_cache import ProfileCache, ProfileKey
from perseus_core.runtime.measure.stage_gpu import kind_of
from perseus_core.runtime.measure.stage_measurements import (
    ClockMeasurements,
    InstructionMeasurement,
    JobMeasurements,
    StageMeasurements,
)
from perseus_core.runtime.ranks.order import Baseline, Reason
from perseus_core.runtime.replan.background_planner import BackgroundPlanner
from perseus_core.runtime.replan.job_planner import JobPlanner
from perseus_core.runtime.replan.plan_message import PlanMessage
from perseus_core.runtime.replan.rank_report import JobReport, RankReport
from perseus_core.runtime.side_threads import OwnThreads, SideThread, Step

from .test_job_planner import A100, MICROBATCHES, clocks_mhz, measured

T = TypeVar("T")


class Later:
    """Side threads whose tasks run when the test says so."""

    def __init__(self) -> None:
        self.tasks: list[Callable[[], None]] = []

    def run(self, task: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(task())
            except Exception as error:
                future.set_exception(error)

        self.tasks.append(work)
        return future

    def work(self) -> None:
        while self.tasks:
            self.tasks.pop(0)()

    def now_s(self) -> float:
        return 0.0

    def start(self, name: str, step: Step) -> SideThread:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing runs."""


def schedule(num_microbatches: int) -> Schedule:
    if num_microbatches % 4:
        raise InputError(f"{num_microbatches} microbatches are no multiple of 4")
    return one_f_one_b(4, num_microbatches)


@pytest.fixture
def job() -> Job:
    key = ProfileKey("model", "1f1b", 4, 1, 1, 1, 1, "GPU", 400.0)
    return Job(0, 4, 1, 0, 4, 0, schedule, key)


@pytest.fixture
def planner(own_profile: Profile) -> JobPlanner:
    return JobPlanner(schedule, no_slowdown, now_s=lambda: 0.0)


@pytest.fixture
def baseline(own_profile: Profile) -> Baseline:
    return measured(own_profile).baseline


@pytest.fixture
def reports(own_profile: Profile) -> list[bytes]:
    """What four ranks have measured: the project's own profile."""

    def of_stage(stage: int) -> StageMeasurements:
        return StageMeasurements(
            stage,
            tuple(
                ClockMeasurements(
                    clock_mhz,
                    tuple(
                        InstructionMeasurement(
                            ChunkKind(0, kind), m.time_s, 0.0, 16, PowerEstimate(m.energy_j / m.time_s, 1.0, 1.0)
                        )
                        for kind in (Kind.FORWARD, Kind.BACKWARD)
                        for m in own_profile.of(InstructionType(stage, 0, kind))
                        if m.clock_mhz == clock_mhz
                    ),
                    PowerEstimate(83.5, 1.0, 1.0),
                    PowerEstimate(83.5, 1.0, 1.0),
                    0.05,
                    4,
                )
                for clock_mhz in clocks_mhz(own_profile)[::4]
            ),
        )

    return [RankReport(rank, of_stage(rank), pipeline_time_s=2.2 + 0.1 * rank).encode() for rank in range(4)]


def nothing_seen() -> list[bytes]:
    """What the ranks send where no instruction ran under the plan."""
    return [RankReport(rank, StageMeasurements(rank, ())).encode() for rank in range(4)]


def number(plan: PlanMessage | None) -> int:
    return 0 if plan is None else plan.summary.number


def test_plans_come_one_after_another(
    job: Job, planner: JobPlanner, reports: list[bytes], baseline: Baseline, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a number of microbatches has no plan, the next plan takes its number."""
    threads = Later()
    background = BackgroundPlanner(job, planner, threads)
    background.plan_from([b"".join(reports)], Reason.PROFILED, baseline, 0.0)
    assert background.plan_after(0) is None
    background.plan_for(MICROBATCHES + 1)
    background.plan_for(MICROBATCHES + 4)
    background.plan_from(nothing_seen(), Reason.SLOWER, baseline, 1.1 * baseline.time_s)
    threads.work()
    plans = [background.plan_after(0), background.plan_after(1), background.plan_after(2)]
    assert [number(plan) for plan in plans] == [1, 2, 3]
    assert [plan.summary.num_microbatches for plan in plans if plan] == [MICROBATCHES, MICROBATCHES + 4, MICROBATCHES]
    assert background.plan_after(3) is None
    assert "no plan for 9 microbatches" in caplog.text


def test_a_policy_before_the_first_measurements_makes_no_plan(
    job: Job, planner: JobPlanner, reports: list[bytes], baseline: Baseline
) -> None:
    """The first plan follows it already; a slower pipeline elsewhere is the reason for a second one."""
    threads = Later()
    background = BackgroundPlanner(job, planner, threads)
    background.change_policy(max_slowdown(0.1), None)
    background.plan_from(reports, Reason.PROFILED, baseline, 0.0)
    background.change_policy(None, 1.3)
    threads.work()
    first, second = background.plan_after(0), background.plan_after(1)
    assert first is not None
    assert second is not None
    assert first.summary.limit_time_s == pytest.approx(1.1 * baseline.time_s)
    assert second.summary.limit_time_s == pytest.approx(1.3 * baseline.time_s)


def test_any_thread_may_change_the_policy(
    job: Job, planner: JobPlanner, reports: list[bytes], baseline: Baseline
) -> None:
    """While another asks for plans none is lost, and none comes twice."""
    threads = OwnThreads()
    background = BackgroundPlanner(job, planner, threads)
    background.plan_from(reports, Reason.PROFILED, baseline, 0.0)
    training = threading.Thread(
        target=lambda: [background.change_policy(max_slowdown(0.01 * i), None) for i in range(1, 6)]
    )
    training.start()
    newest, waited = 0, threading.Event()
    while newest < 6:
        plan = background.plan_after(newest)
        if plan is None:
            waited.wait(0.001)
        else:
            assert number(plan) == newest + 1
            newest = number(plan)
    training.join()
    threads.close()
    assert background.plan_after(6) is None


def test_a_rank_that_sent_nothing_is_said(
    job: Job, planner: JobPlanner, reports: list[bytes], baseline: Baseline, caplog: pytest.LogCaptureFixture
) -> None:
    """The job goes on with what the others know of its stage; without any of a stage there is no plan."""
    threads = Later()
    background = BackgroundPlanner(job, planner, threads)
    background.plan_from(reports[:3], Reason.PROFILED, baseline, 0.0)
    threads.work()
    assert "3 of 4 ranks" in caplog.text
    with pytest.raises(InputError):
        background.plan_after(0)


def test_what_was_measured_on_other_gpus_is_not_used(
    job: Job, planner: JobPlanner, own_profile: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever stage has another one now: neither a cached profile nor an earlier run's state."""
    planner.take_measurements(measured(own_profile))
    state = planner.state(planner.plan())
    profile = JobMeasurements(own_profile, (), (), 0.0, gpu_kinds=(A100,) * 4)
    background = BackgroundPlanner(
        job, JobPlanner(schedule, no_slowdown), Later(), known_profile=profile, restored=state
    )
    background.take_up((A100, A100, kind_of("H100", 700.0), A100))
    assert (background.known_profile, background.restored, background.plan_after(0)) == (None, None, None)
    assert [record.getMessage() for record in caplog.records] == [
        "profile cache not used, profiling again: it was measured on other GPUs than the stages have",
        "the session's state is not used, starting afresh: its stages had other GPUs",
    ]


def test_an_earlier_run_has_left_plan_number_1(
    job: Job, planner: JobPlanner, own_profile: Profile, baseline: Baseline
) -> None:
    """And the next one is number 2."""
    planner.take_measurements(measured(own_profile))
    planner.plan()
    state = planner.state(planner.plan())
    assert state.plan.summary.number == 2
    threads, restored = Later(), JobPlanner(schedule, no_slowdown)
    background = BackgroundPlanner(job, restored, threads, restored=state)
    background.take_up((A100,) * 4)
    background.plan_from(nothing_seen(), Reason.RECOVERED, baseline, 0.0)
    threads.work()
    first = background.plan_after(0)
    assert first == state.plan.numbered(1)
    assert number(background.plan_after(1)) == 2


def test_a_profile_of_few_clocks_is_used_but_not_kept(
    job: Job,
    planner: JobPlanner,
    reports: list[bytes],
    baseline: Baseline,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when the energy counter fails in the middle of the sweep: in silence it would be believed for ever."""
    num_clocks = len(JobReport.decode(reports).sweeps.clocks) // 4
    for wanted, kept in ((2 * num_clocks, True), (2 * num_clocks + 1, False)):
        caplog.clear()
        threads, cache = Later(), ProfileCache(tmp_path / str(wanted))
        background = BackgroundPlanner(job, planner, threads, cache=cache, profile_clocks=wanted)
        background.plan_from(reports, Reason.PROFILED, baseline, 0.0)
        threads.work()
        assert background.plan_after(planner.num_plans - 1) is not None
        assert (cache.load(job.key) is not None) == kept
        said = [line for line in caplog.messages if f"only {num_clocks} of {wanted} clocks could be measured" in line]
        assert len(said) == (0 if kept else 1)
