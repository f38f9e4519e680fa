"""The virtual cluster against arithmetic done by hand or by the planner, and against itself: the same from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from perseus_core.gpu.device import ThrottleReason
from perseus_core.gpu.errors import GpuLost, NoPermission
from perseus_core.gpu.simulated.description import Description
from perseus_core.planning.execution import execute
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import InstructionType, Kind, Schedule, one_f_one_b, zb_h1
from perseus_core.runtime.measure.sampler import EnergySampler
from perseus_core.runtime.settings import Settings
from tests.cluster.cluster import Cluster
from tests.cluster.virtual_gpu import OUTSIDE, WAITING, GpuNoise, StageModel, VirtualGpu, Work
from tests.cluster.virtual_threads import EventQueue, VirtualThreads

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXACT = GpuNoise(power=0.0, counter=0.0, latency_s=0.0, moves_s=0.0)
FORWARD, BACKWARD = 1, 0  # as `instruction_types` numbers them


class Rig:
    """One tensor-parallel group of GPUs, exact by default, that do what the test says."""

    def __init__(self, num_gpus: int = 1, *, noise: GpuNoise = EXACT) -> None:
        self.queue = EventQueue()
        self.work = Work()
        description = Description.load(CONFIGS / "gpus/a100.json")
        profile = Profile.load(CONFIGS / "profiles/gpt3-6.7b_a100_4stages.csv")
        types = [InstructionType(0, 0, Kind.BACKWARD), InstructionType(0, 0, Kind.FORWARD)]
        self.model = StageModel.of(description, profile, types, time_scale=1.0)
        self.gpus = [
            VirtualGpu(
                self.model,
                self.work,
                VirtualThreads(self.queue, rank),
                random_numbers=random.Random(rank),
                noise=noise,
            )
            for rank in range(num_gpus)
        ]

    def until(self, time_s: float) -> None:
        self.queue.call_at(time_s, self.queue.stop)
        self.queue.run_until_stopped()

    def place(self, clock_mhz: int) -> int:
        return self.model.clocks_mhz.index(clock_mhz)


def without_sessions(stages: int, *, tensor_parallel: int = 1, pipelines: int = 1, **changes: object) -> Cluster:
    """A cluster of GPUs and hosts only, without noise."""
    ranks = range(stages * pipelines * tensor_parallel)
    options = {"microbatches": 6, "time_noise": 0.0, "gpu_noise": EXACT, "tail_share": 0.0, **changes}
    return Cluster(
        seed=1,
        stages=stages,
        pipelines=pipelines,
        tensor_parallel=tensor_parallel,
        absent_ranks=ranks,
        **options,  # type: ignore[arg-type]
    )


# One GPU


def test_energy_is_power_times_time() -> None:
    """Of waiting, an instruction, waiting for the slowest of the group after it, and what is outside."""
    rig = Rig()
    (gpu,) = rig.gpus
    powers, forward_s = rig.model.powers_w[0], rig.model.times_s[0][FORWARD]
    for time_s, activity in ((1.0, FORWARD), (2.0, OUTSIDE), (2.5, WAITING)):
        rig.until(time_s)
        rig.work.begin(time_s, activity)
    rig.until(4.0)
    expected_j = powers[FORWARD] * forward_s + powers[WAITING] * (4.0 - 0.5 - forward_s) + powers[OUTSIDE] * 0.5
    assert gpu.energy_j() == pytest.approx(expected_j, rel=1e-12)


def test_a_clock_is_in_force_when_its_latency_is_over() -> None:
    """Not before; and never sooner than the one that was asked for before it."""
    rig = Rig()
    (gpu,) = rig.gpus
    gpu.lock_clock(1200)
    rig.until(0.0149)
    assert gpu.sm_clock_mhz() == 1410
    rig.until(0.0151)
    assert gpu.sm_clock_mhz() == 1200
    gpu.reset_clock()
    rig.until(0.1)
    assert gpu.sm_clock_mhz() == 1410


def test_a_clock_that_changes_in_the_middle_of_an_instruction_counts_for_its_rest() -> None:
    """Time and energy of the two parts add up."""
    rig = Rig()
    (gpu,) = rig.gpus
    slow = rig.place(900)
    rig.work.begin(0.0, BACKWARD)
    rig.until(0.03)
    gpu.lock_clock(900)
    rig.until(0.05)
    done = 0.045 / rig.model.times_s[0][BACKWARD]
    end_s = 0.045 + (1 - done) * rig.model.times_s[slow][BACKWARD]
    assert gpu.end_of_present_s() == pytest.approx(end_s, rel=1e-12)
    rig.until(1.0)
    expected_j = (
        rig.model.powers_w[0][BACKWARD] * 0.045
        + rig.model.powers_w[slow][BACKWARD] * (end_s - 0.045)
        + rig.model.powers_w[slow][WAITING] * (1.0 - end_s)
    )
    assert gpu.energy_j() == pytest.approx(expected_j, rel=1e-12)


def test_the_counter_moves_once_a_period_to_the_exact_energy() -> None:
    """Here an idle GPU's, without noise: between two moves lies one period of its power."""
    rig = Rig()
    (gpu,) = rig.gpus
    seen: dict[float, float] = {}
    for tick in range(1, 2000):
        rig.until(tick / 1000)
        seen.setdefault(gpu.total_energy_j(), tick / 1000)
    moves_s = list(seen.values())[1:]
    assert all(after - before == pytest.approx(0.1, abs=0.0011) for before, after in pairwise(moves_s))
    in_a_period_j = rig.model.powers_w[0][WAITING] * 0.1
    values_j = list(seen)[1:]
    assert all(after - before == pytest.approx(in_a_period_j) for before, after in pairwise(values_j))


def test_heat_holds_the_clock_down_and_says_so() -> None:
    """Below a lower lock it is not felt."""
    rig = Rig()
    (gpu,) = rig.gpus
    gpu.throttle(900)
    assert (gpu.sm_clock_mhz(), gpu.throttle_reasons()) == (900, ThrottleReason.THERMAL)
    gpu.lock_clock(810)
    rig.until(0.1)
    assert (gpu.sm_clock_mhz(), gpu.throttle_reasons()) == (810, ThrottleReason.NONE)
    gpu.throttle(None)
    gpu.reset_clock()
    rig.until(0.2)
    assert gpu.sm_clock_mhz() == 1410


def test_a_gpu_refuses_and_is_lost() -> None:
    """What may not be set can be read; what is lost tells nothing."""
    (gpu,) = Rig().gpus
    gpu.deny_permission()
    with pytest.raises(NoPermission):
        gpu.lock_clock(900)
    assert gpu.sm_clock_mhz() == 1410
    gpu.lose()
    with pytest.raises(GpuLost):
        gpu.total_energy_j()
    gpu.mend()
    gpu.lock_clock(900)


@pytest.mark.parametrize(("moves_s", "looks"), [(0.0, 4), (0.0005, 4), (0.002, 8)])
def test_the_sampler_sees_each_move_when_it_comes(moves_s: float, looks: int) -> None:
    """To a millisecond, nearly always, with few looks; the more the counter's moves scatter the more looks it takes."""
    rig = Rig(noise=replace(EXACT, moves_s=moves_s))
    (gpu,) = rig.gpus
    num_looks = 0
    count = gpu.total_energy_j

    def look() -> float:
        nonlocal num_looks
        num_looks += 1
        return count()

    gpu.total_energy_j = look  # type: ignore[method-assign]
    sampler = EnergySampler(gpu, threads=gpu.threads)
    sampler.start()
    rig.until(10.0)
    num_looks = 0
    rig.until(70.0)
    readings = sampler.between(10.0, 70.0)
    assert len(readings) == pytest.approx(600, abs=1)
    assert num_looks <= looks * len(readings)
    assert sum(reading.uncertainty_s < 0.0011 for reading in readings) >= 0.97 * len(readings)
    waiting_w = rig.model.powers_w[0][WAITING]
    for reading in readings:
        assert reading.energy_j == pytest.approx(waiting_w * reading.time_s, abs=waiting_w * reading.uncertainty_s)


# Pipelines


@pytest.mark.parametrize("schedule", [one_f_one_b, zb_h1])
@pytest.mark.parametrize("clock_mhz", [1410, 1005])
def test_an_iteration_takes_what_the_planner_says(schedule: Callable[[int, int], Schedule], clock_mhz: int) -> None:
    """Time and energy of four stages at one clock, by events here and by the critical path there."""
    profile = Profile.load(CONFIGS / "profiles/gpt3-6.7b_a100_4stages.csv")
    if schedule is zb_h1:
        profile = profile.with_split_backward()
    cluster = without_sessions(4, schedule=schedule, profile=profile, time_scale=1.0, tensor_parallel=2)
    for rank in cluster.ranks:
        rank.gpu.throttle(clock_mhz)
    cluster.run_iterations(3)
    blocking_w = Description.load(CONFIGS / "gpus/a100.json").blocking_power_at(clock_mhz)
    problem = PipelineProblem.of(profile, schedule(4, 6), blocking_w)
    execution = execute(problem, [clock_mhz] * len(problem.dag.instructions))
    assert cluster.iteration_times_s() == pytest.approx([execution.iteration_time_s] * 3, rel=1e-12)
    assert cluster.energy_j() == pytest.approx(3 * 2 * execution.energy_j, rel=1e-9)


def test_tensor_parallel_ranks_end_with_the_slowest() -> None:
    """The others wait for it, at the power of waiting; and so does the other pipeline at the end of the iteration."""
    cluster = without_sessions(1, tensor_parallel=2, pipelines=2, microbatches=1)
    slow, fast = cluster.ranks[0].gpu, cluster.ranks[1].gpu
    work_s = slow.duration_s(FORWARD) + slow.duration_s(BACKWARD)
    slow.slow_down(1.5)
    cluster.run_iterations(1)
    assert cluster.iteration_times_s() == pytest.approx([1.5 * work_s], rel=1e-12)
    waiting_j = 0.5 * work_s * Description.load(CONFIGS / "gpus/a100.json").blocking_power_at(1410)
    others = [rank.gpu.energy_j() for rank in cluster.ranks[1:]]
    assert others == pytest.approx([fast.energy_j()] * 3)
    assert slow.energy_j() == pytest.approx(1.5 * (fast.energy_j() - waiting_j), rel=1e-9)


def test_a_change_in_the_middle_of_an_instruction_moves_its_end() -> None:
    """A GPU that becomes half as fast while it computes needs twice as long for the rest, and the iteration with it."""
    cluster = without_sessions(1, microbatches=1)
    gpu = cluster.ranks[0].gpu
    forward_s, backward_s = gpu.duration_s(FORWARD), gpu.duration_s(BACKWARD)
    cluster.slow_down(0, 2.0, at_s=0.25 * forward_s)
    cluster.run_iterations(1)
    assert cluster.iteration_times_s() == pytest.approx(
        [0.25 * forward_s + 1.5 * forward_s + 2 * backward_s], rel=1e-12
    )


# Sessions


def test_the_same_seed_gives_the_same_log_and_another_seed_another() -> None:
    """To the last digit of virtual time."""
    settings = Settings(enabled=True, profile_cache="off", baseline_iterations=3, profile_clocks=3)

    def life(seed: int) -> tuple[str, list[float], float]:
        with Cluster(seed=seed, stages=2, pipelines=2, tensor_parallel=2, microbatches=4, settings=settings) as cluster:
            cluster.throttle(3, 1200, at_s=6.0)
            cluster.stop_side_threads(5, 1.0, at_s=3.0)
            cluster.delay_store(2, 0.01)
            cluster.run_iterations(40)
            return cluster.log_text, cluster.job.ended_at_s, cluster.energy_j()

    assert life(1) == life(1)
    assert life(1)[1] != life(2)[1]


def test_sessions_go_through_their_life() -> None:
    """Warm up, profile, plan: less energy by then, and the clocks given back at the end."""
    settings = Settings(enabled=True, profile_cache="off", baseline_iterations=4, profile_clocks=4)
    with Cluster(
        seed=3, stages=4, microbatches=8, settings=settings, profile="gpt3-6.7b_a100_4stages.csv", time_scale=1.0
    ) as cluster:
        cluster.run_until(lambda: "plan applied" in cluster.log[-1].text if cluster.log else False)
        cluster.run_iterations(6)
        before_j, before_s = cluster.energy_j(), cluster.queue.now_s
        cluster.run_iterations(4)
        planned_w = (cluster.energy_j() - before_j) / (cluster.queue.now_s - before_s)
    cluster.run_for(1.0)
    assert {rank.gpu.sm_clock_mhz() for rank in cluster.ranks} == {1410}
    cluster.run_iterations(1)
    before_j, before_s = cluster.energy_j(), cluster.queue.now_s
    cluster.run_iterations(4)
    assert planned_w < 0.97 * (cluster.energy_j() - before_j) / (cluster.queue.now_s - before_s)


def test_a_rank_that_never_opens_a_session_stops_nobody() -> None:
    """The others say so, and training goes on as without us."""
    with Cluster(seed=1, stages=2, pipelines=2, microbatches=4, absent_ranks=[2]) as cluster:
        cluster.run_for(30.0)
        assert "rank 2 has no session" in cluster.log_text
        assert all(rank.gpu.num_lock_calls == 0 for rank in cluster.ranks)
        times_s = cluster.iteration_times_s()
        assert math.isclose(min(times_s), max(times_s), rel_tol=0.02)
