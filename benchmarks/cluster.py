"""Thousands of sessions in one process and in virtual time: from warm-up to a plan, a GPU that gets hot, a new plan.

    python -m benchmarks.cluster [--stages 8] [--pipelines 64] [--tensor-parallel 8] [--microbatches 4] [--seed 1]

The runtime's code runs as it is (`tests/cluster`). Printed are the log in virtual time, in which iteration ranks begin
to follow each plan, and what it took of this machine. The last line is a fingerprint of the log, of all iteration times
and of the energy of all GPUs: the same seed gives the same one.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import resource
import time
from collections import Counter
from pathlib import Path

from perseus_core.gpu.simulated.description import Description
from perseus_core.runtime.session import Session
from perseus_core.runtime.settings import Settings
from tests.cluster.cluster import Cluster, Surroundings, real_session

SETTINGS = Settings(
    enabled=True,
    profile_cache="off",
    warmup_iterations=1,
    baseline_iterations=3,
    profile_clocks=4,
    profile_iterations=1,
    watch_iterations=3,
    log_interval=0,
)
MOST_ITERATIONS = 200
REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--pipelines", type=int, default=64)
    parser.add_argument("--tensor-parallel", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--time-scale", type=float, default=0.5)
    parser.add_argument("--counter-period", type=float, default=0.2, help="of the energy counters [s]")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began_with: dict[int, Counter[int]] = {}

    def make_session(surroundings: Surroundings) -> Session:
        """A real session that has written down in which iteration it begins to follow a plan."""
        session = real_session(surroundings)
        begin = session.begin_iteration
        seen = 0

        def begin_and_note(num_microbatches: int, *, training: bool = True) -> None:
            nonlocal seen
            begin(num_microbatches, training=training)
            status = session.status()
            if status.plan != seen:
                seen = status.plan
                began_with.setdefault(seen, Counter())[status.iterations - 1] += 1

        session.begin_iteration = begin_and_note
        return session

    started_s = time.process_time()
    cluster = Cluster(
        seed=arguments.seed,
        stages=arguments.stages,
        pipelines=arguments.pipelines,
        tensor_parallel=arguments.tensor_parallel,
        microbatches=arguments.microbatches,
        time_scale=arguments.time_scale,
        gpus=dataclasses.replace(
            Description.load(REPOSITORY / "configs/gpus/a100.json"), energy_counter_period_s=arguments.counter_period
        ),
        settings=SETTINGS,
        make_session=make_session,
    )
    ranks = len(cluster.ranks)
    _run_until_all_follow(cluster, began_with, 1)
    hot = ranks // 2
    cluster.throttle(hot, 700, at_s=cluster.queue.now_s)
    print(f"(GPU of rank {hot} is throttled to 700 MHz at {cluster.queue.now_s:.1f} s)")
    _run_until_all_follow(cluster, began_with, 2)
    cpu_s = time.process_time() - started_s
    print(cluster.log_text)
    for plan, iterations in sorted(began_with.items()):
        print(f"plan {plan}: ranks that began with it, by iteration: {dict(iterations)}")
    iterations = cluster.job.num_ended
    print(f"{ranks} sessions, {iterations} iterations, {cluster.queue.now_s:.0f} s of virtual time")
    print(f"{cpu_s:.1f} s of CPU time, {1e6 * cpu_s / ranks / iterations:.0f} us a rank and iteration")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at most")
    whole = f"{cluster.log_text}\n{cluster.iteration_times_s()}\n{cluster.energy_j()}"
    print(f"fingerprint {hashlib.sha256(whole.encode()).hexdigest()[:16]}")


def _run_until_all_follow(cluster: Cluster, began_with: dict[int, Counter[int]], plan: int) -> None:
    while began_with.get(plan, Counter()).total() < len(cluster.ranks):
        cluster.run_iterations(1)
        if cluster.job.num_ended > MOST_ITERATIONS:
            raise SystemExit(f"no plan {plan} after {MOST_ITERATIONS} iterations:\n{cluster.log_text}")
    cluster.run_iterations(SETTINGS.watch_iterations + 2)


if __name__ == "__main__":
    main()
