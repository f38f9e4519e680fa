"""Whole jobs on GPUs that are not all as fast as each other, nor always as fast as they were."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest

from perseus_core.runtime.settings import Settings
from tests.cluster.cluster import Cluster

SETTINGS = Settings(enabled=True, profile_cache="off", profile_clocks=5, log_interval=0)
MOST_ITERATIONS = 300


def train_until_measured(cluster: Cluster) -> None:
    """Until rank 0 has said what its first plan costs and saves."""
    while "measured in iterations" not in cluster.log_text:
        cluster.run_iterations(5)
        assert cluster.job.num_ended < MOST_ITERATIONS, cluster.log_text


@pytest.mark.parametrize("pipelines", [2, 16])
def test_the_limit_is_the_measured_one_however_pipelines_differ(pipelines: int) -> None:
    """GPUs differ by 3 %. The slowest rank of each stage is planned for, though no pipeline consists of them."""
    numbers = random.Random(1)
    with Cluster(
        seed=1,
        stages=4,
        pipelines=pipelines,
        microbatches=8,
        profile="gpt3-6.7b_a100_4stages.csv",
        time_scale=1.0,
        settings=SETTINGS,
    ) as cluster:
        for rank in cluster.ranks:
            rank.gpu.slow_down(numbers.uniform(1.0, 1.03))
        train_until_measured(cluster)
        cluster.run_iterations(30)  # and an interlude
        status, times_s = cluster.session(0).status(), cluster.iteration_times_s()
        baseline_s = statistics.median(times_s[3:8])
        assert status.plan == 1
        assert status.baseline_time_s == pytest.approx(baseline_s, rel=0.003)
        assert status.promised_slowdown == pytest.approx(0.0, abs=1e-3)
        assert statistics.median(times_s[-8:]) == pytest.approx(baseline_s, rel=0.005)
        assert status.saving == pytest.approx(status.promised_saving, abs=0.015)


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_is_kept_while_the_job_drifts(seed: int) -> None:
    """Slower and faster by 5 %, with the plan and without: nothing is corrected, and the limit follows."""
    with Cluster(
        seed=seed,
        stages=4,
        microbatches=8,
        profile="gpt3-6.7b_a100_4stages.csv",
        time_scale=1.0,
        settings=replace(SETTINGS, interlude_interval=40),
    ) as cluster:
        train_until_measured(cluster)
        for iteration in range(300):
            for rank in cluster.ranks:
                rank.gpu.slow_down(1 + 0.05 * math.sin(2 * math.pi * iteration / 150))
            cluster.run_iterations(1)
        status = cluster.session(0).status()
        assert status.plan == 1, cluster.log_text
        assert status.saving == pytest.approx(status.promised_saving, abs=0.015)
        assert abs(status.slowdown) < 0.005


def test_stages_may_have_gpus_of_another_product() -> None:
    """Each stage is swept and planned at the clocks of its own: the limit is kept, and the promise."""
    with Cluster(
        seed=1,
        stages=2,
        microbatches=8,
        profile="gpt3-6.7b_a100_4stages.csv",
        others={1: ("gpt3-6.7b_h100_4stages.csv", "h100.json")},
        time_scale=1.0,
        settings=SETTINGS,
    ) as cluster:
        train_until_measured(cluster)
        cluster.run_iterations(30)
        status, times_s = cluster.session(0).status(), cluster.iteration_times_s()
        assert status.plan == 1
        assert statistics.median(times_s[-8:]) == pytest.approx(statistics.median(times_s[3:8]), rel=0.005)
        assert status.promised_saving > 0.05
        assert status.saving == pytest.approx(status.promised_saving, abs=0.01)
        ran_at_mhz = {clock for _, clock in cluster.ranks[1].gpu.clocks_until()}
        assert ran_at_mhz - set(cluster.ranks[0].gpu.supported_clocks_mhz()), "an H100 has clocks that an A100 has not"
