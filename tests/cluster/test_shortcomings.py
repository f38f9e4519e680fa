"""Whole jobs on GPUs and drivers as unpleasant as real ones: training is not late for it, and the log says what is."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest

from perseus_core.gpu.simulated.shortcomings import ClockRegister
from perseus_core.runtime.ranks.order import Phase
from perseus_core.runtime.settings import Settings
from tests.cluster.cluster import Cluster
from tests.cluster.virtual_gpu import VirtualGpu
from tests.cluster.virtual_slices import VirtualSlices

SETTINGS = Settings(enabled=True, profile_cache="off", profile_clocks=5, log_interval=0)


def job(settings: Settings = SETTINGS) -> Cluster:
    """Forwards of 66 ms, changes of clock of 15 ms."""
    return Cluster(
        seed=1,
        stages=4,
        microbatches=8,
        profile="gpt3-6.7b_a100_4stages.csv",
        time_scale=1.0,
        settings=settings,
    )


def late(cluster: Cluster, *, after: int) -> float:
    """By how much the median of the iterations from one on lies above the baseline, relative."""
    times_s = cluster.iteration_times_s()
    return statistics.median(times_s[after:]) / statistics.median(times_s[3:8]) - 1


def changed(cluster: Cluster, change: Callable[[VirtualGpu], None]) -> Cluster:
    """The same job on GPUs that were changed in some way."""
    for rank in cluster.ranks:
        change(rank.gpu)
    return cluster


def wrong_register(**wrong: object) -> Callable[[VirtualGpu], None]:
    """Tells another clock than the one in force."""

    def change(gpu: VirtualGpu) -> None:
        gpu.register = ClockRegister(**wrong)  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize("every", [10, 50, 1000])
def test_an_error_that_comes_and_goes_costs_nothing(every: int) -> None:
    """Of whatever call: what could not be read is read later, what could not be asked for is asked for again."""

    def fail(gpu: VirtualGpu) -> None:
        gpu.fails = lambda call: call % every == 0

    with changed(job(), fail) as cluster:
        cluster.run_iterations(90)
        status = cluster.session(0).status()
        assert (status.phase in (Phase.RUN, Phase.INTERLUDE), status.plan) == (True, 1), cluster.log_text
        assert status.saving == pytest.approx(status.promised_saving, abs=0.015)
        assert late(cluster, after=-20) < 0.01


def test_an_error_that_stays_is_named_and_all_step_aside() -> None:
    """After ten seconds; until then training has lost no more than that its clock is not what was planned."""
    with job() as cluster:
        while "plan applied" not in cluster.log_text:
            cluster.run_iterations(5)
        gpu = cluster.ranks[2].gpu
        gpu.fails = lambda _: True
        cluster.run_iterations(60)
        assert "timeout" in cluster.log_text
        assert cluster.session(0).status().phase in (Phase.MEASURE_ONLY, Phase.STEPPED_ASIDE)
        gpu.fails = lambda _: False
        cluster.run_iterations(5)
        assert late(cluster, after=-4) < 0.01


@pytest.mark.parametrize("told", [{"lag_s": 0.1}, {"lag_s": 1.0}, {"reports": "clock asked for"}])
def test_where_the_gpu_counts_cycles_a_wrong_register_does_not_matter(told: dict[str, object]) -> None:
    """What changes of clock take is not read there."""
    with changed(job(), wrong_register(**told)) as cluster:
        for rank in cluster.ranks:
            rank.events.counting = VirtualSlices(rank.gpu)
        cluster.run_iterations(90)
        status = cluster.session(0).status()
        assert status.plan == 1, cluster.log_text
        assert status.saving == pytest.approx(status.promised_saving, abs=0.015)
        assert late(cluster, after=-20) < 0.01


@pytest.mark.parametrize("told", [{"lag_s": 0.1}, {"offset_mhz": -60}])
def test_a_plan_that_a_wrong_register_makes_late_is_given_up_soon(told: dict[str, object]) -> None:
    """A GPU that cannot count is believed, until its plans are late: two of them, and no more."""
    with changed(job(), wrong_register(**told)) as cluster:
        while "left to the driver" not in cluster.log_text:
            cluster.run_iterations(5)
            assert cluster.job.num_ended < 100, cluster.log_text
        cluster.run_iterations(10)
        assert late(cluster, after=-5) < 0.01


@pytest.mark.parametrize(("lock_call_s", "least_saving"), [(0.08, 0.12), (0.5, 0.0)])
def test_slow_lock_calls_are_planned_for(lock_call_s: float, least_saving: float) -> None:
    """Fewer changes, and none before the last call has returned."""

    def slow(gpu: VirtualGpu) -> None:
        gpu.lock_call_s = lock_call_s

    with changed(job(), slow) as cluster:
        cluster.run_iterations(90)
        status = cluster.session(0).status()
        assert status.plan == 1, cluster.log_text
        assert status.promised_saving >= least_saving
        assert status.saving == pytest.approx(status.promised_saving, abs=0.015)
        assert late(cluster, after=-20) < 0.01


def test_a_clock_that_is_not_obeyed_is_named() -> None:
    """A GPU that stays at a higher clock saves less, and makes nothing late."""
    with job() as cluster:
        gpu = cluster.ranks[1].gpu
        gpu.disobeyed_mhz = frozenset(clock for clock in gpu.model.clocks_mhz if clock < 1300)
        cluster.run_iterations(90)
        assert "does not obey" in cluster.log_text
        assert late(cluster, after=-20) < 0.01


def test_a_gpu_that_does_not_go_up_to_its_clock_is_named_and_all_step_back() -> None:
    """No plan can be made for it: twice some iterations are late, and no more."""
    with job() as cluster:
        while "plan applied" not in cluster.log_text:
            cluster.run_iterations(1)
        begin = cluster.job.num_ended
        gpu = cluster.ranks[2].gpu
        gpu.disobeyed_mhz = frozenset(clock for clock in gpu.model.clocks_mhz if clock > 1000)
        cluster.run_iterations(60)
        assert "stage 2 (rank 2) does not run at the clocks that it is asked for" in cluster.log_text
        assert "left to the driver" in cluster.log_text
        times_s = cluster.iteration_times_s()
        baseline_s = statistics.median(times_s[3:8])
        assert sum(time_s > 1.02 * baseline_s for time_s in times_s[begin:]) <= 25
        assert late(cluster, after=-20) < 0.01


def test_a_highest_clock_that_is_not_obeyed_costs_little_and_not_for_long() -> None:
    """The plan, corrected by what was seen, is less late; corrected again it would not be, and so never runs."""
    with job() as cluster:
        gpu = cluster.ranks[2].gpu
        gpu.disobeyed_mhz = frozenset(gpu.model.clocks_mhz[:1])
        cluster.run_iterations(110)
        assert cluster.log_text.count("plan applied") == 2
        assert "no plan keeps what is allowed with what was seen" in cluster.log_text
        assert late(cluster, after=-20) < 0.002


def test_a_gpu_that_is_disturbed_now_and_then_costs_no_saving_for_long() -> None:
    """Slow for some iterations, again and again: that is no fault of the plan's. It is made anew at most."""
    with job() as cluster:
        while "measured in iterations" not in cluster.log_text:
            cluster.run_iterations(5)
        gpu = cluster.ranks[2].gpu
        for _ in range(4):
            gpu.slow_down(1.25)
            cluster.run_iterations(6)
            gpu.slow_down(1.0)
            cluster.run_iterations(34)
        status = cluster.session(0).status()
        assert "left to the driver" not in cluster.log_text
        assert status.promised_saving > 0.13
        assert status.saving == pytest.approx(status.promised_saving, abs=0.015)
        assert late(cluster, after=-10) < 0.01


class SlowAtSetClocks:
    """A GPU whose instructions take longer while a clock is locked, whichever."""

    def __init__(self, gpu: VirtualGpu, factor: float) -> None:
        self._lock, self._reset, self._gpu, self._factor = gpu.lock_clock, gpu.reset_clock, gpu, factor
        gpu.lock_clock, gpu.reset_clock = self._lock_clock, self._reset_clock  # type: ignore[method-assign]

    def _lock_clock(self, clock_mhz: int) -> None:
        self._lock(clock_mhz)
        self._gpu.slow_down(self._factor)

    def _reset_clock(self) -> None:
        self._reset()
        self._gpu.slow_down(1.0)


@pytest.mark.parametrize(("interval", "factor"), [(20, 1.04), (60, 1.04), (40, 1.1), (200, 1.1)])
def test_a_plan_that_has_been_good_for_long_is_given_up_as_soon_as_a_new_one(interval: int, factor: float) -> None:
    """What interludes found before says nothing of now."""
    with job(replace(SETTINGS, interlude_interval=interval)) as cluster:
        cluster.run_iterations(240)
        assert cluster.session(0).status().plan == 1
        SlowAtSetClocks(cluster.ranks[2].gpu, factor)
        cluster.run_iterations(80)
        times_s = cluster.iteration_times_s()
        baseline_s = statistics.median(times_s[3:8])
        assert sum(time_s > 1.01 * baseline_s for time_s in times_s[240:]) <= 30, cluster.log_text
        assert late(cluster, after=-20) < 0.01
