"""All ranks decide alike, from heartbeats alone: here one copy of the rules is fed by hand."""

from __future__ import annotations

from collections.abc import Callable

from perseus_core.runtime.ranks.decisions import ActivePlan, Coordination, Limits, Orders, Phase, Reason
from perseus_core.runtime.ranks.heartbeat import NONE, Heartbeat, Introduction

LIMITS = Limits(
    measure_only=False,
    warmup_iterations=1,
    baseline_iterations=2,
    watch_iterations=2,
    tolerance=0.01,
    max_corrections=2,
)


class Job:
    """Two stages whose ranks beat once an iteration."""

    def __init__(self, limits: Limits = LIMITS, **introduction: float) -> None:
        introductions = [
            Introduction(stage, 0, 1, 1, 0, 0, 0, 0, 0)._replace(**(introduction if stage == 0 else {}))
            for stage in (0, 1)
        ]
        self.coordination = Coordination(introductions, limits)
        self.iteration = 0

    def beat(self, change: Callable[[int, Heartbeat], Heartbeat] = lambda rank, beat: beat, **both: float) -> Orders:
        beats = []
        for rank in (0, 1):
            beat = Heartbeat(
                self.iteration, can_lock=1, timed=self.iteration, num_microbatches=8, span_s=1.0,
                counted=self.iteration, energy_j=100.0,
            )  # fmt: skip
            beats.append(change(rank, beat._replace(**both)))
        self.iteration += 1
        return self.coordination.observe(beats)

    def run_plan(self, number: int = 1, limit_s: float = 1.0) -> None:
        """Brings the job from any phase that waits for a plan to one that runs it."""
        orders = self.beat(lambda rank, b: b._replace(plan=number, plan_bytes=10) if rank == 0 else b)
        assert orders.distribute_bytes == 10
        orders = self.beat(received=number)
        assert orders.apply == number
        self.coordination.begin_watching(ActivePlan(number, 8, limit_s, limit_s, 0.1), self.iteration)
        self.beat()


def profiled_job() -> Job:
    job = Job()
    for _ in range(3):
        job.beat()
    job.beat(sweep_done=1)
    assert job.beat(part=1, part_bytes=7).collect_sizes == (7, 7)
    job.run_plan()
    return job


def test_the_way_from_warm_up_to_a_plan() -> None:
    """Each phase ends when every rank has done its part, and not before."""
    job = Job()
    phases = [job.coordination.phase]
    for _ in range(3):
        job.beat()
    phases.append(job.coordination.phase)
    job.beat(lambda rank, b: b._replace(sweep_done=float(rank == 0)))
    phases.append(job.coordination.phase)
    job.beat(sweep_done=1)
    phases.append(job.coordination.phase)
    job.beat(part=1, part_bytes=7)
    phases.append(job.coordination.phase)
    job.run_plan()
    phases.append(job.coordination.phase)
    assert phases == [Phase.WARM_UP, Phase.PROFILE, Phase.PROFILE, Phase.COLLECT, Phase.SOLVE, Phase.RUN]


def test_the_baseline_is_the_first_stages_time_and_all_stages_energy() -> None:
    """Without the warm-up; the median, so that one slow iteration does not count."""
    job = Job()
    job.beat(span_s=9.0)
    job.beat(lambda rank, b: b._replace(span_s=2.0 if rank == 0 else 5.0))
    job.beat(lambda rank, b: b._replace(span_s=2.2 if rank == 0 else 5.0))
    baseline = job.coordination.baseline
    assert baseline is not None
    assert (baseline.num_microbatches, baseline.time_s, baseline.energy_j) == (8, 2.1, 200.0)


def test_evaluations_and_odd_batches_are_no_baseline() -> None:
    """An iteration counts where all ranks ran the same number of microbatches as planned."""
    job = Job()
    job.beat()
    for _ in range(5):
        job.beat(num_microbatches=0)
        job.beat(lambda rank, b: b._replace(num_microbatches=8.0 - rank))
    assert job.coordination.phase is Phase.WARM_UP


def test_a_known_profile_is_not_measured_again() -> None:
    """The cache saves the sweep, not the baseline."""
    job = Job(has_profile=1.0)
    for _ in range(3):
        job.beat()
    assert job.coordination.phase is Phase.COLLECT


def test_a_restarted_job_runs_its_plan_at_once() -> None:
    """With the baseline of then."""
    job = Job(has_plan=1.0, saved_baseline_time_s=2.0, saved_baseline_energy_j=300.0, saved_num_microbatches=8.0)
    job.run_plan()
    assert job.iteration == 3
    assert job.coordination.phase is Phase.RUN


def test_who_measures_only_never_profiles() -> None:
    """The baseline is all there is to do."""
    job = Job(Limits(True, 1, 2, 2, 0.01))
    for _ in range(4):
        job.beat()
    assert job.coordination.phase is Phase.MEASURE_ONLY
    assert job.coordination.baseline is not None


def test_a_plan_that_is_too_slow_is_corrected_a_few_times_and_then_dropped() -> None:
    """The promise of no slowdown is kept by measurement."""
    job = profiled_job()
    for number in (2, 3):
        for _ in range(3):
            job.beat(span_s=1.1)
        orders = job.beat(span_s=1.1)
        assert orders.verdict is not None and orders.verdict.is_slow
        assert (job.coordination.phase, job.coordination.reason) == (Phase.COLLECT, Reason.SLOWER)
        job.beat(part=number, part_bytes=7)
        job.run_plan(number)
    for _ in range(4):
        job.beat(span_s=1.1)
    assert job.coordination.phase is Phase.RECHECK
    job.beat(span_s=1.1)  # still under the plan
    job.beat(span_s=1.1)  # clocks change
    for _ in range(2):
        assert job.coordination.phase is Phase.RECHECK
        job.beat(span_s=1.0)
    assert (job.coordination.phase, job.coordination.plan) == (Phase.MEASURE_ONLY, 0)


def test_a_job_that_became_slower_by_itself_keeps_plans() -> None:
    """What it is without a plan now is the baseline from then on, and the plans after it are judged by that."""
    job = profiled_job()
    for number in (2, 3):
        for _ in range(4):
            job.beat(span_s=1.1)
        job.beat(part=number, part_bytes=7)
        job.run_plan(number)
    for _ in range(4 + 2):
        job.beat(span_s=1.1)
    for _ in range(2):
        job.beat(span_s=1.09, energy_j=110.0)
    assert (job.coordination.phase, job.coordination.reason) == (Phase.COLLECT, Reason.BASELINE_CHANGED)
    baseline = job.coordination.baseline
    assert baseline is not None
    assert (baseline.num_microbatches, baseline.time_s, baseline.energy_j) == (8, 1.09, 220.0)
    job.beat(part=4, part_bytes=7)
    job.run_plan(4, limit_s=1.09)
    for _ in range(20):
        job.beat(span_s=1.09)
    assert (job.coordination.phase, job.coordination.plan) == (Phase.RUN, 4)


def test_a_plan_within_the_tolerance_is_left_alone() -> None:
    """Noise is no reason to plan again, and neither is one disturbance."""
    job = profiled_job()
    for _ in range(20):
        job.beat(span_s=1.009)
    for _ in range(2):
        job.beat(span_s=1.2)
    for _ in range(2):
        job.beat()
    assert job.coordination.phase is Phase.RUN


def test_a_throttled_gpu_is_seen_in_the_next_heartbeat_and_planned_for_after_three() -> None:
    """One iteration is worth a log line; a new plan takes some in a row."""
    job = profiled_job()

    def hot(rank: int, beat: Heartbeat) -> Heartbeat:
        return beat._replace(seen_s=1.3 if rank == 1 else 1.0, expected_s=1.0, throttled=float(rank == 1))

    orders = job.beat(hot)
    assert orders.slow_rank is not None
    assert (orders.slow_rank.rank, orders.slow_rank.speed.throttled) == (1, True)
    assert job.beat(hot).slow_rank is None, "it is said once"
    assert job.coordination.phase is Phase.RUN
    job.beat(hot)
    assert (job.coordination.phase, job.coordination.reason) == (Phase.COLLECT, Reason.SPEED_CHANGED)


def test_a_gpu_that_has_cooled_down_is_tried_again() -> None:
    """It is asked for no more than heat allows, so it cannot show by itself that it could do more."""
    job = profiled_job()
    for _ in range(3):
        job.beat(seen_s=1.3, expected_s=1.0, throttled=1.0)
    job.beat(part=2, part_bytes=7)
    job.run_plan(2)
    for _ in range(12):
        job.beat()
    assert job.coordination.reason is Reason.RECOVERED


def test_one_rank_that_has_given_up_stops_all() -> None:
    """Half a plan is no plan."""
    job = profiled_job()
    orders = job.beat(lambda rank, b: b._replace(failed=float(rank == 1)))
    assert orders.aside == (1,)
    assert (job.coordination.phase, job.coordination.plan) == (Phase.STEPPED_ASIDE, 0)


def test_a_clock_that_cannot_be_set_any_more_ends_the_plan_but_not_the_measuring() -> None:
    """The others would wait for it or waste."""
    job = profiled_job()
    orders = job.beat(lambda rank, b: b._replace(can_lock=float(rank == 0)))
    assert orders.aside == (1,)
    assert job.coordination.phase is Phase.MEASURE_ONLY


def test_ranks_may_tell_of_an_iteration_at_different_times() -> None:
    """On a GPU one rank knows its times an iteration later than another."""
    job = Job()
    job.beat(lambda rank, b: b._replace(timed=float(NONE)) if rank == 1 else b)
    for _ in range(2):
        job.beat(lambda rank, b: b._replace(timed=b.timed - 1, counted=b.counted - 1) if rank == 1 else b)
    assert job.coordination.phase is Phase.WARM_UP
    job.beat(lambda rank, b: b._replace(timed=b.timed - 1) if rank == 1 else b)
    assert job.coordination.phase is Phase.PROFILE


def test_a_number_of_microbatches_that_comes_often_gets_its_own_plan() -> None:
    """As in a batch size ramp-up."""
    job = profiled_job()
    wanted = [job.beat(num_microbatches=4).wanted_microbatches for _ in range(12)]
    assert sorted(wanted) == [0] * 11 + [4]
