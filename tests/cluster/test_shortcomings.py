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


@pytest.mark.parametrize("every", [5, 50, 1000])
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


@pytest.mark.parametrize("told", [{"lag_s": 0.1}, {"lag_s": 1.0}, {"reports": "clock asked for"}, {"offset_mhz": -60}])
def test_a_register_that_is_wrong_makes_nothing_late_for_long(told: dict[str, object]) -> None:
    """Either the plan is in time, or it is given up soon; the log says which."""
    with changed(job(), wrong_register(**told)) as cluster:
        cluster.run_iterations(200)
        assert late(cluster, after=-20) < 0.01, cluster.log_text
        excess = [
            time_s / statistics.median(cluster.iteration_times_s()[3:8]) - 1 for time_s in cluster.iteration_times_s()
        ]
        print(told, cluster.session(0).status().phase, sum(e > 0.02 for e in excess))
        print(cluster.log_text)


@pytest.mark.parametrize("lock_call_s", [0.08, 0.5])
def test_slow_lock_calls_make_nothing_late_for_long(lock_call_s: float) -> None:
    """As many changes as they allow."""

    def slow(gpu: VirtualGpu) -> None:
        gpu.lock_call_s = lock_call_s

    with changed(job(), slow) as cluster:
        cluster.run_iterations(200)
        excess = [
            time_s / statistics.median(cluster.iteration_times_s()[3:8]) - 1 for time_s in cluster.iteration_times_s()
        ]
        print(lock_call_s, cluster.session(0).status().phase, sum(e > 0.02 for e in excess))
        print(cluster.log_text)
        assert late(cluster, after=-20) < 0.01, cluster.log_text


def test_a_clock_that_is_not_obeyed_is_named() -> None:
    """A GPU that stays at a higher clock only saves less; the log says so."""

    def disobey(gpu: VirtualGpu) -> None:
        gpu.disobeyed_mhz = frozenset(clock for clock in gpu.model.clocks_mhz if clock < 1300)

    with job(replace(SETTINGS, interlude_interval=40)) as cluster:
        disobey(cluster.ranks[1].gpu)
        cluster.run_iterations(150)
        assert "does not obey" in cluster.log_text or "was in force" in cluster.log_text
        assert late(cluster, after=-20) < 0.01
