"""Whole jobs in virtual time, from warm-up to a plan and beyond: what all ranks together do, and when."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from perseus_core.gpu.device import ThrottleReason
from perseus_core.planning.schedule import one_f_one_b
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
    """A cluster whose ranks write down which plan is in force, and what they do, in each iteration."""

    def __init__(self, *, seed: int = 1, settings: Settings = QUICK, **options: object) -> None:
        self.plans: dict[int, list[int]] = {}
        self.held_mhz: dict[int, list[int | None]] = {}
        self.follows_plan: dict[int, list[bool]] = {}
        shape = {"stages": 4, "pipelines": 2, "tensor_parallel": 2, "microbatches": 8, "time_scale": 1.0, **options}
        self.cluster = Cluster(seed=seed, settings=settings, make_session=self._watched, **shape)  # type: ignore[arg-type]

    def _watched(self, surroundings: Surroundings) -> Session:
        session = real_session(surroundings)
        begin, plans = session.begin_iteration, self.plans.setdefault(surroundings.job.rank, [])
        held_mhz = self.held_mhz.setdefault(surroundings.job.rank, [])
        follows_plan = self.follows_plan.setdefault(surroundings.job.rank, [])

        def begin_and_note(num_microbatches: int, *, training: bool = True) -> None:
            begin(num_microbatches, training=training)
            plans.append(session.status().plan)
            held_mhz.append(None if session._record is None else session._record.expectation.held_mhz)
            follows_plan.append(session._stage_plan is not None)

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
    before_s = statistics.median(job.cluster.iteration_times_s()[2:4])
    job.run_until_plan(2)
    (named,) = (line.text for line in job.cluster.log if "slower than its profile" in line.text)
    assert "(rank 9)" in named, "and not its neighbour in the tensor-parallel group, which is held up by it"
    assert "power or heat holds its clock down" in named
    assert job.said("planning anew for the speed that the GPUs have now") >= 1
    assert len(job.begun_with(2)) == 1
    assert job.cluster.session(0).status().baseline_time_s > 1.02 * before_s, "what it is now, as measured"


def test_a_gpu_at_its_power_limit_is_no_trouble() -> None:
    """At full load it always is."""
    job = Job(pipelines=1, tensor_parallel=1)
    for rank in job.cluster.ranks:
        rank.gpu.capped_from_mhz = 1200
    job.run_until_plan(1, iterations_under_it=40)
    assert job.cluster.session(0).status().plan == 1
    assert job.said("holds its clock down") == job.said("planning anew") == 0


def test_the_sweep_does_not_linger_on_clocks_that_power_does_not_allow() -> None:
    """At full load an H100 holds no clock near its highest: one step is enough for all those above."""
    job = Job(pipelines=1, tensor_parallel=1, settings=replace(QUICK, profile_clocks=6))
    for rank in job.cluster.ranks:
        rank.gpu.throttle(1140, ThrottleReason.POWER_CAP)
    job.run_until_plan(1, iterations_under_it=40)
    swept = sorted({clock for held in job.held_mhz.values() for clock in held if clock is not None}, reverse=True)
    assert len(swept) == 6
    assert swept[0] == 1410
    assert swept[1] < 1140
    status = job.cluster.session(0).status()
    assert status.plan == 1
    assert status.saving == pytest.approx(status.promised_saving, abs=0.015)


def test_a_slower_pipeline_elsewhere_is_planned_for() -> None:
    """T' is told on any rank."""
    job = Job()
    job.run_until_plan(1, iterations_under_it=2)
    job.cluster.session(7).set_straggler(1.2)
    job.run_until_plan(2)
    status = job.cluster.session(0).status()
    assert 0.05 < status.promised_slowdown < 0.21
    assert len(job.begun_with(2)) == 1


@pytest.mark.parametrize("what", ["outside", "instructions"])
def test_a_job_that_becomes_slower_by_itself_keeps_its_plan(what: str) -> None:
    """It is compared with what it is without a plan in the same minutes."""
    job = Job(pipelines=1, tensor_parallel=1, settings=replace(QUICK, interlude_interval=20))
    job.run_until_plan(1, iterations_under_it=2)
    if what == "outside":
        job.cluster.job.tail_s += 0.1 * job.cluster.iteration_times_s()[-1]
    else:
        for rank in range(4):
            job.cluster.slow_down(rank, 1.04, at_s=job.cluster.queue.now_s + 5.0)
    job.cluster.run_iterations(120)
    status = job.cluster.session(0).status()
    assert (status.phase, status.plan) in ((Phase.RUN, 1), (Phase.INTERLUDE, 1)), job.cluster.log_text
    assert status.baseline_time_s > 1.03 * statistics.median(job.cluster.iteration_times_s()[2:4])
    assert abs(status.slowdown) < 0.005
    assert status.saving_between[0] < status.saving < status.saving_between[1]
    assert status.saving == pytest.approx(status.promised_saving, abs=0.015)


def test_a_plan_that_is_late_is_corrected_or_given_up_soon() -> None:
    """Of what only happens under plans, as a GPU whose changes of clock cost time that nobody knows of."""
    job = Job(pipelines=1, tensor_parallel=1)
    cluster, usual_s = job.cluster, job.cluster.job.tail_s

    def hinder_plans() -> None:
        follows_plan = job.follows_plan[0][cluster.job.num_ended :][:1] == [True]
        cluster.job.tail_s = usual_s + (0.05 if follows_plan else 0.0)
        cluster.at(cluster.queue.now_s + 0.05, hinder_plans)

    cluster.run_iterations(1)
    cluster.at(cluster.queue.now_s, hinder_plans)
    job.run_until_plan(1, iterations_under_it=1)
    first = len(job.plans[0])
    while not job.said("correcting the plan by what was seen"):
        cluster.run_iterations(1)
        assert len(job.plans[0]) <= first + 20, cluster.log_text
    while not job.said("left to the driver"):
        cluster.run_iterations(5)
        assert len(job.plans[0]) <= first + 200, cluster.log_text
    cluster.run_iterations(5)
    assert cluster.session(0).status().phase is Phase.MEASURE_ONLY


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


@pytest.mark.parametrize("num_microbatches", [4, 12])
def test_iterations_of_another_size_for_good_are_held_to_a_baseline_of_their_own(num_microbatches: int) -> None:
    """As when a batch has grown: a plan that makes them late is corrected or given up."""
    settings = replace(QUICK, profile_clocks=5)
    with Cluster(
        seed=1, stages=4, microbatches=8, profile="gpt3-6.7b_a100_4stages.csv", time_scale=1.0, settings=settings
    ) as cluster:
        while "measured in iterations" not in cluster.log_text:
            cluster.run_iterations(5)
        cluster.job.change(one_f_one_b(4, num_microbatches))
        changed = cluster.job.num_ended
        while f"baseline: {num_microbatches} microbatches" not in cluster.log_text:
            cluster.run_iterations(5)
            assert cluster.job.num_ended < MOST_ITERATIONS, cluster.log_text
        unlocked_s = statistics.median(cluster.iteration_times_s()[changed + 4 : changed + 10])
        cluster.run_iterations(20)
        status = cluster.session(0).status()
        assert status.baseline_time_s == pytest.approx(unlocked_s, rel=0.01)
        assert statistics.median(cluster.iteration_times_s()[-5:]) == pytest.approx(unlocked_s, rel=0.01)
        assert status.saving == pytest.approx(status.promised_saving, abs=0.015)
        gpu = cluster.ranks[2].gpu
        gpu.disobeyed_mhz = frozenset(clock for clock in gpu.model.clocks_mhz if clock > 1000)
        while "left to the driver" not in cluster.log_text:
            cluster.run_iterations(5)
            assert cluster.job.num_ended < MOST_ITERATIONS, cluster.log_text
        late = sum(time_s > 1.02 * unlocked_s for time_s in cluster.iteration_times_s()[changed + 60 :])
        assert late <= 30
