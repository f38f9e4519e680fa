"""What every rank tells all others at the end of every iteration: a row of numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from perseus_core.runtime.ranks.exchange import Row

NONE = -1


class Introduction(NamedTuple):
    """What every rank says once, at the start.

    Attributes:
        stage: its pipeline stage.
        data_parallel_rank: its pipeline.
        can_lock: whether it may set its GPU's clock.
        can_measure: whether it has a GPU whose energy it can read.
        has_profile: rank 0: a profile of this job is known.
        has_plan: rank 0: a plan of this job is known.
        saved_baseline_time_s, saved_baseline_energy_j, saved_num_microbatches: rank 0: the baseline that comes with it.
    """

    stage: float
    data_parallel_rank: float
    can_lock: float
    can_measure: float
    has_profile: float
    has_plan: float
    saved_baseline_time_s: float
    saved_baseline_energy_j: float
    saved_num_microbatches: float

    def row(self) -> Row:
        """As numbers."""
        return np.array(self, np.float64)


class Heartbeat(NamedTuple):
    """One rank's row. An iteration's time and energy are told once each, in order, as soon as they are known.

    Attributes:
        iteration: the iteration that has just ended on the host.
        failed: the session of this rank has given up.
        can_lock: the clock can be set.
        timed: iteration whose time is told, `NONE` if no other is known yet.
        num_microbatches: of that iteration; 0 if it was an evaluation or ran in an order of its own.
        span_s: from its begin to its end on this rank.
        seen_s: sum of its instructions' durations.
        expected_s: what the profile says that sum should be; 0 if nothing is expected.
        counted: iteration whose energy is told, `NONE` if no other is known yet.
        energy_j: energy of this rank's GPU in that iteration.
        throttled: power or heat held the clock down.
        sweep_done: this rank has measured all clocks it needs.
        part: number of the collection for which this rank's measurements are ready.
        part_bytes: their size.
        plan: rank 0: number of the newest plan.
        plan_bytes: rank 0: its size.
        received: number of the newest plan that has arrived here.
        straggler_slowdown: T'/T that this rank was told, 1 for none.
    """

    iteration: float
    failed: float = 0.0
    can_lock: float = 0.0
    timed: float = NONE
    num_microbatches: float = 0.0
    span_s: float = 0.0
    seen_s: float = 0.0
    expected_s: float = 0.0
    counted: float = NONE
    energy_j: float = 0.0
    throttled: float = 0.0
    sweep_done: float = 0.0
    part: float = 0.0
    part_bytes: float = 0.0
    plan: float = 0.0
    plan_bytes: float = 0.0
    received: float = 0.0
    straggler_slowdown: float = 1.0

    def row(self) -> Row:
        """As numbers."""
        return np.array(self, np.float64)


def heartbeats(rows: Row) -> list[Heartbeat]:
    """The heartbeats of all ranks, from an array of shape (world_size, K)."""
    return [Heartbeat(*row) for row in rows.tolist()]


def introductions(rows: Row) -> list[Introduction]:
    """The introductions of all ranks, from an array of shape (world_size, K)."""
    return [Introduction(*row) for row in rows.tolist()]
