"""Rank 0 decides from what all ranks tell: here they tell by hand, in the records that go through the store."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from perseus_core.runtime.ranks import records
from perseus_core.runtime.ranks.decisions import Conclusions, Decisions, Limits
from perseus_core.runtime.ranks.job_table import JobTable
from perseus_core.runtime.ranks.order import Baseline, Phase, Reason
from perseus_core.runtime.ranks.plan_summary import PlanSummary
from perseus_core.runtime.ranks.records import RankState, Records, as_records

LIMITS = Limits(
    measure_only=False,
    warmup_iterations=1,
    baseline_iterations=2,
    watch_iterations=3,
    tolerance=0.01,
    max_corrections=2,
)


class Told(NamedTuple):
    """What one rank tells of one iteration."""

    num_microbatches: int = 8
    span_s: float = 1.0
    seen_s: float = 0.0
    expected_s: float = 0.0
    throttled: bool = False
    energy_j: float = 100.0


Change = Callable[[int, Told], Told]


class Job:
    """A pipeline whose ranks tell of every iteration as soon as it is over; what is decided holds from the next on."""

    def __init__(
        self,
        limits: Limits = LIMITS,
        *,
        stages: tuple[int, ...] = (0, 1),
        can_lock: bool = True,
        ranks_alike: int = 1,
        **known: Any,
    ) -> None:
        """Each of `stages` is one rank, or `ranks_alike` ranks that tell the same."""
        self.table = JobTable(len(stages) * ranks_alike)
        self.iteration = 0
        self.offered = 0
        self._ranks_alike = ranks_alike
        self._states = [RankState(ready=True, can_lock=can_lock) for _ in stages]
        self.tell(*(records.hello(rank, stage, 0) for rank, stage in enumerate(stages)))
        self.change_state()
        self.decisions = Decisions(self.table, limits, **known)

    @property
    def ranks(self) -> range:
        return range(len(self._states))

    def tell(self, *told: bytes) -> None:
        """What comes with one round."""
        self.table.take_in(self._of_all_alike(as_records(b"".join(told))), float(self.iteration))

    def change_state(self, *ranks: int, **changes: Any) -> None:
        """Some ranks, or all, tell something new of themselves."""
        for rank in ranks or self.ranks:
            self._states[rank] = replace(self._states[rank], **changes)
            self.tell(records.state(rank, self._states[rank]))

    def times(self, iteration: int, change: Change = lambda rank, told: told, **of_all: Any) -> list[bytes]:
        """What each rank tells of an iteration's time."""
        told = [change(rank, Told(**of_all)) for rank in self.ranks]
        return [records.iteration_time(rank, iteration, *told[rank][:5]) for rank in self.ranks]

    def energies(self, iteration: int, change: Change = lambda rank, told: told, **of_all: Any) -> list[bytes]:
        """What each rank tells of an iteration's energy."""
        told = [change(rank, Told(**of_all)) for rank in self.ranks]
        return [records.iteration_energy(rank, iteration, told[rank].energy_j) for rank in self.ranks]

    def conclude(self) -> Conclusions:
        return self.decisions.conclude(self.iteration, self.offered)

    def iterate(self, change: Change = lambda rank, told: told, **of_all: Any) -> Conclusions:
        """One iteration on all ranks, and what follows from it."""
        self.tell(*self.times(self.iteration, change, **of_all), *self.energies(self.iteration, change, **of_all))
        self.iteration += 1
        return self.conclude()

    def warm_up(self) -> None:
        for _ in range(3):
            self.iterate(seen_s=1.0)

    def collect(self) -> Conclusions:
        """All ranks put their measurements into the store."""
        self.change_state(reported=self.decisions.collection)
        return self.conclude()

    def run_plan(self, number: int = 1, limit_s: float = 1.0, num_microbatches: int = 8) -> None:
        """Brings the job from any phase that waits for a plan to one that runs it."""
        self.offered = number
        assert self.conclude().applied == 0
        *first, last = self.ranks
        self.change_state(*first, received=number)
        assert self.conclude().applied == 0, "one rank does not have it yet"
        self.change_state(last, received=number)
        assert self.conclude().applied == number
        if num_microbatches == 8:
            self.decisions.begin_watching(plan(number, limit_s))
        self.iterate()

    def interlude(self, **of_all: Any) -> Conclusions:
        """The iterations without a plan that were decided on; in the first one clocks still change."""
        assert self.decisions.phase is Phase.INTERLUDE
        while self.iteration <= self.decisions.from_iteration:
            self.iterate(span_s=5.0)
        assert self.iterate(**of_all).verdicts == ()
        return self.iterate(**of_all)

    def _of_all_alike(self, told: Records) -> Records:
        """The same from all ranks that are like those that told it."""
        of_all = np.repeat(told, self._ranks_alike)
        of_all["rank"] = of_all["rank"] * self._ranks_alike + np.tile(np.arange(self._ranks_alike), len(told))
        return of_all


def plan(number: int, limit_s: float = 1.0, num_microbatches: int = 8) -> PlanSummary:
    return PlanSummary(number, num_microbatches, limit_s, limit_s, 180.0, 1.0, 200.0, 0.0, 0.1)


def profiled_job(**arguments: Any) -> Job:
    job = Job(**arguments)
    job.warm_up()
    job.change_state(swept=True)
    job.conclude()
    assert job.collect().collect_now
    job.run_plan()
    return job


def hot(rank: int, told: Told) -> Told:
    """The GPU of rank 1 is too hot."""
    return told._replace(seen_s=1.3 if rank == 1 else 1.0, expected_s=1.0, throttled=rank == 1)


def test_the_way_from_warm_up_to_a_plan() -> None:
    """Each phase ends when every rank has done its part, and not before."""
    job = Job()
    phases = [job.decisions.phase]
    job.warm_up()
    phases.append(job.decisions.phase)
    job.change_state(0, swept=True)
    job.iterate()
    phases.append(job.decisions.phase)
    job.change_state(1, swept=True)
    job.iterate()
    phases.append(job.decisions.phase)
    job.change_state(0, reported=1)
    assert not job.conclude().collect_now
    phases.append(job.decisions.phase)
    job.change_state(1, reported=1)
    assert job.conclude().collect_now
    phases.append(job.decisions.phase)
    job.run_plan()
    phases.append(job.decisions.phase)
    assert phases == [
        Phase.WARM_UP, Phase.PROFILE, Phase.PROFILE, Phase.COLLECT, Phase.COLLECT, Phase.SOLVE, Phase.RUN,
    ]  # fmt: skip


def test_measurements_are_taken_from_the_store_once() -> None:
    """Whatever is told again while the plan is being made."""
    job = Job(has_profile=True)
    job.warm_up()
    assert job.collect().collect_now
    for _ in range(3):
        job.change_state(reported=1)
        assert not job.iterate().collect_now


def test_what_is_decided_holds_from_the_iteration_that_all_ranks_hear_of_before() -> None:
    """And a phase in which ranks do nothing else than before does not move it."""
    job = Job()
    for iteration in range(3):
        job.tell(*job.times(iteration), *job.energies(iteration))
    assert job.decisions.conclude(soonest=17, offered=0).phase_changed
    assert (job.decisions.phase, job.decisions.from_iteration) == (Phase.PROFILE, 17)
    job.change_state(swept=True)
    job.decisions.conclude(soonest=23, offered=0)
    assert (job.decisions.phase, job.decisions.from_iteration) == (Phase.COLLECT, 23)
    job.change_state(reported=1)
    job.decisions.conclude(soonest=29, offered=0)
    assert (job.decisions.phase, job.decisions.from_iteration) == (Phase.SOLVE, 23)
    assert not job.decisions.conclude(soonest=31, offered=0).phase_changed
    job.change_state(received=1)
    assert job.decisions.conclude(soonest=37, offered=1).applied == 1
    assert (job.decisions.phase, job.decisions.from_iteration) == (Phase.RUN, 37)


def test_the_baseline_is_the_first_stages_time_and_all_stages_energy() -> None:
    """Without the warm-up; the median, so that one slow iteration does not count."""
    job = Job()
    job.iterate(span_s=9.0)
    job.iterate(lambda rank, told: told._replace(span_s=2.0 if rank == 0 else 5.0))
    job.iterate(lambda rank, told: told._replace(span_s=2.25 if rank == 0 else 5.0))
    assert job.decisions.baseline == Baseline(8, 2.125, 200.0)


def test_the_slowest_pipeline_is_the_baseline_and_energies_count_one_gpu_a_stage() -> None:
    """Two pipelines of two stages: all wait for the slower one."""
    job = Job(stages=(0, 0, 1, 1))
    job.iterate()
    for _ in range(2):
        job.iterate(lambda rank, told: told._replace(span_s=2.0 + rank, energy_j=100.0 + 10 * rank))
    assert job.decisions.baseline == Baseline(8, 3.0, 105.0 + 125.0)


def test_energies_of_the_baseline_may_be_told_later_than_its_times() -> None:
    """A counter is read after the fact. Until then the energy is not known, and that holds nothing up."""
    job = Job()
    for iteration in range(3):
        job.tell(*job.times(iteration))
    job.conclude()
    assert job.decisions.baseline == Baseline(8, 1.0, 0.0)
    assert job.decisions.phase is Phase.PROFILE
    for iteration, energy_j in enumerate((500.0, 100.0, 120.0, 900.0)):
        job.tell(*job.energies(iteration, energy_j=energy_j))
        job.conclude()
    assert job.decisions.baseline == Baseline(8, 1.0, 220.0)


def test_an_energy_that_one_rank_cannot_read_is_not_known() -> None:
    """A sum without one of its parts would be a saving that nobody made."""
    job = Job()
    for _ in range(3):
        job.iterate(lambda rank, told: told._replace(energy_j=100.0 * rank))
    assert job.decisions.baseline == Baseline(8, 1.0, 0.0)


def test_evaluations_and_odd_batches_are_no_baseline() -> None:
    """An iteration counts where all ranks ran the same number of microbatches."""
    job = Job()
    job.iterate()
    for _ in range(5):
        job.iterate(num_microbatches=0)
        job.iterate(lambda rank, told: told._replace(num_microbatches=8 - rank))
    assert job.decisions.phase is Phase.WARM_UP


def test_a_batch_size_that_changes_while_warming_up_begins_the_baseline_anew() -> None:
    """Its median would belong to no iteration."""
    job = Job()
    for num_microbatches in (4, 4, 8, 8):
        job.iterate(num_microbatches=num_microbatches)
    assert job.decisions.phase is Phase.WARM_UP
    job.iterate()
    assert job.decisions.baseline == Baseline(8, 1.0, 200.0)


def test_a_known_profile_is_not_measured_again() -> None:
    """The cache saves the sweep, not the baseline."""
    job = Job(has_profile=True)
    job.warm_up()
    assert (job.decisions.phase, job.decisions.reason) == (Phase.COLLECT, Reason.PROFILED)


def test_a_restarted_job_runs_its_plan_at_once() -> None:
    """With the baseline of then."""
    job = Job(has_plan=True, baseline=Baseline(8, 2.0, 300.0))
    job.run_plan()
    assert job.iteration == 1
    assert (job.decisions.phase, job.decisions.baseline) == (Phase.RUN, Baseline(8, 2.0, 300.0))


def test_a_restarted_job_whose_clocks_cannot_be_set_measures_only() -> None:
    """A plan of an earlier run is of no use then."""
    job = Job(has_plan=True, baseline=Baseline(8, 2.0, 300.0), can_lock=False)
    job.offered = 1
    job.change_state(received=1)
    job.warm_up()
    assert (job.decisions.phase, job.decisions.plan) == (Phase.MEASURE_ONLY, 0)


def test_who_measures_only_never_profiles() -> None:
    """The baseline is all there is to do."""
    job = Job(Limits(True, 1, 2, 2, 0.01), has_plan=True, has_profile=True)
    for _ in range(3):
        aside = job.iterate().aside
    assert aside == ()
    assert job.decisions.phase is Phase.MEASURE_ONLY
    assert job.decisions.baseline is not None


def test_where_a_clock_cannot_be_set_the_baseline_is_all_there_is() -> None:
    """The ranks because of which it is so are known."""
    job = Job()
    job.change_state(1, can_lock=False)
    conclusions = [job.iterate() for _ in range(3)]
    assert [c.aside for c in conclusions] == [(), (), (1,)]
    assert job.decisions.phase is Phase.MEASURE_ONLY
    assert job.decisions.baseline is not None


def test_a_plan_that_is_too_slow_is_corrected_a_few_times_and_then_dropped() -> None:
    """The promise of no slowdown is kept by measurement, beside iterations without the plan of the same minutes."""
    job = profiled_job()
    for number, late in ((2, "10.00"), (3, "4.00")):
        for _ in range(3):
            assert job.decisions.phase is Phase.RUN
            job.iterate(span_s=1 + float(late) / 100)
        job.interlude()
        assert (job.decisions.phase, job.decisions.reason) == (Phase.COLLECT, Reason.SLOWER)
        assert str(job.decisions.time_ratio()) == f"+{late} % (+{late} to +{late})"
        assert job.collect().collect_now
        job.run_plan(number)
    for _ in range(3):
        job.iterate(span_s=1.015)
    job.interlude()
    assert (job.decisions.phase, job.decisions.plan) == (Phase.MEASURE_ONLY, 0)
    job.offered = 4
    job.change_state(received=4)
    assert job.iterate().applied == 0, "for good"


def test_a_correction_that_does_not_help_is_the_last() -> None:
    """What is not understood is not tried again and again while training is late."""
    job = profiled_job()
    for late_s in (1.1, 1.06):
        for _ in range(3):
            job.iterate(span_s=late_s)
        job.interlude()
        if late_s == 1.1:
            assert job.collect().collect_now
            job.run_plan(2)
    assert (job.decisions.phase, job.decisions.plan) == (Phase.MEASURE_ONLY, 0)


def test_iterations_before_an_interlude_is_in_force_count_for_the_plan() -> None:
    """They ran under it, and so does all that follows the interlude, whenever rank 0 hears of it."""
    job = profiled_job()
    for iteration in range(job.iteration, job.iteration + 3):
        job.tell(*job.times(iteration, span_s=1.02))
    begin = job.iteration + 13
    job.decisions.conclude(soonest=begin, offered=1)
    assert (job.decisions.phase, job.decisions.from_iteration) == (Phase.INTERLUDE, begin)
    assert job.decisions.interlude_until == begin + 3
    for iteration in range(job.iteration + 3, begin + 20):
        span_s = 9.0 if iteration in (begin, begin + 3) else 1.0 if begin < iteration < begin + 3 else 1.02
        job.tell(*job.times(iteration, span_s=span_s))
    job.decisions.conclude(soonest=begin + 30, offered=1)
    assert job.decisions.phase is Phase.COLLECT
    assert job.decisions.baseline is not None
    assert job.decisions.baseline.time_s == 1.0
    assert str(job.decisions.time_ratio()) == "+2.00 % (+2.00 to +2.00)"


def test_a_job_that_became_slower_by_itself_keeps_its_plan() -> None:
    """What it is without a plan now is the baseline from then on."""
    job = profiled_job()
    for _ in range(3):
        job.iterate(span_s=1.1)
    job.interlude(span_s=1.0625, energy_j=110.0)
    assert (job.decisions.phase, job.decisions.reason) == (Phase.COLLECT, Reason.SLOWER), "by more than that"
    job.collect()
    job.run_plan(2, limit_s=1.0625)
    for _ in range(3):
        job.iterate(span_s=1.125)
    job.interlude(span_s=1.125, energy_j=115.0)
    assert job.decisions.baseline == Baseline(8, 1.125, 230.0)
    for _ in range(30):
        job.iterate(span_s=1.125)
    assert (job.decisions.phase, job.decisions.plan) == (Phase.RUN, 2)


def test_what_is_within_the_tolerance_or_the_noise_is_left_alone() -> None:
    """Noise is no reason to plan again, and neither is one disturbance; what looks late is looked at more closely."""
    job = profiled_job()
    noisy = itertools.cycle([0.97, 1.06, 1.03, 0.98, 1.06])
    for _ in range(3):
        job.iterate(span_s=1.009)
    job.interlude()
    for _ in range(8):
        job.iterate(span_s=next(noisy))
    interludes = 0
    for _ in range(60):
        if job.decisions.phase is Phase.INTERLUDE:
            interludes += 1
            job.interlude(span_s=next(noisy))
        assert job.decisions.phase is Phase.RUN
        job.iterate(span_s=next(noisy))
    assert interludes > 1


@pytest.mark.parametrize("interval", [200, 500, 1000])
def test_interludes_come_again_and_again(interval: int) -> None:
    """Three iterations in so many, whatever the plan does: a job drifts."""
    job = profiled_job(limits=replace(LIMITS, interlude_interval=interval))
    phases = []
    for _ in range(5 * interval):
        job.iterate()
        phases.append(job.decisions.phase)
    begins = [i for i, (a, b) in enumerate(itertools.pairwise(phases)) if a is not b and b is Phase.INTERLUDE]
    assert len(begins) == 5
    assert all(interval <= b - a <= interval + 10 for a, b in itertools.pairwise(begins))
    assert set(phases) == {Phase.RUN, Phase.INTERLUDE}


def test_an_interlude_without_usual_iterations_is_not_repeated_at_once() -> None:
    """While a batch grows none of them can be compared; the plan runs its window before the next try."""
    job = profiled_job()
    phases = []
    for _ in range(60):
        job.iterate(num_microbatches=4 if job.decisions.phase is Phase.INTERLUDE else 8)
        phases.append(job.decisions.phase)
    assert phases.count(Phase.INTERLUDE) <= phases.count(Phase.RUN)
    assert job.decisions.time_ratio() is None


def test_corrections_that_helped_for_long_do_not_count_against_the_plan() -> None:
    """Ten verdicts within the limit, and it may be corrected as often as at first."""
    job = profiled_job()
    for number in (2, 3, 4, 5, 6):
        for _ in range(3):
            job.iterate(span_s=1.1)
        job.interlude()
        assert job.decisions.phase is Phase.COLLECT, number
        job.collect()
        job.run_plan(number)
        for _ in range(3):
            job.iterate()
        job.interlude()
        for _ in range(1 + 27):
            job.iterate()


def test_a_throttled_gpu_is_seen_in_the_next_round_and_planned_for_after_three_iterations() -> None:
    """One iteration is worth a log line; a new plan takes some in a row, and the job as it is without one."""
    job = profiled_job()
    conclusions = job.iterate(hot)
    assert conclusions.slow_rank is not None
    assert (conclusions.slow_rank.rank, conclusions.slow_rank.throttled) == (1, True)
    assert job.decisions.slow_ranks == (1,)
    assert job.iterate(hot).slow_rank is None, "it is said once"
    assert job.decisions.phase is Phase.RUN
    job.iterate(hot)
    job.interlude(span_s=1.25)
    assert (job.decisions.phase, job.decisions.reason) == (Phase.COLLECT, Reason.SPEED_CHANGED)
    assert job.decisions.baseline == Baseline(8, 1.25, 200.0)


def test_a_gpu_that_gets_hot_before_an_interlude_needs_no_other() -> None:
    """What the job is without a plan is known then."""
    job = profiled_job()
    for _ in range(2):
        job.iterate()
    job.tell(*job.times(job.iteration, hot))
    job.iteration += 1
    job.decisions.conclude(soonest=job.iteration + 4, offered=1)
    assert job.decisions.phase is Phase.INTERLUDE
    for _ in range(4):
        job.iterate(hot)
    job.interlude(span_s=1.25)
    assert (job.decisions.phase, job.decisions.reason) == (Phase.COLLECT, Reason.SPEED_CHANGED)
    assert job.decisions.baseline == Baseline(8, 1.25, 200.0)


def test_a_gpu_that_is_hot_while_a_plan_is_made_is_seen_anew_under_it() -> None:
    """What is expected is another thing then; iterations of the way there count for neither."""
    job = profiled_job()
    for _ in range(3):
        job.iterate(hot)
    job.interlude()
    job.collect()
    for _ in range(20):
        job.iterate(hot)
    job.run_plan(2)
    for _ in range(2):
        assert job.decisions.phase is Phase.RUN
        job.iterate(lambda rank, told: told._replace(seen_s=1.0, expected_s=1.0))
    assert (job.decisions.phase, job.decisions.slow_ranks) == (Phase.RUN, ())


def test_an_odd_batch_between_is_no_sign_of_a_slow_gpu() -> None:
    """The three iterations have to come in a row."""
    job = profiled_job()
    for _ in range(5):
        job.iterate(hot)
        job.iterate(hot)
        job.iterate(num_microbatches=0)
    assert job.decisions.phase is Phase.RUN


def test_a_gpu_that_has_cooled_down_is_tried_again() -> None:
    """It is asked for no more than heat allows, so it cannot show by itself that it could do more."""
    job = profiled_job()
    for _ in range(3):
        job.iterate(seen_s=1.3, expected_s=1.0, throttled=True)
    job.interlude(throttled=True)
    job.collect()
    job.run_plan(2)
    for _ in range(16):
        job.iterate()
    assert (job.decisions.phase, job.decisions.reason) == (Phase.COLLECT, Reason.RECOVERED)


def test_a_gpu_that_is_as_slow_as_before_without_a_plan_has_not_recovered() -> None:
    """No plan is made for it; it is looked at again."""
    job = profiled_job()
    for _ in range(3):
        job.iterate(seen_s=1.3, expected_s=1.0, throttled=True)
    job.interlude(seen_s=1.3, throttled=True)
    job.collect()
    job.run_plan(2)
    num_interludes = 0
    for _ in range(60):
        was = job.decisions.phase
        job.iterate(seen_s=1.3, expected_s=1.3 if was is Phase.RUN else 0.0)
        num_interludes += was is not job.decisions.phase is Phase.INTERLUDE
        assert job.decisions.phase in (Phase.RUN, Phase.INTERLUDE)
    assert num_interludes >= 2
    for _ in range(60):
        if job.decisions.phase is Phase.COLLECT:
            break
        job.iterate(seen_s=1.0, expected_s=1.0 if job.decisions.phase is Phase.RUN else 0.0)
    assert (job.decisions.phase, job.decisions.reason) == (Phase.COLLECT, Reason.RECOVERED)


def disobeying(rank: int, told: Told) -> Told:
    """Rank 1 takes longer than its clocks should, and so does the iteration."""
    return told._replace(span_s=1.3, seen_s=1.3 if rank == 1 else 1.0, expected_s=1.0)


def job_that_disobeys() -> Job:
    """Slow at set clocks for three iterations, and as fast as ever without a plan."""
    job = profiled_job()
    for _ in range(3):
        assert job.decisions.phase is Phase.RUN
        job.iterate(disobeying)
    assert job.interlude(seen_s=1.0).disobeying is None
    return job


def test_a_gpu_that_is_disturbed_now_and_then_changes_no_plan() -> None:
    """Nothing has changed if it is as fast as before where nobody sets its clock, and soon also where somebody does."""
    job = job_that_disobeys()
    for _ in range(5):
        for _ in range(20):
            job.iterate(seen_s=1.0, expected_s=1.0 if job.decisions.phase is Phase.RUN else 0.0)
            assert job.decisions.phase in (Phase.RUN, Phase.INTERLUDE)
        while job.decisions.phase is Phase.RUN:
            job.iterate(disobeying)
        assert job.interlude(seen_s=1.0).disobeying is None
    assert (job.decisions.phase, job.decisions.plan) == (Phase.RUN, 1)


def test_a_gpu_that_does_not_obey_is_named_and_its_plan_is_corrected_or_given_up() -> None:
    """What is seen again at once was no disturbance."""
    job = job_that_disobeys()
    while job.decisions.phase is Phase.RUN:
        job.iterate(disobeying)
    conclusions = job.interlude(seen_s=1.0)
    assert conclusions.disobeying is not None
    assert conclusions.disobeying.rank == 1
    assert (job.decisions.phase, job.decisions.reason) == (Phase.COLLECT, Reason.SLOWER)
    job.collect()
    job.offered = 2
    job.change_state(received=2)
    assert job.conclude().applied == 2
    slower = replace(plan(2), promised_time_s=1.2)
    assert job.decisions.begin_watching(slower), "it promises more than is allowed"
    assert (job.decisions.phase, job.decisions.plan) == (Phase.MEASURE_ONLY, 0)


def test_another_number_of_microbatches_for_good_gets_a_baseline_of_its_own() -> None:
    """Not while the usual one comes now and then, nor where it has no plan."""
    job = profiled_job()
    for number in range(100):
        planned = 0.0 if job.decisions.phase is Phase.INTERLUDE else 1.5
        job.iterate(num_microbatches=8 if number % 20 == 0 else 12, span_s=1.5, seen_s=1.5, expected_s=planned)
        assert job.decisions.phase in (Phase.RUN, Phase.INTERLUDE)
    for _ in range(100):
        job.iterate(num_microbatches=16, span_s=2.0)
        assert job.decisions.phase in (Phase.RUN, Phase.INTERLUDE)
    for _ in range(100):
        if job.decisions.phase is Phase.COLLECT:
            break
        planned = 0.0 if job.decisions.phase is Phase.INTERLUDE else 1.5
        job.iterate(num_microbatches=12, span_s=1.6 if planned else 1.5, seen_s=1.5, expected_s=planned)
    assert (job.decisions.phase, job.decisions.reason) == (Phase.COLLECT, Reason.RESIZED)
    assert job.decisions.baseline is not None
    assert (job.decisions.baseline.num_microbatches, job.decisions.baseline.time_s) == (12, pytest.approx(1.5))


def test_one_rank_that_has_given_up_stops_all() -> None:
    """Half a plan is no plan, and it does not come back."""
    job = profiled_job()
    job.change_state(1, failed=True)
    conclusions = job.iterate()
    assert conclusions.aside == (1,)
    assert (job.decisions.phase, job.decisions.plan, job.decisions.from_iteration) == (Phase.STEPPED_ASIDE, 0, 0)
    job.change_state(1, failed=False)
    for _ in range(10):
        assert not job.iterate().phase_changed
    assert job.decisions.phase is Phase.STEPPED_ASIDE


def test_a_rank_that_has_left_ends_the_plan_when_training_has_ended_everywhere() -> None:
    """Training ends on all ranks almost at once; until then they go on as they were. Nobody is to blame."""
    job = profiled_job()
    job.change_state(1, left=True)
    conclusions = job.decisions.conclude(soonest=50, offered=1)
    assert conclusions.aside == ()
    assert job.decisions.phase is Phase.STEPPED_ASIDE
    assert job.decisions.from_iteration >= 60


def test_a_rank_that_failed_and_left_counts_as_failed() -> None:
    """It is what the others need to hear, and at once."""
    job = profiled_job()
    job.change_state(0, left=True)
    job.change_state(1, failed=True, left=True)
    assert job.conclude().aside == (1,)
    assert job.decisions.from_iteration == 0


def test_a_clock_that_cannot_be_set_any_more_ends_the_plan_but_not_the_measuring() -> None:
    """The others would wait for it or waste."""
    job = profiled_job()
    job.change_state(1, can_lock=False)
    conclusions = job.iterate()
    assert conclusions.aside == (1,)
    assert (job.decisions.phase, job.decisions.plan) == (Phase.MEASURE_ONLY, 0)
    assert job.iterate().aside == (), "it is said once"


@pytest.mark.parametrize("phase", [Phase.PROFILE, Phase.COLLECT, Phase.SOLVE])
def test_a_clock_that_cannot_be_set_on_the_way_to_a_plan_ends_the_way(phase: Phase) -> None:
    """Measurements at clocks that were not in force would be wrong."""
    job = Job(has_profile=phase is not Phase.PROFILE)
    job.warm_up()
    if phase is Phase.SOLVE:
        job.collect()
    assert job.decisions.phase is phase
    job.change_state(1, can_lock=False)
    assert job.conclude().aside == (1,)
    assert job.decisions.phase is Phase.MEASURE_ONLY


def test_ranks_may_tell_of_an_iteration_at_different_times() -> None:
    """On a GPU one rank knows its times an iteration later than another."""
    job = Job()
    for iteration in range(4):
        of_now, of_before = job.times(iteration)[0], job.times(iteration - 1)[1]
        job.tell(of_now, *([of_before] if iteration else []))
        job.conclude()
        assert job.decisions.phase is (Phase.WARM_UP if iteration < 3 else Phase.PROFILE)


def test_what_is_told_twice_counts_once() -> None:
    """A rank that cannot be sure to have been heard tells it again, in another round."""
    job = Job()
    for iteration in range(2):
        told = [*job.times(iteration), *job.energies(iteration)]
        for _ in range(3):
            job.tell(*told, *told)
            job.conclude()
    assert job.decisions.phase is Phase.WARM_UP
    job.tell(*job.times(0), *job.times(1), *job.times(2, span_s=2.0), *job.times(2, span_s=2.0))
    job.conclude()
    assert job.decisions.baseline is not None
    assert job.decisions.baseline.time_s == 1.5


def test_an_iteration_that_one_rank_leaves_out_is_left_out() -> None:
    """It could not be measured there. Those after it count as ever."""
    job = Job()
    job.iterate()
    job.tell(job.times(1)[0])
    job.iteration = 2
    job.iterate()
    assert job.decisions.phase is Phase.WARM_UP
    job.iterate()
    assert job.decisions.baseline == Baseline(8, 1.0, 200.0)


def test_a_rank_that_never_tells_holds_decisions_up_and_memory_down() -> None:
    """Iterations of which one rank says nothing wait for it, but not all of them."""
    job = Job()
    held = []
    for iteration in range(500):
        job.tell(job.times(iteration)[0], job.energies(iteration)[0])
        job.conclude()
        held.append(len(job.table.times._pending) + len(job.table.energies_j._pending))
    assert job.decisions.phase is Phase.WARM_UP
    assert max(held) == held[-1] < 200


def test_energies_are_not_remembered_for_ever() -> None:
    """A job may run for months."""
    job = Job(Limits(True, 1, 2, 2, 0.01))
    for _ in range(1500):
        job.iterate()
    assert len(job.decisions._energy_of) <= 1001
    assert job.decisions.iteration_energy_j([3]) is None
    assert job.decisions.iteration_energy_j([job.iteration - 1, 10**6]) == 200.0


def test_a_number_of_microbatches_that_comes_often_gets_its_own_plan() -> None:
    """As in a batch size ramp-up."""
    job = profiled_job()
    wanted = [job.iterate(num_microbatches=4).wanted_microbatches for _ in range(12)]
    assert sorted(wanted) == [0] * 11 + [4]


def test_a_plan_for_another_number_of_microbatches_is_not_the_one_to_be_judged() -> None:
    """Iterations of the usual number are judged as before, by their own plan."""
    job = profiled_job()
    job.run_plan(2, num_microbatches=4)
    verdicts = [job.iterate(num_microbatches=4, span_s=9.0).verdicts for _ in range(4)]
    assert verdicts == [()] * 4
    (judged,) = [verdict for _ in range(3) for verdict in job.iterate(span_s=1.125).verdicts]
    assert judged.time_s == 1.125
    assert job.decisions.phase is Phase.INTERLUDE


def test_a_plan_is_applied_when_the_one_that_runs_is_another() -> None:
    """Whatever made it: a policy, a straggler elsewhere; the same plan is not applied twice."""
    job = profiled_job()
    assert job.conclude().applied == 0
    job.run_plan(2)
    assert (job.decisions.phase, job.decisions.plan) == (Phase.RUN, 2)


def _story(job: Job) -> list[tuple[Any, ...]]:
    """What is decided while a job is measured, planned, throttled, corrected and ended."""
    seen: list[tuple[Any, ...]] = []

    def look(conclusions: Conclusions) -> None:
        slow = conclusions.slow_rank
        decisions = job.decisions
        seen.append(
            (
                decisions.phase,
                decisions.from_iteration,
                decisions.baseline,
                decisions.collection,
                decisions.reason,
                decisions.plan,
                None if slow is None else (slow.stage, slow.iteration, slow.seen_s, slow.throttled),
                replace(conclusions, slow_rank=None, aside=bool(conclusions.aside)),
            )
        )

    for _ in range(3):
        look(job.iterate(lambda rank, told: told._replace(span_s=1.0 + 0.1 * rank, energy_j=70.3 + 0.7 * rank)))
    job.change_state(swept=True)
    look(job.conclude())
    look(job.collect())
    job.run_plan()
    for _ in range(3):
        look(job.iterate(hot))
    look(job.interlude(span_s=1.2))
    look(job.collect())
    job.run_plan(2)
    for number, span_s in ((3, 1.4), (4, 1.2)):
        for _ in range(3):
            look(job.iterate(span_s=span_s))
        look(job.interlude(span_s=1.06, energy_j=71.9))
        look(job.collect())
        job.run_plan(number)
    for _ in range(3):
        look(job.iterate(span_s=1.1))
    job.change_state(2, failed=True)
    look(job.iterate())
    return seen


def test_a_job_of_16384_ranks_is_decided_as_one_of_four_where_all_are_alike() -> None:
    """To the last digit: nothing depends on how many tell the same."""
    few, many = (_story(Job(stages=(0, 1, 2, 3), ranks_alike=alike)) for alike in (1, 4096))
    assert few == many
    assert {seen[0] for seen in few} == set(Phase) - {Phase.OPENING, Phase.MEASURE_ONLY}
