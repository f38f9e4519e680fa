"""How long the ranks of a test's job train: until what the test waits for has happened, all to the same iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

# Ends a job that waits for something in vain; none that waits for something that comes gets near it.
HOPELESS = 500


def iterations_until(has_happened: Callable[[], bool], *, least: int = 1, most: int = HOPELESS) -> Iterator[int]:
    """Numbers of the iterations to train; after each of them it is asked, on all ranks, whether it has happened.

    Args:
        has_happened: on this rank; what must have happened on one rank only is said to have happened by the others.
        least: how many iterations at least.
        most: how many if it never happens.
    """
    for iteration in range(most):
        yield iteration
        if agreed(iteration + 1 >= least and has_happened()):
            return


def agreed(wish: bool) -> bool:
    """Whether all ranks wish it."""
    wishes = torch.tensor([int(wish)])
    torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MIN)
    return bool(wishes.item())


def plan_of(session: Any) -> int:
    """Number of the plan in force, 0 for none."""
    return 0 if session is None else session.status().plan


def phase_of(session: Any) -> str:
    """What the session does; empty where there is none."""
    return "" if session is None else session.status().phase.value


def planned_clocks_mhz(session: Any, num_microbatches: int) -> list[int]:
    """The clock of each instruction of this rank's stage under the plan in force."""
    plan = session._order.plan_for(num_microbatches)
    return [planned.clock_mhz for planned in session._stage_plans[plan.number].clocks]


def under_plans(plans: list[int]) -> int:
    """How many of the iterations, each given by its plan, have run under one."""
    return sum(plan > 0 for plan in plans)


def under_newest_plan(plans: list[int]) -> int:
    """How many of them have run under the newest."""
    return plans.count(plans[-1]) if plans and plans[-1] else 0
