"""Whole jobs in virtual time, from warm-up to a plan and beyond: what all ranks together do, and when."""

from __future__ import annotations

import statistics

import pytest

from perseus_core.runtime.ranks.order import Phase
from perseus_core.runtime.session import Session
from perseus_core.runtime.settings import Settings
from tests.cluster.cluster import Cluster, Surroundings, real_session

QUICK = Settings(
    enabled=True,
    profile_cache="off",
    warmup_iterations=1,
    baseline_iterations=3,
    profile_clocks=4,
    profile_iterations=1,
    watch_iterations=4,
    log_interval=0,
)
# A job ends when what it is for has happened; in virtual time this ends one in which it does not.
MOST_ITERATIONS = 600


class Job:
    """A cluster whose ranks write down which plan they follow and which clock they hold in each iteration."""

    def __init__(self, *, seed: int = 1, settings: Settings = QUICK, **options: object) -> None:
        self.plans: dict[int, list[int]] = {}
        self.held_mhz: dict[int, list[int | None]] = {}
        shape = {"stages": 4, "pipelines": 2, "tensor_parallel": 2, "microbatches": 8, "time_scale": 1.0, **options}
        self.cluster = Cluster(seed=seed, settings=settings, make_session=self._watched, **shape)  # type: ignore[arg-type]

    def _watched(self, surroundings: Surroundings) -> Session:
        session = real_session(surroundings)
        begin, plans = session.begin_iteration, self.plans.setdefault(surroundings.job.rank, [])
        held_mhz = self.held_mhz.setdefault(surroundings.job.rank, [])

        def begin_and_note(num_microbatches: int, *, training: bool = True) -> None:
            begin(num_microbatches, training=training)
            plans.append(session.status().plan)
            held_mhz.append(None if session._record is None else session._record.expectation.held_mhz)

        session.begin_iteration = begin_and_note  # type: ignore[method-assign]
        return session

    def run_until_plan(self, number: int, *, iterations_under_it: int = 12) -> None:
        """Until all ranks have followed a plan, or a later one, for some iterations."""

        def is_over() -> bool:
            assert self.cluster.job.num_ended < MOST_ITERATIONS, self.cluster.log_text
            return bool(self.plans) and all(
                sum(plan >= number for plan in plans[-iterations_under_it:]) >= iterations_under_it
                for plans in self.plans.values()
            )

        while not is_over():
            self.cluster.run_iterations(1)

    def begun_with(self, number: int) -> set[int]:
        """In which iterations ranks have begun to follow a plan."""
        return {plans.index(number) for plans in self.plans.values()}

    def said(self, words: str) -> int:
        """How many lines of the log hold some words."""
        return sum(words in line.text for line in self.cluster.log)


@pytest.fixture(scope="module")
def planned() -> Job:
    """A job that was run until its first plan was judged."""
    job = Job()
    job.run_until_plan(1)
    return job


def test_all_ranks_begin_with_a_plan_in_the_same_iteration(planned: Job) -> None:
    """Half a plan is no plan: what one stage is given, another has gained."""
    assert len(planned.begun_with(1)) == 1


def test_all_ranks_sweep_together(planned: Job) -> None:
    """At every iteration all hold the same clock: nobody is measured while his neighbours run at another step's."""
    held_mhz = [set(of_all) for of_all in zip(*planned.held_mhz.values(), strict=True)]
    assert all(len(of_all) == 1 for of_all in held_mhz)
    assert len({clock for of_all in held_mhz for clock in of_all if clock is not None}) == QUICK.profile_clocks


def test_what_is_promised_is_measured(planned: Job) -> None:
    """The GPUs' exact energies and times, read by nobody else."""
    (first,) = planned.begun_with(1)
    status = planned.cluster.session(0).status()
    assert status.promised_saving > 0.05
    assert status.saving == pytest.approx(status.promised_saving, abs=0.01)
    times_s = planned.cluster.iteration_times_s()
    assert statistics.median(times_s[first + 1 :]) == pytest.approx(statistics.median(times_s[3:7]), rel=0.01)


def test_what_happens_is_said_once_and_by_rank_0(planned: Job) -> None:
    """Baseline, progress, the plan, what was measured."""
    assert {line.rank for line in planned.cluster.log} == {0}
    for words in ("baseline:", "profiling clock 2 of 4", "plan applied", "measured in iterations"):
        assert planned.said(words) == 1, words


def test_the_same_seed_gives_the_same_job() -> None:
    """Every line at the same time, and every iteration to the last bit; another seed gives another job."""
    jobs = []
    for seed in (3, 3, 4):
        job = Job(seed=seed, pipelines=1)
        job.run_until_plan(1)
        jobs.append((job.cluster.log_text, job.cluster.iteration_times_s(), job.cluster.energy_j()))
    assert jobs[0] == jobs[1] != jobs[2]


def test_a_throttled_gpu_is_planned_for_by_all() -> None:
    """Heat on one of sixteen GPUs: it is named, and all ranks change their plan in the same iteration."""
    job = Job()
    job.run_until_plan(1, iterations_under_it=6)
    job.cluster.throttle(9, 900, at_s=job.cluster.queue.now_s)
    job.run_until_plan(2)
    (named,) = (line.text for line in job.cluster.log if "slower than its profile" in line.text)
    assert "(rank 9)" in named, "and not its neighbour in the tensor-parallel group, which is held up by it"
    assert "power or heat holds its clock down" in named
    assert job.said("planning anew for the speed that the GPUs have now") >= 1
    assert len(job.begun_with(2)) == 1


def test_a_slower_pipeline_elsewhere_is_planned_for() -> None:
    """T' is told on any rank."""
    job = Job()
    job.run_until_plan(1, iterations_under_it=2)
    job.cluster.session(7).set_straggler(1.2)
    job.run_until_plan(2)
    status = job.cluster.session(0).status()
    assert 0.05 < status.promised_slowdown < 0.21
    assert len(job.begun_with(2)) == 1


def test_a_job_that_becomes_slower_by_itself_keeps_plans() -> None:
    """Correcting does not help, so it is measured without a plan again; a plan for what it is now then runs on."""
    job = Job(pipelines=1, tensor_parallel=1)
    job.run_until_plan(1, iterations_under_it=2)
    job.cluster.job.tail_s += 0.1 * job.cluster.iteration_times_s()[-1]
    while not job.said("itself has become slower"):
        job.cluster.run_iterations(10)
        assert job.cluster.job.num_ended < MOST_ITERATIONS, job.cluster.log_text
    assert job.said("measured without a plan again") == 1
    job.run_until_plan(5)  # one, three corrections, and this
    status = job.cluster.session(0).status()
    assert status.phase is Phase.RUN
    assert status.promised_saving > 0.05
    assert status.promised_slowdown <= 0.01
    assert job.said("left to the driver") == 0


def test_a_rank_that_hears_nothing_for_a_while_harms_nobody() -> None:
    """Its side threads stand still while a plan is offered: the others wait with it for the plan, not with training."""
    job = Job()
    undisturbed = Job()
    job.cluster.stop_side_threads(11, 30.0, at_s=20.0)
    job.run_until_plan(1)
    undisturbed.run_until_plan(1)
    assert len(job.begun_with(1)) == 1
    assert max(job.begun_with(1)) >= max(undisturbed.begun_with(1))
    assert job.said("without perseus") == 0


def test_a_rank_without_a_session_is_named_and_waited_for_by_nobody() -> None:
    """After ten seconds, in one line; the others step aside."""
    job = Job(absent_ranks=(5,), time_scale=0.25)
    job.cluster.run_for(15.0)
    (line,) = job.cluster.log
    assert "rank 5 has no session" in line.text
    assert 10.0 < line.time_s < 11.0
    phases = {job.cluster.session(rank).status().phase for rank in range(16) if rank != 5}
    assert phases == {Phase.STEPPED_ASIDE}


def test_a_job_without_rank_0s_session_hears_so_once() -> None:
    """Whoever notices first says it."""
    job = Job(absent_ranks=(0,), time_scale=0.25)
    job.cluster.run_for(15.0)
    (line,) = job.cluster.log
    assert "rank 0 has not opened a session" in line.text
